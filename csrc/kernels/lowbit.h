// What products with low-bit weights share: tiles of rows, the order of work, quantizing, results.
//
// Quantizing is one row's (or one group's) business alone, and `ops/ref_lowbit.py` is its
// definition, bit by bit. Part of the kernel files: the same rules as simd.h.
#pragma once
#include "types.h"

namespace HR_NS {
namespace {  // the linker must not share these functions between levels

constexpr int64_t kMostRows = 576;          // of x, quantized at once
constexpr int64_t kBlockBytes = 384 << 10;  // of x, kept in the second-level cache
constexpr int64_t kPanelsAtOnce = 8;
constexpr int64_t kAhead = 2048;  // bytes that the stream of weights is fetched ahead

HR_INLINE int64_t round_up(int64_t value, int64_t by) { return (value + by - 1) / by * by; }
HR_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
HR_INLINE int64_t panels_of(const hr_weight& w) { return (w.out + HR_PANEL - 1) / HR_PANEL; }

// Rows cut into tiles of at most `most`, whose sizes differ by at most one.
struct RowTiles {
  int64_t rows, tiles;

  RowTiles(int64_t rows, int64_t most) : rows(rows), tiles((rows + most - 1) / most) {}
  int64_t begin(int64_t tile) const { return tile * rows / tiles; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
  int64_t holding(int64_t row) const { return ((row + 1) * tiles - 1) / rows; }
};

// Calls product(panel, first_tile, last_tile), many times at once. `tile_bytes` of x: tiles of one
// call stay in the cache. `work`: products of one panel and all rows.
template <class Product>
static void each_block(int64_t panels, const RowTiles& tiling, int64_t tile_bytes, int64_t work,
                       const Product& product) {
  const int64_t tiles = 1 + (kBlockBytes - 1) / tile_bytes;  // of a block
  const int64_t blocks = (tiling.tiles + tiles - 1) / tiles;
  int64_t at_once = kPanelsAtOnce;
  if (blocks == 1) at_once = least(kPanelsAtOnce, 1 + (1 << 20) / (work + 1));
  const int64_t groups = (panels + at_once - 1) / at_once;
  hr::parallel(groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_tile = i / groups * tiles, first = i % groups * at_once;
      const int64_t last_tile = least(first_tile + tiles, tiling.tiles);
      for (int64_t p = first; p < least(first + at_once, panels); ++p) {
        product(p, first_tile, last_tile);
      }
    }
  });
}

// The rows of a linear layer, at most kMostRows at a time: multiply(first row, rows).
template <class Multiply>
static void each_part(const hr_linear_args& args, const hr_step& step, const Multiply& multiply) {
  const int64_t rows = args.over == HR_PICKED ? step.picked : step.tokens;
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts;
    multiply(row, (part + 1) * rows / parts - row);
  }
}

// What the inner loop fetches beside its own weights: `step` bytes further each time.
struct Ahead {
  const char* from;
  int64_t step;
};

// One tile streams its own panel; the first ones of several fetch the next panel in turns.
HR_INLINE Ahead ahead_of(const char* panel, int64_t panel_bytes, int64_t tile, int64_t tiles,
                         const char* nothing) {
  if (tiles == 1) return {panel + kAhead + 64, 128};
  if (tile >= 2) return {nothing, 0};
  return {panel + panel_bytes + tile * panel_bytes / 2, 64};
}

// ---- quantizing ---------------------------------------------------------------------------------

// The largest |x|, NaN if there is one; `count` is a multiple of kLanes.
static inline float largest_size(const float* x, int64_t count) {
  vi most = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vi size = (vi)load(x + i) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const int32_t all = fold(most, [](vi a, vi b) { return a > b ? a : b; });
  return as_float(static_cast<uint32_t>(all));
}

