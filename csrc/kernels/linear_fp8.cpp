// linear_fp8: fp8 e4m3 weights with scales per tensor, output or block, and weights of 4 bits that are
// places in a table; x stays float, sums in fp32.
//
// A weight is widened to fp32 and multiplied with its scale, then with x. Where one tile of rows
// reads it that happens in registers; where several do, pieces of a panel, kPiece inputs long, are
// widened once into first-level cache. One accumulator per output element runs over k from 0 to the
// end; between pieces it is parked in memory as fp32, which changes nothing. Places in a table are
// always widened first, one group of inputs at a time.
#include "lowbit.h"

namespace HR_NS {

// The register tile: kRows rows of x by kVectors vectors of outputs.
constexpr int kVectors = 2;
constexpr int kRows = HR_LEVEL >= 2 ? 12 : HR_LEVEL == 1 ? 6 : 4;
constexpr int kTile = kVectors * kLanes;
constexpr int64_t kPiece = 128;  // inputs; the side of the blocks that share a scale

// An e4m3 number moved to where f16 has its parts is its value / 256; scales make up for that.
HR_INLINE float part_of(uint8_t bits) {
  return widen(f16{static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7)});
}

// kTile weights of one input as fp32, times their scales.
HR_INLINE void read(const uint8_t* w, const float* scale, vf* out) {
#if HR_LEVEL >= 2
  const __m512i word = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w));
  const __m512i half = _mm512_and_si512(_mm512_slli_epi16(word, 7), _mm512_set1_epi16(-0x4001));
  out[0] = (vf)_mm512_cvtph_ps(_mm512_castsi512_si256(half)) * load(scale);
  out[1] = (vf)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * load(scale + kLanes);
#elif HR_LEVEL == 1
  const __m256i word = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(word, 7), _mm256_set1_epi16(-0x4001));
  out[0] = (vf)_mm256_cvtph_ps(_mm256_castsi256_si128(half)) * load(scale);
  out[1] = (vf)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)) * load(scale + kLanes);
#else
  float values[kTile];
  for (int j = 0; j < kTile; ++j) values[j] = part_of(w[j]) * scale[j];
  for (int v = 0; v < kVectors; ++v) out[v] = load(values + v * kLanes);
#endif
}
HR_INLINE void read(const float* w, const float*, vf* out) {
  for (int v = 0; v < kVectors; ++v) out[v] = load(w + v * kLanes);
}

// w [count][HR_PANEL] to fp32, times the panel's scales.
static void widen_piece(const uint8_t* w, int64_t count, const float* scale, float* out) {
  for (int64_t k = 0; k < count; ++k, w += HR_PANEL, out += HR_PANEL) {
    if (k % 2 == 0) prefetch(w + kAhead);
    for (int j = 0; j < HR_PANEL; j += kTile) {
      vf part[kVectors];
      read(w + j, scale + j, part);
      for (int v = 0; v < kVectors; ++v) store(out + j + v * kLanes, part[v]);
    }
  }
}

constexpr int64_t kTableBytes = 64;

// kLanes numbers of a table [16] at the places in the low or high halves of bytes.
HR_INLINE vf looked_up(const float* table, const uint8_t* bytes, int shift) {
#if HR_LEVEL >= 2
  const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
  return (vf)_mm512_permutexvar_ps(_mm512_srl_epi32(places, _mm_cvtsi32_si128(shift)),
                                   _mm512_loadu_ps(table));
#elif HR_LEVEL == 1
  const __m256i words = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
  const __m256i places = _mm256_srl_epi32(words, _mm_cvtsi32_si128(shift));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), places);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), places);
  return (vf)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = table[bytes[i] >> shift & 15];
  return load(values);
#endif
}

