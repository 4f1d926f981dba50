// The products of attention for many rows, as register tiles over panels.
//
// A panel is fp32 and serves all query rows of a tile: keys transposed (element of the head x
// kBlock positions) or values (position x kPanelColumns elements of the head), in the orders of
// attention_direct.h, which gives the same bits. A register tile of 6 rows and 4 vectors is 24 fma
// for 10 loads; the lanes of a score cost 15 additions for as many fma as the head has elements.
// Part of the kernel files: the same rules as simd.h.
#pragma once
#include "attention_direct.h"

namespace HR_NS {

constexpr int kPanelColumns = 64;
constexpr int kColumns = HR_LEVEL >= 2 ? 4 : 2;  // vectors of a register tile

// ---- panels -------------------------------------------------------------------------------------

// kLanes vectors as rows of a square become its columns: log2(kLanes) perfect shuffles.
HR_INLINE void transpose(vf* rows) {
  vi low, high;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + (i & 1) * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    vf mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// panel[lane * vectors + v][j] = element of the key of position j that `widened` puts into `lane` of
// vector v, for the vectors of positions [first, last]; see vectors_of.
template <class T>
static void transpose_keys(const Place& place, int64_t first, int64_t last, int64_t dim,
                           float* panel, Ahead& ahead) {
  constexpr int kPack = Pack<T>::count, kMade = Wide<T>::count, kTake = kLanes * kPack;
  const int64_t vectors = vectors_of<T>(dim);
  for (int64_t at = first / kLanes * kLanes; at <= last; at += kLanes) {
    for (int64_t e = 0; e < dim; e += kTake) {
      vf unit[kLanes];
      if (e + kTake <= dim) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) unit[i] = units(place.at<T>(at + i) + e);
      } else {
        for (int i = 0; i < kLanes; ++i) unit[i] = units_part(place.at<T>(at + i) + e, dim - e);
      }
      ahead.lines(lines_of(kLanes * kTake * static_cast<int64_t>(sizeof(T))));
      transpose(unit);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vf out[kPack];
        unpack(static_cast<const T*>(nullptr), unit[i], out);
#pragma GCC unroll 4
        for (int p = 0; p < kPack; ++p) {
          const int d = i * kPack + p, lane = d / kMade % kLanes;
          const int64_t v = e / kLanes + d / (kMade * kLanes) * kMade + d % kMade;
          if (v < vectors) store(panel + (lane * vectors + v) * kBlock + at, out[p]);
        }
      }
    }
  }
}

// panel[j][c] = value of position j, element c0 + c in the order of `widened`, for `count` elements
// and positions [first, last].
template <class T>
static void widen_values(const Place& place, int64_t first, int64_t last, int64_t c0,
                         int64_t count, float* panel, Ahead& ahead) {
  constexpr int kMade = Wide<T>::count, kTake = kLanes * kMade;
  for (int64_t j = first; j <= last; ++j) {
    const T* from = place.at<T>(j) + c0;
    float* to = panel + j * kPanelColumns;
    ahead.lines(lines_of(count * static_cast<int64_t>(sizeof(T))));
    for (int64_t c = 0; c < count; c += kTake) {
      vf wide[kMade];
      if (c + kTake <= count) {
        widened(from + c, wide);
      } else {
        widened_part(from + c, count - c, wide);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kMade; ++p) store(to + c + p * kLanes, wide[p]);
    }
  }
}

// ---- register tiles -----------------------------------------------------------------------------

// Terms of c[i][n] (+)= sum over k of a[i][k] * b[k][n]; i counts rows, n vectors.
struct Product {
  const float* a;
  int64_t a_stride;  // from i to i + 1
  int64_t a_step;    // from k to k + 1
  const float* b;  // stride kBlock = kPanelColumns
  int64_t depth;
  float* c;
  int64_t c_stride;
  bool fresh;     // c is not read
  int64_t lanes;  // 0: one chain, from c on; else so many sums of `depth`, from neighboring a on,
                  // which are added as neighbors
};

static_assert(kPanelColumns == kBlock, "both kinds of panel have one stride");

template <int R, int N>
HR_INLINE void chain(const Product& p, const float* a, const float* b, vf (&sums)[R][N]) {
  const int64_t stride = p.a_stride, step = p.a_step, depth = p.depth;
  for (int64_t k = 0; k < depth; ++k, b += kBlock, a += step) {
    vf right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b + n * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const vf left = set(a[i * stride]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] = fma(left, right[n], sums[i][n]);
    }
  }
}

template <int R, int N>
HR_INLINE void add(const float* c, int64_t stride, vf (&sums)[R][N]) {
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[i][n] = load(c + i * stride + n * kLanes) + sums[i][n];
  }
}

template <int R, int N>
HR_INLINE void put_tile(float* c, int64_t stride, const vf (&sums)[R][N]) {
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * stride + n * kLanes, sums[i][n]);
  }
}

template <int R, int N>
HR_INLINE void clear(vf (&sums)[R][N]) {
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[i][n] = zero();
  }
}

// Sums of p.lanes lanes (a power of 2, at most kLanes / 2): two of a kind are added when both are
// there, so that few wait.
template <int R, int N>
static void outer_lanes(const Product& p, int64_t n0) {
  constexpr int64_t kStride = N * kLanes, kTile = R * kStride;
  alignas(64) float waiting[4 * kTile];
  vf sums[R][N];
  for (int64_t lane = 0;; ++lane) {
    clear(sums);
    chain(p, p.a + lane, p.b + lane * p.depth * kBlock + n0 * kLanes, sums);
    float* next = waiting;
    for (int64_t bits = lane; bits & 1; bits >>= 1, next += kTile) add(next, kStride, sums);
    if (lane + 1 == p.lanes) break;
    put_tile(next, kStride, sums);
  }
  float* c = p.c + n0 * kLanes;
  if (!p.fresh) add(c, p.c_stride, sums);
  put_tile(c, p.c_stride, sums);
}

template <int R, int N>
static void outer(const Product& p, int64_t n0) {
  if (p.lanes > 0) return outer_lanes<R, N>(p, n0);
  vf sums[R][N];
  float* c = p.c + n0 * kLanes;
  clear(sums);
  if (!p.fresh) add(c, p.c_stride, sums);
  chain(p, p.a, p.b + n0 * kLanes, sums);
  put_tile(c, p.c_stride, sums);
}

template <int N, int R = kRegisterRows>
static void outer_rows(const Product& p, int64_t rows, int64_t n0) {
  if constexpr (R > 1) {
    if (rows < R) return outer_rows<N, R - 1>(p, rows, n0);
  }
  outer<R, N>(p, n0);
}

// Up to kRegisterRows rows and kBlock columns in whole vectors.
static void multiply(const Product& p, int64_t rows, int64_t vectors) {
  int64_t n = 0;
  for (; n + kColumns <= vectors; n += kColumns) outer_rows<kColumns>(p, rows, n);
  if (kColumns > 3 && vectors - n == 3) outer_rows<3>(p, rows, n);
  if (kColumns > 2 && vectors - n == 2) outer_rows<2>(p, rows, n);
  if (vectors - n == 1) outer_rows<1>(p, rows, n);
}

}  // namespace HR_NS
