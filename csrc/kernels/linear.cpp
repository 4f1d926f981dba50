// linear and gated_linear for fp32, bf16 and f16 weights in panels: from sums to rows of y.
#include "linear.h"
#include "types.h"

namespace HR_NS {

constexpr int64_t kMostExpected = 48;  // rows

// Elements [first, first + columns) of a bias for a block, zero where there is none.
static void load_bias(const void* bias, int32_t dtype, int64_t first, int64_t columns, float* out) {
  for (int64_t j = 0; j < kPanelsAtOnce * HR_PANEL; ++j) out[j] = 0.0f;
  if (!bias) return;
  with_type(dtype, [&](auto type) {
    load_elements(static_cast<const decltype(type)*>(bias) + first, columns, out);
  });
}

// The outputs that the panels of a block really have.
static int64_t columns_of(const hr_weight& w, const Block& block) {
  const int64_t last = block.last * HR_PANEL;
  return (last < w.out ? last : w.out) - block.first * HR_PANEL;
}

// Where the sums of a block of `rows` rows have output j of row r.
static int64_t place(int64_t r, int64_t j, int64_t rows) {
  return (j / HR_PANEL * rows + r) * HR_PANEL + j % HR_PANEL;
}

namespace {  // the linker must not share its functions between levels
// One product of `rows` rows, cut into blocks. Every thread lays out the rows it needs in memory of
// its own: lines that two cores write and read in turn cost more than copying twice.
class Product {
 public:
  Product(const hr_rows& x, const hr_weight& weight, int64_t rows)
      : x_(x), all_(rows, weight, x.dtype), cut_(all_, weight) {
    static int64_t calls = 0;
    number_ = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
  }

  // body(input, block) for every block.
  template <class Body>
  void run(const Body& body) const {
    hr::parallel(cut_.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Block block = cut_.block(i);
        body(rows_of(block), block);
      }
    });
  }

 private:
  Input rows_of(const Block& block) const {
    static thread_local int64_t number = 0, tile = 0;  // of what the scratch memory holds
    Input input = all_;
    input.first = all_.tiling.begin(block.first_tile);
    input.held = block.rows(all_.tiling);
    input.data = static_cast<char*>(hr::scratch(static_cast<size_t>(input.bytes()), 0));
    if (number != number_ || tile != block.first_tile) {
      lay_out(x_, input.first, nullptr, input);
      number = number_, tile = block.first_tile;
    }
    return input;
  }

  const hr_rows& x_;
  Input all_;
  Cut cut_;
  int64_t number_;
};
}  // namespace

static float* sums_of(const Block& block, const Input& input, int64_t products) {
  const int64_t floats = block.rows(input.tiling) * (block.last - block.first) * HR_PANEL;
  return static_cast<float*>(hr::scratch(static_cast<size_t>(products * floats) * 4, 1));
}

// ---- linear -------------------------------------------------------------------------------------

// The outputs of a block will be written. Many would be driven out of the cache before.
static void expect(const hr_rows& y, const hr_weight& weight, const Input& input,
                   const Block& block, int64_t row) {
  const int64_t rows = block.rows(input.tiling);
  if (rows > kMostExpected) return;
  expect_rows(y, row, rows, block.first * HR_PANEL, columns_of(weight, block));
}

template <class T>
static void write_linear(const hr_linear_args& args, const Input& input, const Block& block,
                         int64_t row, const float* c) {
  const int64_t rows = block.rows(input.tiling), column = block.first * HR_PANEL;
  const int64_t columns = columns_of(args.weight, block);
  alignas(64) float bias[kPanelsAtOnce * HR_PANEL];
  load_bias(args.bias, args.bias_dtype, column, columns, bias);
  for (int64_t r = 0; r < rows; ++r) {
    T* y = row_of<T>(args.y, row + r) + column;
    const T* residual = args.residual.data ? row_of<T>(args.residual, row + r) + column : nullptr;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j < kLanes ? columns - j : kLanes;
      vf value = load(c + place(r, j, rows)) + load(bias + j);
      if (residual) value = value + take(residual + j, n);
      put(y + j, value, n);
    }
  }
}

void linear_block(const hr_linear_args& args, const Input& input, const Block& block, int64_t row) {
  float* sums = sums_of(block, input, 1);
  row += input.tiling.begin(block.first_tile);
  expect(args.y, args.weight, input, block, row);
  multiply(input, args.weight, block, sums);
  with_type(args.y.dtype, [&](auto type) {
    write_linear<decltype(type)>(args, input, block, row, sums);
  });
}

static void linear(const hr_linear_args& args, const hr_step& step) {
  const int64_t rows = args.over == HR_PICKED ? step.picked : step.tokens;
  if (rows == 0) return;
  Product(args.x, args.weight, rows).run([&](const Input& input, const Block& block) {
    linear_block(args, input, block, 0);
  });
}

// ---- gated_linear -------------------------------------------------------------------------------

template <class T>
static void write_gated(const hr_gated_linear_args& args, const Input& input, const Block& block,
                        int64_t row, const float* gates, const float* ups) {
  const int64_t rows = block.rows(input.tiling), column = block.first * HR_PANEL;
  const int64_t columns = columns_of(args.gate, block);
  alignas(64) float gate_bias[kPanelsAtOnce * HR_PANEL], up_bias[kPanelsAtOnce * HR_PANEL];
  load_bias(args.bias, args.bias_dtype, column, columns, gate_bias);
  load_bias(args.bias, args.bias_dtype, args.gate.out + column, columns, up_bias);
  for (int64_t r = 0; r < rows; ++r) {
    T* y = row_of<T>(args.y, row + r) + column;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int64_t n = columns - j < kLanes ? columns - j : kLanes, at = place(r, j, rows);
      const vf gate = rounded<T>(load(gates + at) + load(gate_bias + j));
      const vf up = rounded<T>(load(ups + at) + load(up_bias + j));
      const vf value = args.activation == HR_SWIGLU_CLAMPED
                           ? swiglu_clamped(gate, up, args.alpha, args.limit)
                           : activate(gate, args.activation) * up;
      put(y + j, value, n);
    }
  }
}

void gated_block(const hr_gated_linear_args& args, const Input& input, const Block& block,
                 int64_t row) {
  float* gates = sums_of(block, input, 2);
  float* ups = gates + block.rows(input.tiling) * (block.last - block.first) * HR_PANEL;
  row += input.tiling.begin(block.first_tile);
  expect(args.y, args.gate, input, block, row);
  multiply(input, args.gate, block, gates);
  multiply(input, args.up, block, ups);
  with_type(args.y.dtype, [&](auto type) {
    write_gated<decltype(type)>(args, input, block, row, gates, ups);
  });
}

static void gated_linear(const hr_gated_linear_args& args, const hr_step& step) {
  if (step.tokens == 0) return;
  Product(args.x, args.gate, step.tokens).run([&](const Input& input, const Block& block) {
    gated_block(args, input, block, 0);
  });
}

HR_OPERATOR(linear, hr_linear_args)
HR_OPERATOR(gated_linear, hr_gated_linear_args)

}  // namespace HR_NS