// Places [count][HR_PANEL / 2] to fp32, times the panel's scales.
static void widen_places(const float* table, const uint8_t* w, int64_t count, const float* scale,
                         float* out) {
  constexpr int half = HR_PANEL / 2;
  for (int64_t k = 0; k < count; ++k, w += half, out += HR_PANEL) {
    if (k % 4 == 0) prefetch(w + kAhead);
    for (int j = 0; j < HR_PANEL; j += kLanes) {
      store(out + j, looked_up(table, w + j % half, j / half * 4) * load(scale + j));
    }
  }
}

// c [R, HR_PANEL] gets `count` inputs more; w [count][HR_PANEL] as e4m3, or widened; x [count][R].
template <class Word, int R>
static void tile(const Word* w, const float* scale, const float* x, int64_t count, float* c,
                 bool first) {
  for (int j = 0; j < HR_PANEL; j += kTile) {
    vf sum[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = first ? zero() : load(c + r * HR_PANEL + j + v * kLanes);
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      vf part[kVectors];
      prefetch(w + k * HR_PANEL + kAhead);
      read(w + k * HR_PANEL + j, scale + j, part);
      for (int r = 0; r < R; ++r) {
        const vf b = set(x[k * R + r]);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(b, part[v], sum[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) store(c + r * HR_PANEL + j + v * kLanes, sum[r][v]);
    }
  }
}

template <class Word>
using TileOf = void (*)(const Word*, const float*, const float*, int64_t, float*, bool);
template <class W>
static constexpr TileOf<W> kTiles[] = {
    nullptr,    tile<W, 1>, tile<W, 2>, tile<W, 3>,  tile<W, 4>,
#if HR_LEVEL >= 1
    tile<W, 5>, tile<W, 6>,
#endif
#if HR_LEVEL >= 2
    tile<W, 7>, tile<W, 8>, tile<W, 9>, tile<W, 10>, tile<W, 11>, tile<W, 12>,
#endif
};

// Rows of x as fp32 [in][rows of the tile], tile after tile.
static const float* lay_out(const hr_rows& x, int64_t first, const RowTiles& tiles) {
  const size_t bytes = static_cast<size_t>(tiles.rows * x.columns) * 4;
  float* values = static_cast<float*>(hr::scratch(bytes, 0));
  each_row(tiles.rows, x.columns, [&](int64_t row) {
    const RowBuffer buffer(x.columns);
    buffer.read(x, first + row, x.columns);
    const int64_t tile = tiles.holding(row), begin = tiles.begin(tile), size = tiles.size(tile);
    float* to = values + begin * x.columns + row - begin;
    for (int64_t k = 0; k < x.columns; ++k) to[k * size] = buffer.numbers[k];
  });
  return values;
}

static void linear_fp8(const hr_linear_args& args, const hr_step& step) {
  const hr_weight& w = args.weight;
  const int64_t columns = round_up(w.out, HR_PANEL);  // of scales
  each_part(args, step, [&](int64_t first, int64_t rows) {
    const RowTiles tiles(rows, kRows);
    const float* x = lay_out(args.x, first, tiles);
    const auto block = [&](int64_t p, int64_t begin, int64_t end) {
      const int64_t row = tiles.begin(begin), count = tiles.begin(end) - row;
      const int64_t bytes = (kPiece + count) * HR_PANEL * 4;
      float* piece = static_cast<float*>(hr::scratch(static_cast<size_t>(bytes), 1));
      float* sums = piece + kPiece * HR_PANEL;  // [count][HR_PANEL]
      const bool places = w.dtype == HR_T4;
      const int64_t length = places ? w.group : kPiece, width = places ? HR_PANEL / 2 : HR_PANEL;
      const uint8_t* data = static_cast<const uint8_t*>(w.data);
      const uint8_t* panel = data + (places ? kTableBytes : 0) + p * w.in * width;
      for (int64_t k = 0; k < w.in; k += length) {
        const int64_t size = least(length, w.in - k);
        const uint8_t* words = panel + k * width;
        alignas(64) float scales[HR_PANEL];
        const float* from = w.scales + p * HR_PANEL + (w.group ? k / w.group * columns : 0);
        for (int j = 0; j < HR_PANEL; ++j) scales[j] = from[j] * (places ? 1.0f : 256.0f);
        if (places) {
          widen_places(reinterpret_cast<const float*>(data), words, size, scales, piece);
        } else if (end - begin > 1) {
          widen_piece(words, size, scales, piece);
        }
        for (int64_t t = begin; t < end; ++t) {
          const int64_t at = tiles.begin(t), of = tiles.size(t);
          const float* input = x + at * w.in + k * of;
          float* c = sums + (at - row) * HR_PANEL;
          if (places || end - begin > 1) {
            kTiles<float>[of](piece, scales, input, size, c, k == 0);
          } else {
            kTiles<uint8_t>[of](words, scales, input, size, c, k == 0);
          }
        }
      }
      Result(args, p).write(first + row, count, sums);
    };
    each_block(panels_of(w), tiles, kRows * w.in * 4, w.in * rows * HR_PANEL, block);
  });
}

static void pack_places(const hr_pack_lowbit_args& args) {
  const hr_weight& w = args.weight;
  constexpr int64_t half = HR_PANEL / 2;
  memcpy(w.data, args.offsets, kTableBytes);
  uint8_t* panels = static_cast<uint8_t*>(w.data) + kTableBytes;
  memset(panels, 0, static_cast<size_t>(panels_of(w) * w.in * half));
  hr::parallel(panels_of(w), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * HR_PANEL; row < least(end * HR_PANEL, w.out); ++row) {
      const int64_t j = row % HR_PANEL;
      const uint8_t* values = row_of<uint8_t>(args.source, row);
      uint8_t* to = panels + row / HR_PANEL * w.in * half + j % half;
      for (int64_t k = 0; k < w.in; ++k) {
        to[k * half] = static_cast<uint8_t>(to[k * half] | values[k] << j / half * 4);
      }
    }
  });
}

