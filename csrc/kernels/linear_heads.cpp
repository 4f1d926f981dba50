// heads_linear: a small product of its own for each head, as multi-head latent attention needs them
// to enter and to leave the latent space (arXiv 2405.04434).
//
// A head's sums are those of `linear` with its weight: a row of y is the same in every batch.
#include "linear.h"
#include "types.h"

namespace HR_NS {

namespace {

constexpr int64_t kMostRows = 256;  // of each head, laid out at once

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

void some_rows(const hr_heads_linear_args& args, int64_t row, int64_t rows) {
  const int64_t in = args.weights[0].in, out = args.weights[0].out;
  const int64_t from = args.x.columns / args.heads, to = args.y.columns / args.heads;
  const Input one(rows, args.weights[0], args.x.dtype);
  const Cut cut(one, args.weights[0]);
  const int64_t bytes = one.bytes(), blocks = cut.count();
  char* data = static_cast<char*>(hr::scratch(static_cast<size_t>(args.heads * bytes), 0));
  const auto input_of = [&](int64_t head) {
    Input input = one;
    input.data = data + head * bytes;
    return input;
  };
  hr::parallel(args.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      lay_out(part_of(args.x, h * from, in), row, nullptr, input_of(h));
      pass_on(part_of(args.x, h * from + in, from - in), part_of(args.y, h * to + out, to - out),
              row, rows);
    }
  });
  hr::parallel(args.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t h = i / blocks;
      linear_block({part_of(args.x, h * from, in), part_of(args.y, h * to, out), args.weights[h],
                    nullptr, 0, HR_TOKENS, hr_rows{}},
                   input_of(h), cut.block(i % blocks), row);
    }
  });
}

}  // namespace

static void heads_linear(const hr_heads_linear_args& args, const hr_step& step) {
  for (int64_t row = 0; row < step.tokens; row += kMostRows) {
    const int64_t left = step.tokens - row;
    some_rows(args, row, left < kMostRows ? left : kMostRows);
  }
}

HR_OPERATOR(heads_linear, hr_heads_linear_args)

}  // namespace HR_NS
