// linear: y = x W^T + bias for fp32, bf16 and f16 weights in panels, with fp32 sums.
//
// One accumulator per output element runs over k from 0 to the end, whatever the number of rows:
// a row of y is the same number in every batch. Blocking over k parks accumulators in memory as
// fp32, which changes nothing. bf16 weights are read as bf16 and widened in registers: the low half
// of a 32-bit word is input 2k, the high half 2k + 1.
//
// x is first copied to fp32 rows whose distance is a constant: the inner loop then needs one pointer
// for all rows of a tile, and they do not fall into one set of the cache.
#include "linear.h"
#include "simd.h"

namespace HR_NS {

// The register tile: kRows rows of x by kVectors vectors of outputs.
constexpr int kVectors = 2;
constexpr int kRows = HR_LEVEL >= 2 ? 12 : HR_LEVEL == 1 ? 6 : 4;
constexpr int kTile = kVectors * kLanes;

constexpr int64_t kPairsAtOnce = 1024;      // of k: 128 kB of a bf16 panel
constexpr int64_t kStride = 2 * kPairsAtOnce + 16;  // from one row of x to the next
constexpr int64_t kBlockBytes = 384 << 10;  // of x, kept in the second-level cache
constexpr int64_t kMostRows = 576;          // copied at once
constexpr int64_t kPanelsAtOnce = 8;
constexpr int64_t kAhead = 1024;  // bytes that the stream of weights is fetched ahead

// What the inner loop fetches beside its own weights: `step` bytes further for every pair of k.
struct Ahead {
  const char* from;
  int64_t step;
};

HR_INLINE void widen_pair(const uint32_t* w, vf* even, vf* odd) {
  for (int v = 0; v < kVectors; ++v) {
    vu raw;
    memcpy(&raw, w + v * kLanes, sizeof raw);
    even[v] = (vf)(raw << 16);
    odd[v] = (vf)(raw & 0xffff0000u);
  }
}
HR_INLINE void widen_pair(const float* w, vf* even, vf* odd) {
  for (int v = 0; v < kVectors; ++v) {
    even[v] = load(w + v * kLanes);
    odd[v] = load(w + HR_PANEL + v * kLanes);
  }
}
HR_INLINE void widen_pair(const f16* w, vf* even, vf* odd) {
  for (int v = 0; v < kVectors; ++v) {
    even[v] = load(w + v * kLanes);
    odd[v] = load(w + HR_PANEL + v * kLanes);
  }
}

// Words of a panel that hold two inputs: a bf16 word is a pair.
template <class Word>
constexpr int64_t kPairWords = 2 * HR_PANEL;
template <>
constexpr int64_t kPairWords<uint32_t> = HR_PANEL;

// c [R, kTile], row stride HR_PANEL, gets `count` pairs more of k. x is [R, kStride].
template <class Word, int R>
static void tile(const Word* w, const float* x, int64_t count, float* c, bool first, Ahead ahead) {
  vf sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = first ? zero() : load(c + r * HR_PANEL + v * kLanes);
    }
  }
  for (; count > 0; --count, w += kPairWords<Word>, x += 2, ahead.from += ahead.step) {
    vf even[kVectors], odd[kVectors];
    widen_pair(w, even, odd);
    prefetch(reinterpret_cast<const char*>(w) + kAhead);
    prefetch(ahead.from);
    for (int r = 0; r < R; ++r) {
      const vf b = set(x[r * kStride]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(b, even[v], sum[r][v]);
    }
    for (int r = 0; r < R; ++r) {
      const vf b = set(x[r * kStride + 1]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(b, odd[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) store(c + r * HR_PANEL + v * kLanes, sum[r][v]);
  }
}

template <class Word>
using TileOf = void (*)(const Word*, const float*, int64_t, float*, bool, Ahead);

template <class Word>
static TileOf<Word> tile_of(int64_t rows) {
  static constexpr TileOf<Word> kTiles[] = {
      nullptr,       tile<Word, 1>, tile<Word, 2>, tile<Word, 3>, tile<Word, 4>,
#if HR_LEVEL >= 1
      tile<Word, 5>, tile<Word, 6>,
#endif
#if HR_LEVEL >= 2
      tile<Word, 7>, tile<Word, 8>, tile<Word, 9>, tile<Word, 10>, tile<Word, 11>, tile<Word, 12>,
#endif
  };
  return kTiles[rows];
}

// Rows cut into tiles whose sizes differ by at most one.
struct Tiling {
  int64_t rows, tiles;

  explicit Tiling(int64_t rows) : rows(rows), tiles((rows + kRows - 1) / kRows) {}
  int64_t begin(int64_t tile) const { return tile * rows / tiles; }
  int64_t size(int64_t tile) const { return begin(tile + 1) - begin(tile); }
};

// `count` rows of x from `row` on as [block of k][count][kStride], fp32; an odd last k is padded.
template <class X>
static void lay_out(const hr_rows& x, int64_t row, int64_t count, float* out) {
  const int64_t width = 2 * kPairsAtOnce;
  hr::parallel(count, 1 + (1 << 15) / (x.columns + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const X* source = static_cast<const X*>(x.data) + (row + r) * x.stride;
      for (int64_t k = 0; k < x.columns; k += width) {
        float* target = out + (k / width * count + r) * kStride;
        const int64_t left = x.columns - k, size = left < width ? left : width;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) store(target + i, load(source + k + i));
        for (; i < size; ++i) target[i] = widen(source[k + i]);
        if (size % 2) target[size] = 0.0f;
      }
    }
  });
}

// The bias of one panel, zero where there is none.
static void load_bias(const hr_linear_args& args, int64_t column, int64_t columns, float* out) {
  for (int64_t j = 0; j < HR_PANEL; ++j) {
    if (!args.bias || j >= columns) {
      out[j] = 0.0f;
    } else if (args.bias_dtype == HR_F32) {
      out[j] = static_cast<const float*>(args.bias)[column + j];
    } else if (args.bias_dtype == HR_BF16) {
      out[j] = widen(static_cast<const bf16*>(args.bias)[column + j]);
    } else {
      out[j] = widen(static_cast<const f16*>(args.bias)[column + j]);
    }
  }
}

template <class Y>
static void finish(const float* c, const float* bias, Y* y, int64_t columns) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    const vf value = load(c + j) + load(bias + j);
    if (columns - j >= kLanes) {
      store(y + j, value);
    } else {
      store_part(y + j, value, columns - j);
    }
  }
}

