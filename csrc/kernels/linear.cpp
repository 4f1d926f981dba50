// linear and gated_linear for fp32, bf16 and f16 weights in panels: from sums to rows of y.
#include "linear.h"
#include "types.h"

namespace HR_NS {

constexpr int64_t kMostRows = 576;  // laid out at once

// Elements [first, first + columns) of a bias for one panel, zero where there is none.
static void load_bias(const void* bias, int32_t dtype, int64_t first, int64_t columns, float* out) {
  for (int64_t j = 0; j < HR_PANEL; ++j) out[j] = 0.0f;
  if (!bias) return;
  with_type(dtype, [&](auto type) {
    load_elements(static_cast<const decltype(type)*>(bias) + first, columns, out);
  });
}

// The outputs that panel p really has.
static int64_t columns_of(const hr_weight& w, int64_t p) {
  const int64_t left = w.out - p * HR_PANEL;
  return left < HR_PANEL ? left : HR_PANEL;
}

// Lays out rows of x part by part and calls body(input, first row) for each.
template <class Body>
static void by_parts(const hr_rows& x, const hr_weight& weight, int64_t rows, const Body& body) {
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts;
    Input input((part + 1) * rows / parts - row, weight, x.dtype);
    input.data = static_cast<char*>(hr::scratch(static_cast<size_t>(input.bytes()), 0));
    lay_out(x, row, nullptr, input);
    body(input, row);
  }
}

static float* sums_of(const Block& block, const Input& input, int64_t products) {
  const int64_t floats = block.rows(input.tiling) * (block.last - block.first) * HR_PANEL;
  return static_cast<float*>(hr::scratch(static_cast<size_t>(products * floats) * 4, 1));
}

// ---- linear -------------------------------------------------------------------------------------

template <class T>
static void write_linear(const hr_linear_args& args, const Input& input, const Block& block,
                         int64_t row, const float* c) {
  for (int64_t p = block.first; p < block.last; ++p) {
    const int64_t column = p * HR_PANEL, columns = columns_of(args.weight, p);
    alignas(64) float bias[HR_PANEL];
    load_bias(args.bias, args.bias_dtype, column, columns, bias);
    for (int64_t r = row; r < row + block.rows(input.tiling); ++r, c += HR_PANEL) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t n = columns - j < kLanes ? columns - j : kLanes, at = column + j;
        vf value = load(c + j) + load(bias + j);
        if (args.residual.data) value = value + take(row_of<T>(args.residual, r) + at, n);
        put(row_of<T>(args.y, r) + at, value, n);
      }
    }
  }
}

void linear_block(const hr_linear_args& args, const Input& input, const Block& block, int64_t row) {
  float* sums = sums_of(block, input, 1);
  multiply(input, args.weight, block, sums);
  with_type(args.y.dtype, [&](auto type) {
    write_linear<decltype(type)>(args, input, block, row + input.tiling.begin(block.first_tile),
                                 sums);
  });
}

static void linear(const hr_linear_args& args, const hr_step& step) {
  const int64_t rows = args.over == HR_PICKED ? step.picked : step.tokens;
  by_parts(args.x, args.weight, rows, [&](const Input& input, int64_t row) {
    const Cut cut(input, args.weight);
    hr::parallel(cut.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) linear_block(args, input, cut.block(i), row);
    });
  });
}

// ---- gated_linear -------------------------------------------------------------------------------

template <class T>
static void write_gated(const hr_gated_linear_args& args, const Input& input, const Block& block,
                        int64_t row, const float* gates, const float* ups) {
  for (int64_t p = block.first; p < block.last; ++p) {
    const int64_t column = p * HR_PANEL, columns = columns_of(args.gate, p);
    alignas(64) float gate_bias[HR_PANEL], up_bias[HR_PANEL];
    load_bias(args.bias, args.bias_dtype, column, columns, gate_bias);
    load_bias(args.bias, args.bias_dtype, args.gate.out + column, columns, up_bias);
    for (int64_t r = row; r < row + block.rows(input.tiling); ++r) {
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t n = columns - j < kLanes ? columns - j : kLanes;
        const vf gate = rounded<T>(load(gates + j) + load(gate_bias + j));
        const vf up = rounded<T>(load(ups + j) + load(up_bias + j));
        const vf value = args.activation == HR_SWIGLU_CLAMPED
                             ? swiglu_clamped(gate, up, args.alpha, args.limit)
                             : activate(gate, args.activation) * up;
        put(row_of<T>(args.y, r) + column + j, value, n);
      }
      gates += HR_PANEL;
      ups += HR_PANEL;
    }
  }
}

void gated_block(const hr_gated_linear_args& args, const Input& input, const Block& block,
                 int64_t row) {
  float* gates = sums_of(block, input, 2);
  float* ups = gates + block.rows(input.tiling) * (block.last - block.first) * HR_PANEL;
  multiply(input, args.gate, block, gates);
  multiply(input, args.up, block, ups);
  with_type(args.y.dtype, [&](auto type) {
    write_gated<decltype(type)>(args, input, block, row + input.tiling.begin(block.first_tile),
                                gates, ups);
  });
}

static void gated_linear(const hr_gated_linear_args& args, const hr_step& step) {
  by_parts(args.x, args.gate, step.tokens, [&](const Input& input, int64_t row) {
    const Cut cut(input, args.gate);
    hr::parallel(cut.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) gated_block(args, input, cut.block(i), row);
    });
  });
}

HR_OPERATOR(linear, hr_linear_args)
HR_OPERATOR(gated_linear, hr_gated_linear_args)

}  // namespace HR_NS
