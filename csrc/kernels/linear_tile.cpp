// Register tiles: up to kMostTileRows rows of x by kVectors vectors of a panel's outputs.
//
// Sums are fp32. bf16 weights are widened in registers: the low half of a 32-bit word is input 2k, the
// high half 2k + 1. The first of many tiles leaves them in memory for the others: the same values,
// so the same sums. Rows are a constant distance apart, so that one pointer serves them all.
#include "dot_bf16.h"
#include "linear.h"

namespace HR_NS {

constexpr int kVectors = 2;
constexpr int kTile = kVectors * kLanes;

HR_INLINE vu load_words(const uint32_t* p) {
  vu words;
  memcpy(&words, p, sizeof words);
  return words;
}

// sum += a * b. Not fma(): gcc 12 computes into other registers and copies them back.
HR_INLINE void add_product(vf& sum, vf a, vf b) {
#if HR_LEVEL >= 1
  __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum = fma(a, b, sum);
#endif
}

// The same with one number for all lanes, which stays in memory.
HR_INLINE void add_product(vf& sum, vf a, const float* b) {
#if HR_LEVEL >= 2
  __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(*b));
#else
  add_product(sum, a, set(*b));
#endif
}

// Every other row's number is read twice instead of being kept in a register: the loads that are
// free for it save instructions, of which a core starts four at once, and two if it is shared with
// another hyperthread. With more of them, loads are what is waited for.
static constexpr bool in_memory(int row) { return HR_LEVEL >= 2 && row % 2 == 1 && row > 1; }

template <int R>
HR_INLINE void add_products(vf (&sum)[R][kVectors], const float* x, const vf (&w)[kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    if (in_memory(r)) {
      for (int v = 0; v < kVectors; ++v) add_product(sum[r][v], w[v], x + r * kStride<float>);
    } else {
      const vf b = set(x[r * kStride<float>]);
      for (int v = 0; v < kVectors; ++v) add_product(sum[r][v], w[v], b);
    }
  }
}

// One pair of k, by the type of weights.
struct FromFloat {
  using Word = float;
  using X = float;
  static constexpr int64_t kWords = 2 * HR_PANEL, kInputs = 2;  // of a panel and of x, per pair

  template <int R>
  HR_INLINE void step(vf (&sum)[R][kVectors], const float* w, const float* x, float*) {
    for (int k = 0; k < 2; ++k) {
      vf wide[kVectors];
      for (int v = 0; v < kVectors; ++v) wide[v] = load(w + k * HR_PANEL + v * kLanes);
      add_products(sum, x + k, wide);
    }
  }
};

template <bool Keep>
struct FromBf16 {
  using Word = uint32_t;
  using X = float;
  static constexpr int64_t kWords = HR_PANEL, kInputs = 2;

  template <int R>
  HR_INLINE void step(vf (&sum)[R][kVectors], const uint32_t* w, const float* x, float* out) {
    vf wide[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      wide[v] = (vf)(load_words(w + v * kLanes) << 16);
      if (Keep) store(out + v * kLanes, wide[v]);
    }
    add_products(sum, x, wide);
    for (int v = 0; v < kVectors; ++v) {
      wide[v] = (vf)(load_words(w + v * kLanes) & 0xffff0000u);
      if (Keep) store(out + HR_PANEL + v * kLanes, wide[v]);
    }
    add_products(sum, x + 1, wide);
  }
};

#if HR_LEVEL == 3
struct DotBf16 {
  using Word = uint32_t;
  using X = uint32_t;
  static constexpr int64_t kWords = HR_PANEL, kInputs = 1;

  template <int R>
  HR_INLINE void step(vf (&sum)[R][kVectors], const uint32_t* w, const uint32_t* x, float*) {
    vu words[kVectors];
    for (int v = 0; v < kVectors; ++v) words[v] = load_words(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vu b = x[r * kStride<uint32_t>] - vu{};
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot_bf16(sum[r][v], words[v], b);
    }
  }
};
#endif

template <class From, int R>
static void tile(const TileArgs& args) {
  for (int column = 0; column < HR_PANEL; column += kTile) {
    auto* w = reinterpret_cast<const typename From::Word*>(args.w) + column;
    auto* x = static_cast<const typename From::X*>(args.x);
    float *c = args.c + column, *wide = args.wide + column;
    const char* ahead = args.ahead;
    const int64_t second = args.ahead_step >= 128 ? args.ahead_step / 2 : 0;
    vf sum[R][kVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = args.first ? zero() : load(c + r * HR_PANEL + v * kLanes);
      }
    }
    for (int64_t count = args.count; count > 0; --count) {
      prefetch(ahead);
      if (second) prefetch(ahead + second);
      From::template step<R>(sum, w, x, wide);
      w += From::kWords;
      x += From::kInputs;
      wide += 2 * HR_PANEL;
      ahead += args.ahead_step;
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) store(c + r * HR_PANEL + v * kLanes, sum[r][v]);
    }
  }
}

template <class From>
static constexpr Tile kTiles[] = {
    nullptr,       tile<From, 1>, tile<From, 2>, tile<From, 3>,  tile<From, 4>,
#if HR_LEVEL >= 1
    tile<From, 5>, tile<From, 6>,
#endif
#if HR_LEVEL >= 2
    tile<From, 7>, tile<From, 8>, tile<From, 9>, tile<From, 10>, tile<From, 11>, tile<From, 12>,
#endif
};

static void widen_f16(const char* w, int64_t count, float* wide) {
  const f16* from = reinterpret_cast<const f16*>(w);
  for (int64_t i = 0; i < count * 2 * HR_PANEL; i += kLanes) store(wide + i, load(from + i));
}

const Multiplier& multiplier(int32_t weight_dtype, int32_t x_dtype) {
  static const Multiplier floats{kTiles<FromFloat>, nullptr, nullptr, nullptr, 8 * HR_PANEL, false};
  static const Multiplier bf16s{kTiles<FromBf16<false>>, kTiles<FromBf16<true>>, kTiles<FromFloat>,
                                nullptr, 4 * HR_PANEL, false};
  static const Multiplier f16s{nullptr, nullptr, kTiles<FromFloat>, widen_f16, 4 * HR_PANEL, false};
#if HR_LEVEL >= 4
  if (weight_dtype == HR_BF16 && x_dtype == HR_BF16) return strips();
#elif HR_LEVEL == 3
  static const Multiplier dots{kTiles<DotBf16>, nullptr, nullptr, nullptr, 4 * HR_PANEL, true};
  if (weight_dtype == HR_BF16 && x_dtype == HR_BF16) return dots;
#else
  (void)x_dtype;
#endif
  return weight_dtype == HR_F32 ? floats : weight_dtype == HR_BF16 ? bf16s : f16s;
}

}  // namespace HR_NS