// The product of one block: rows of tiles [first_tile, last_tile), panels [first, last).
template <class Word>
struct Product {
  const hr_linear_args& args;
  const Tiling& tiling;
  const float* x;  // laid out
  int64_t row;     // of y where the tiling begins
  int64_t depth;   // pairs of k

  void block(int64_t first_tile, int64_t last_tile, int64_t first, int64_t last) const {
    const int64_t rows = tiling.begin(last_tile) - tiling.begin(first_tile);
    const int64_t bytes = rows * (last - first) * HR_PANEL * 4;
    float* sums = static_cast<float*>(hr::scratch(static_cast<size_t>(bytes), 1));
    for (int64_t k = 0; k < depth; k += kPairsAtOnce) {
      const int64_t count = depth - k < kPairsAtOnce ? depth - k : kPairsAtOnce;
      float* c = sums;
      for (int64_t p = first; p < last; ++p) {
        for (int64_t t = first_tile; t < last_tile; ++t) {
          one(p, t, t - first_tile, last_tile - first_tile, k, count, c);
          c += tiling.size(t) * HR_PANEL;
        }
      }
    }
    write(sums, first_tile, last_tile, first, last);
  }

  void one(int64_t p, int64_t t, int64_t index, int64_t tiles, int64_t k, int64_t count,
           float* c) const {
    const int64_t size = tiling.size(t);
    const Word* data = static_cast<const Word*>(args.weight.data);
    const Word* w = data + (p * depth + k) * kPairWords<Word>;
    const float* input = x + (k / kPairsAtOnce * tiling.rows + tiling.begin(t)) * kStride;
    constexpr int64_t kPairBytes = kPairWords<Word> * sizeof(Word);
    const char* next = reinterpret_cast<const char*>(w) + depth * kPairBytes;
    // One tile streams its own panel; the first ones of several fetch the next panel in turns.
    Ahead ahead{reinterpret_cast<const char*>(w) + kAhead + 64, kPairBytes};
    if (tiles > 1) ahead = {next + index * count * 64, 64};
    if (tiles > 1 && index * 64 >= kPairBytes) ahead = {reinterpret_cast<const char*>(input), 0};
    for (int v = 0; v < HR_PANEL; v += kTile) {
      tile_of<Word>(size)(w + v, input, count, c + v, k == 0, ahead);
    }
  }

