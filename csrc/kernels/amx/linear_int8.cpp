// linear_int8 in AMX tiles. Weights, scales and the order of the last operations are those of
// ../linear_int8.cpp, and sums of integers are exact: y has the bits of the level below.
#include "../linear.h"
#include "../lowbit.h"
#include "tile.h"

namespace HR_NS {

constexpr int64_t kQuadsAtOnce = 256;  // of k: 32 kB of a panel, which stay in first-level cache

namespace {  // the linker must not share its functions between levels

// x in bytes, row by row.
struct Quantized {
  int64_t quads, stride;
  float* scales;         // [rows]
  int32_t* corrections;  // [rows] 128 * (sum of the row)
  char* values;          // [rows][stride], zeros past the last input

  Quantized(const hr_rows& x, int64_t first, int64_t rows) : quads((x.columns + 3) / 4) {
    const int64_t width = round_up(x.columns, 64), side = round_up(rows * 4, 64);
    stride = width + 64;  // rows must not share the sets of a cache
    char* memory =
        static_cast<char*>(hr::scratch(static_cast<size_t>(2 * side + rows * stride), 0));
    scales = reinterpret_cast<float*>(memory);
    corrections = reinterpret_cast<int32_t*>(memory + side);
    values = memory + 2 * side;
    each_row(rows, x.columns, [&](int64_t row) {
      const RowBuffer buffer(width);
      buffer.read(x, first + row, x.columns);
      int32_t sum;
      scales[row] = quantize(buffer.numbers, width, buffer.bytes, &sum);
      corrections[row] = 128 * sum;
      memcpy(values + row * stride, buffer.bytes, static_cast<size_t>(width));
    });
  }
};

// sums [rows][HR_PANEL] of `rows` rows from `row` on.
void multiply_panel(const Quantized& x, int64_t row, int64_t rows, const char* panel,
                    int32_t* sums) {
  const Tiling tiling(rows, kStripRows);
  const int64_t deep = tiling.tiles == 1 ? x.quads : kQuadsAtOnce;
  int64_t configured = 0;
  for (int64_t k = 0; k < x.quads; k += deep) {
    const int64_t count = least(deep, x.quads - k);
    for (int64_t t = 0; t < tiling.tiles; ++t) {
      const int64_t begin = tiling.begin(t), size = tiling.size(t);
      if (size != configured) configure(configured = size);
      const char* w = panel + k * kDeepBytes;
      // One strip streams its panel; the first of several fetches what all of them read next.
      const char* ahead = w + (tiling.tiles == 1 ? 2 * kAhead : count * kDeepBytes);
      const Strip strip{x.values + (row + begin) * x.stride + k * 4, x.stride, w, count,
                        sums + begin * HR_PANEL, k == 0, ahead,
                        t == 0 ? kWords * kDeepBytes : 0};
      size > kTileRows ? multiply_strip<DotInt8, true>(strip)
                       : multiply_strip<DotInt8, false>(strip);
    }
  }
  configure(0);
}

}  // namespace

static void linear_int8(const hr_linear_args& args, const hr_step& step) {
  const hr_weight& w = args.weight;
  each_part(args, step, [&](int64_t first, int64_t rows) {
    const Quantized x(args.x, first, rows);
    const RowTiles tiles(rows, kStripRows);
    const auto block = [&](int64_t p, int64_t first_tile, int64_t last_tile) {
      const int64_t row = tiles.begin(first_tile), count = tiles.begin(last_tile) - row;
      int32_t* sums =
          static_cast<int32_t*>(hr::scratch(static_cast<size_t>(count * HR_PANEL) * 4, 1));
      const char* panel = static_cast<const char*>(w.data) + p * x.quads * kDeepBytes;
      multiply_panel(x, row, count, panel, sums);
      const Result result(args, p);
      for (int64_t r = row; r < row + count; ++r, sums += HR_PANEL) {
        const vi correction = set_int(x.corrections[r]);
        const vf scale = set(x.scales[r]);
        alignas(64) float values[HR_PANEL];
        for (int j = 0; j < HR_PANEL; j += kLanes) {
          vi sum;
          memcpy(&sum, sums + j, sizeof sum);
          const vf value = __builtin_convertvector(sum - correction, vf);
          store(values + j, value * scale * load(w.scales + p * HR_PANEL + j));
        }
        result.write(first + r, 1, values);
      }
    };
    each_block(panels_of(w), tiles, kStripRows * x.stride, w.in * rows * HR_PANEL, block);
  });
}

HR_OPERATOR(linear_int8, hr_linear_args)

}  // namespace HR_NS