// Signed 8-bit values of `count` numbers (a multiple of kLanes) and their sum; returns the scale.
static inline float quantize(const float* x, int64_t count, int8_t* q, int32_t* sum) {
  typedef int8_t bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
  const float size = largest_size(x, count), top = size < 1e-30f ? 1e-30f : size;
  const vf inverse = set(127.0f / top);
  vi total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const vi values = __builtin_convertvector(round(load(x + i) * inverse), vi);
    total += values;
    *reinterpret_cast<bytes*>(q + i) = __builtin_convertvector(values, bytes);
  }
  *sum = fold(total, [](vi a, vi b) { return a + b; });
  return top / 127.0f;
}

// Memory for one row as fp32 and as bytes, padded with zeros to `width`.
struct RowBuffer {
  float* numbers;
  int8_t* bytes;
  int64_t width;

  explicit RowBuffer(int64_t width) : width(width) {
    char* memory = static_cast<char*>(hr::scratch(static_cast<size_t>(width) * 5 + 64, 1));
    numbers = reinterpret_cast<float*>(memory);
    bytes = reinterpret_cast<int8_t*>(memory + width * 4);
  }
  void read(const hr_rows& rows, int64_t row, int64_t columns) const {
    load_row(rows, row, 0, columns, numbers);
    for (int64_t i = columns; i < width; ++i) numbers[i] = 0.0f;
  }
};

// body(row) for rows of `columns` numbers, in pieces worth a thread.
template <class Body>
static void each_row(int64_t rows, int64_t columns, const Body& body) {
  hr::parallel(rows, 1 + (1 << 13) / (columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

// ---- results ------------------------------------------------------------------------------------

// One panel's part of y: y = value + bias + residual, rounded to the dtype of y.
struct Result {
  const hr_rows& y;
  const hr_rows& residual;
  int64_t column, columns;  // `columns` of the panel's exist
  alignas(64) float bias[HR_PANEL];

  Result(const hr_linear_args& args, int64_t panel)
      : y(args.y),
        residual(args.residual),
        column(panel * HR_PANEL),
        columns(least(args.weight.out - column, HR_PANEL)) {
    for (int64_t j = 0; j < HR_PANEL; ++j) bias[j] = 0.0f;
    const hr_rows row = {const_cast<void*>(args.bias), 0, columns, args.bias_dtype};
    if (args.bias) load_row(row, 0, column, columns, bias);
  }

  // Some rows will be written.
  void expect(int64_t first, int64_t rows) const {
    expect_rows(y, first, rows, column, columns);
  }

  // `values` [rows][HR_PANEL] of rows from `first` on.
  void write(int64_t first, int64_t rows, const float* values) const {
    with_type(y.dtype, [&](auto type) { write_as<decltype(type)>(first, rows, values); });
  }

 private:
  template <class T>
  void write_as(int64_t first, int64_t rows, const float* values) const {
    for (int64_t r = 0; r < rows; ++r, values += HR_PANEL) {
      T* to = row_of<T>(y, first + r) + column;
      const T* more = residual.data ? row_of<T>(residual, first + r) + column : nullptr;
      for (int64_t j = 0; j < columns; j += kLanes) {
        const int64_t count = least(columns - j, kLanes);
        vf value = load(values + j) + load(bias + j);
        if (more) value = value + take(more + j, count);
        put(to + j, value, count);
      }
    }
  }
};

// value(row, input) for every input of row step.ids[i] - first, into row i of y.
template <class Value>
static void unpack_rows(const hr_unpack_args& args, const hr_step& step, const Value& value) {
  hr::parallel(step.tokens, 4, [&](int64_t begin, int64_t end) {
    const RowBuffer buffer(args.weight.in);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = step.ids[i] - args.first;
      const bool here = row >= 0 && row < args.weight.out;
      for (int64_t k = 0; k < args.weight.in; ++k) buffer.numbers[k] = here ? value(row, k) : 0.0f;
      store_row(args.y, i, 0, args.weight.in, buffer.numbers);
    }
  });
}

}  // namespace
}  // namespace HR_NS
