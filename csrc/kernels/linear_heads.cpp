// heads_linear: a small product of its own for each head, as multi-head latent attention needs them
// to enter and to leave the latent space (arXiv 2405.04434).
//
// A head's sums are those of `linear` with its weight: a row of y is the same in every batch.
#include "linear.h"
#include "types.h"

namespace HR_NS {

namespace {

constexpr int64_t kMostRows = 96;  // of a head, laid out at once

int64_t size_of(int32_t dtype) { return dtype == HR_F32 ? 4 : 2; }

// `columns` columns from `first` on.
hr_rows part_of(const hr_rows& rows, int64_t first, int64_t columns) {
  return {static_cast<char*>(rows.data) + first * size_of(rows.dtype), rows.stride, columns,
          rows.dtype};
}

// What follows the factors of a head, from x to y.
void pass_on(const hr_rows& from, const hr_rows& to, int64_t first, int64_t count) {
  const int64_t size = size_of(from.dtype);
  for (int64_t row = first; row < first + count; ++row) {
    memcpy(static_cast<char*>(to.data) + row * to.stride * size,
           static_cast<const char*>(from.data) + row * from.stride * size,
           static_cast<size_t>(from.columns * size));
  }
}

// Rows [row, row + rows) of one head.
void one_head(const hr_heads_linear_args& args, int64_t head, int64_t row, int64_t rows) {
  const hr_weight& weight = args.weights[head];
  const int64_t from = args.x.columns / args.heads, to = args.y.columns / args.heads;
  const int64_t x = head * from, y = head * to;
  Input input(rows, weight, args.x.dtype);
  input.data = static_cast<char*>(hr::scratch(static_cast<size_t>(input.bytes()), 0));
  lay_out(part_of(args.x, x, weight.in), row, nullptr, input);
  const hr_linear_args product = {part_of(args.x, x, weight.in), part_of(args.y, y, weight.out),
                                  weight, nullptr, 0, HR_TOKENS, hr_rows{}};
  const Cut cut(input, weight);
  for (int64_t i = 0; i < cut.count(); ++i) linear_block(product, input, cut.block(i), row);
  pass_on(part_of(args.x, x + weight.in, from - weight.in),
          part_of(args.y, y + weight.out, to - weight.out), row, rows);
}

}  // namespace

static void heads_linear(const hr_heads_linear_args& args, const hr_step& step) {
  const int64_t parts = (step.tokens + kMostRows - 1) / kMostRows;
  const int64_t rows = step.tokens < kMostRows ? step.tokens : kMostRows;
  const int64_t each = rows * args.weights[0].in * args.weights[0].out;  // multiplications
  hr::parallel(args.heads * parts, 1 + (1 << 16) / (each + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % parts * kMostRows, left = step.tokens - row;
      one_head(args, i / parts, row, left < kMostRows ? left : kMostRows);
    }
  });
}

HR_OPERATOR(heads_linear, hr_heads_linear_args)

}  // namespace HR_NS
