// linear_int8: int8 weights with a scale per output, x quantized to int8 with a scale per row.
//
// y = (sum of w * q) * x_scale * w_scale + bias. The sum is an exact 32-bit integer, so neither the
// number of rows nor the order of instructions can change a bit of y. Weights are stored as w + 128,
// because the fastest instructions want one operand unsigned; 128 * (sum of q) is taken off at the
// end. No sum overflows up to 65536 inputs. Every row of a tile has its x beside the other rows', so
// that the inner loop reads two streams front to back.
#include "dot_int8.h"
#include "lowbit.h"

namespace HR_NS {

// The register tile: kRows rows of x by kVectors vectors of outputs.
constexpr int kVectors = 2;
constexpr int kRows = HR_LEVEL >= 2 ? 12 : 4;
constexpr int kTile = kVectors * kLanes;
constexpr int64_t kQuad = 4 * HR_PANEL;  // bytes of a panel for four inputs

// sum [R][kVectors] of `quads` quads; x is [quads][R] quads of kInt8Quad bytes.
template <int R>
HR_INLINE void multiply_tile(const char* w, const char* x, int64_t quads, Ahead ahead,
                             vi (&sum)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vi{};
  }
  for (; quads > 0; --quads, w += kQuad, x += R * kInt8Quad, ahead.from += ahead.step) {
    vu raw[kVectors];
    for (int v = 0; v < kVectors; ++v) raw[v] = load_words(w + v * 4 * kLanes);
    prefetch(w + kAhead);
    prefetch(ahead.from);
#if HR_LEVEL >= 3
    for (int r = 0; r < R; ++r) {
      const vi s = repeat(x + r * kInt8Quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot4(sum[r][v], raw[v], s);
    }
#else
    vs part[kVectors];
    for (int v = 0; v < kVectors; ++v) part[v] = even_bytes(raw[v]);
    for (int r = 0; r < R; ++r) {
      const vs s = (vs)repeat(x + r * kInt8Quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += pair_dot(part[v], s);
    }
    for (int v = 0; v < kVectors; ++v) part[v] = odd_bytes(raw[v]);
    for (int r = 0; r < R; ++r) {
      const vs s = (vs)repeat(x + r * kInt8Quad + 4);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += pair_dot(part[v], s);
    }
#endif
  }
}

// x as the kernel wants it: a scale and a correction per row, values by tile.
namespace {  // the linker must not share its functions between levels
struct Input {
  RowTiles tiles;
  int64_t quads;
  float* scales;         // [rows]
  int32_t* corrections;  // [rows] 128 * (sum of the row)
  char* values;          // [quads][rows of the tile] quads, tile after tile

  Input(const hr_rows& x, int64_t first, int64_t rows)
      : tiles(rows, kRows), quads((x.columns + 3) / 4) {
    const int64_t side = round_up(rows * 4, 64), row_bytes = quads * kInt8Quad;
    const int64_t bytes = 2 * side + rows * row_bytes;
    char* memory = static_cast<char*>(hr::scratch(static_cast<size_t>(bytes), 0));
    scales = reinterpret_cast<float*>(memory);
    corrections = reinterpret_cast<int32_t*>(memory + side);
    values = memory + 2 * side;
    each_row(rows, x.columns, [&](int64_t row) {
      const RowBuffer buffer(round_up(x.columns, 16));
      buffer.read(x, first + row, x.columns);
      int32_t sum;
      scales[row] = quantize(buffer.numbers, buffer.width, buffer.bytes, &sum);
      corrections[row] = 128 * sum;
      const int64_t tile = tiles.holding(row), size = tiles.size(tile);
      char* to = values + tiles.begin(tile) * row_bytes + (row - tiles.begin(tile)) * kInt8Quad;
      place_quads(buffer.bytes, quads, kInt8Quad, to, size * kInt8Quad);
    });
  }
  const char* tile(int64_t t) const { return values + tiles.begin(t) * quads * kInt8Quad; }
};
}  // namespace

// The rows of one tile in one panel, but for bias and residual: out [R][HR_PANEL].
template <int R>
static void tile(const Input& input, int64_t first, const char* panel, const float* scales,
                 Ahead ahead, float* out) {
  const char* x = input.values + first * input.quads * kInt8Quad;
  for (int j = 0; j < HR_PANEL; j += kTile) {
    vi sum[R][kVectors];
    multiply_tile<R>(panel + 4 * j, x, input.quads, ahead, sum);
    for (int r = 0; r < R; ++r) {
      const vi correction = set_int(input.corrections[first + r]);
      const vf scale = set(input.scales[first + r]);
      for (int v = 0; v < kVectors; ++v) {
        const vf value = __builtin_convertvector(sum[r][v] - correction, vf);
        const int at = j + v * kLanes;
        store(out + r * HR_PANEL + at, value * scale * load(scales + at));
      }
    }
  }
}

using TileOf = void (*)(const Input&, int64_t, const char*, const float*, Ahead, float*);
static constexpr TileOf kTiles[] = {
    nullptr, tile<1>, tile<2>, tile<3>,  tile<4>,
#if HR_LEVEL >= 2
    tile<5>, tile<6>, tile<7>, tile<8>,  tile<9>,  tile<10>, tile<11>, tile<12>,
#endif
};

static void linear_int8(const hr_linear_args& args, const hr_step& step) {
  const hr_weight& w = args.weight;
  each_part(args, step, [&](int64_t first, int64_t rows) {
    const Input input(args.x, first, rows);
    const int64_t panel_bytes = input.quads * kQuad, tile_bytes = kRows * input.quads * kInt8Quad;
    const auto block = [&](int64_t p, int64_t begin, int64_t end) {
      const char* panel = static_cast<const char*>(w.data) + p * panel_bytes;
      const Result result(args, p);
      for (int64_t t = begin; t < end; ++t) {
        const Ahead ahead = ahead_of(panel, panel_bytes, t - begin, end - begin, input.values);
        const int64_t row = input.tiles.begin(t);
        const int64_t size = input.tiles.size(t);
        alignas(64) float out[kRows * HR_PANEL];
        result.expect(first + row, size);
        kTiles[size](input, row, panel, w.scales + p * HR_PANEL, ahead, out);
        result.write(first + row, size, out);
      }
    };
    each_block(panels_of(w), input.tiles, tile_bytes, w.in * rows * HR_PANEL, block);
  });
}

// Byte of a panel with input k of its output j.
HR_INLINE int64_t place(int64_t k, int64_t j) { return (k / 4 * HR_PANEL + j) * 4 + k % 4; }

static void pack_int8(const hr_pack_lowbit_args& args, const hr_step&) {
  const hr_weight w = args.weight;
  const int64_t panel_bytes = round_up(w.in, 4) * HR_PANEL;
  hr::parallel(panels_of(w), 1, [&](int64_t begin, int64_t end) {
    const RowBuffer buffer(round_up(w.in, 16));
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(w.data) + p * panel_bytes;
      memset(panel, 128, static_cast<size_t>(panel_bytes));
      for (int64_t j = 0; j < HR_PANEL && p * HR_PANEL + j < w.out; ++j) {
        const int64_t row = p * HR_PANEL + j;
        const int8_t* values = buffer.bytes;
        if (args.source.dtype == HR_I8) {
          values = row_of<int8_t>(args.source, row);
        } else {
          int32_t sum;
          buffer.read(args.source, row, w.in);
          args.scales[row] = quantize(buffer.numbers, buffer.width, buffer.bytes, &sum);
        }
        for (int64_t k = 0; k < w.in; ++k) panel[place(k, j)] = static_cast<uint8_t>(values[k] + 128);
      }
    }
  });
}

static void unpack_int8(const hr_unpack_args& args, const hr_step& step) {
  const hr_weight w = args.weight;
  unpack_rows(args, step, [&](int64_t row, int64_t k) {
    const int64_t panel = row / HR_PANEL * round_up(w.in, 4) * HR_PANEL;
    const int value = static_cast<const uint8_t*>(w.data)[panel + place(k, row % HR_PANEL)];
    return static_cast<float>(value - 128) * w.scales[row];
  });
}

HR_OPERATOR(linear_int8, hr_linear_args)
HR_OPERATOR(pack_int8, hr_pack_lowbit_args)
HR_OPERATOR(unpack_int8, hr_unpack_args)

}  // namespace HR_NS