static void pack_fp8(const hr_pack_lowbit_args& args, const hr_step&) {
  const hr_weight w = args.weight;
  if (w.dtype == HR_T4) return pack_places(args);
  hr::parallel(panels_of(w), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = static_cast<uint8_t*>(w.data) + p * w.in * HR_PANEL;
      memset(panel, 0, static_cast<size_t>(w.in * HR_PANEL));
      for (int64_t j = 0; j < HR_PANEL && p * HR_PANEL + j < w.out; ++j) {
        const uint8_t* values = row_of<uint8_t>(args.source, p * HR_PANEL + j);
        for (int64_t k = 0; k < w.in; ++k) panel[k * HR_PANEL + j] = values[k];
      }
    }
  });
}

static void unpack_fp8(const hr_unpack_args& args, const hr_step& step) {
  const hr_weight w = args.weight;
  const int64_t columns = round_up(w.out, HR_PANEL);
  unpack_rows(args, step, [&](int64_t row, int64_t k) {
    const float scale = w.scales[row + (w.group ? k / w.group * columns : 0)];
    const int64_t line = row / HR_PANEL * w.in + k, j = row % HR_PANEL;
    if (w.dtype == HR_T4) {
      const uint8_t* bytes = static_cast<const uint8_t*>(w.data) + kTableBytes;
      const uint8_t byte = bytes[line * (HR_PANEL / 2) + j % (HR_PANEL / 2)];
      return static_cast<const float*>(w.data)[byte >> j / (HR_PANEL / 2) * 4 & 15] * scale;
    }
    const int64_t at = line * HR_PANEL + j;
    return part_of(static_cast<const uint8_t*>(w.data)[at]) * (256.0f * scale);
  });
}

HR_OPERATOR(linear_fp8, hr_linear_args)
HR_OPERATOR(pack_fp8, hr_pack_lowbit_args)
HR_OPERATOR(unpack_fp8, hr_unpack_args)

}  // namespace HR_NS