  void write(const float* c, int64_t first_tile, int64_t last_tile, int64_t first,
             int64_t last) const {
    for (int64_t p = first; p < last; ++p) {
      const int64_t column = p * HR_PANEL, left = args.weight.out - column;
      const int64_t columns = left < HR_PANEL ? left : HR_PANEL;
      float bias[HR_PANEL];
      load_bias(args, column, columns, bias);
      for (int64_t r = tiling.begin(first_tile); r < tiling.begin(last_tile); ++r, c += HR_PANEL) {
        const int64_t at = (row + r) * args.y.stride + column;
        if (args.y.dtype == HR_F32) {
          finish(c, bias, static_cast<float*>(args.y.data) + at, columns);
        } else if (args.y.dtype == HR_BF16) {
          finish(c, bias, static_cast<bf16*>(args.y.data) + at, columns);
        } else {
          finish(c, bias, static_cast<f16*>(args.y.data) + at, columns);
        }
      }
    }
  }
};

// Rows [row, row + count) of y.
template <class Word>
static void multiply(const hr_linear_args& args, int64_t row, int64_t count) {
  const Tiling tiling(count);
  const int64_t depth = pairs(args.weight);
  const int64_t floats = (depth + kPairsAtOnce - 1) / kPairsAtOnce * count * kStride;
  float* x = static_cast<float*>(hr::scratch(static_cast<size_t>(floats) * 4, 0));
  if (args.x.dtype == HR_F32) {
    lay_out<float>(args.x, row, count, x);
  } else if (args.x.dtype == HR_BF16) {
    lay_out<bf16>(args.x, row, count, x);
  } else {
    lay_out<f16>(args.x, row, count, x);
  }
  const Product<Word> product{args, tiling, x, row, depth};
  const int64_t per_tile = kRows * 8 * (depth < kPairsAtOnce ? depth : kPairsAtOnce);
  const int64_t tiles = 1 + (kBlockBytes - 1) / per_tile;  // of a block
  const int64_t blocks = (tiling.tiles + tiles - 1) / tiles;
  const int64_t panel_count = panels(args.weight);
  // Several blocks share panels: then a piece is kPanelsAtOnce of them. Else as small as is useful.
  const int64_t work = depth * count;
  int64_t at_once = blocks > 1 ? kPanelsAtOnce : 1 + (1 << 14) / (work + 1);
  if (blocks == 1 && at_once > kPanelsAtOnce) at_once = kPanelsAtOnce;
  const int64_t groups = (panel_count + at_once - 1) / at_once;
  hr::parallel(groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_tile = i / groups * tiles, first = i % groups * at_once;
      const int64_t last_tile = first_tile + tiles, last = first + at_once;
      product.block(first_tile, last_tile < tiling.tiles ? last_tile : tiling.tiles, first,
                    last < panel_count ? last : panel_count);
    }
  });
}

static void linear(const hr_linear_args& args, const hr_step& step) {
  const int64_t rows = args.over == HR_PICKED ? step.picked : step.tokens;
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t row = part * rows / parts, count = (part + 1) * rows / parts - row;
    if (args.weight.dtype == HR_F32) {
      multiply<float>(args, row, count);
    } else if (args.weight.dtype == HR_BF16) {
      multiply<uint32_t>(args, row, count);
    } else {
      multiply<f16>(args, row, count);
    }
  }
}

HR_OPERATOR(linear, hr_linear_args)

}  // namespace HR_NS
