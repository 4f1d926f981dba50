// The products of attention for few rows, straight from the cache: each key and value is widened
// in registers once per kDotRows or kRegisterRows rows. Part of the kernel files: the same rules as
// simd.h.
//
// With two query heads on a KV head, 16 lanes: a vector of elements costs 2 fma and, in bf16, one
// instruction of widening (int8: 2, fp8: 3.5 with its stay in memory as f16), for keys and for
// values; adding up the lanes of scores is 45 more per 16 positions and row. So 512 keys and 512
// values of one head's elements take 107 cycles of two vector ports in bf16, 139 in int8 and 187 in
// fp8, and at 5 bytes a cycle from memory 410, 205 and 205: bf16 waits for memory, narrow formats
// for both.
//
// Invariant (scores): lane i sums the elements that `widened` puts there, in one chain of fma in the
// order of memory; the lanes are added as neighbors, then neighboring pairs, and so on.
// Invariant (values): one chain of fma per element, over the positions of a span.
#pragma once
#include "attention_place.h"

namespace HR_NS {

constexpr int kStep = 16;         // positions read in one go: of all heads, about 32 KB
constexpr int kRegisterRows = 6;  // of the query, per register tile
constexpr int kDotRows = HR_LEVEL >= 2 ? 6 : 2;
constexpr int kDotKeys = 4;

// Vectors of a row of `dim` elements, see Wide.
template <class T>
static constexpr int64_t vectors_of(int64_t dim) {
  constexpr int64_t kMade = Wide<T>::count;
  return (dim + kMade * kLanes - 1) / (kMade * kLanes) * kMade;
}

// ---- sums over lanes ----------------------------------------------------------------------------

// Sums of neighbors within each 128 bits: of a's, then b's.
HR_INLINE vf add_neighbors(vf a, vf b) {
  vi even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    even[i] = i / 4 * 4 + (i & 1) * 2 + (i & 2) / 2 * kLanes;
    odd[i] = even[i] + 1;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Sums of neighboring 128 bits: of a's, then b's.
HR_INLINE vf add_quarters(vf a, vf b) {
  vi even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    even[i] = i / 4 * 8 + i % 4;
    odd[i] = even[i] + 4;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

HR_INLINE vf add_four(const vf* x) {
  return add_neighbors(add_neighbors(x[0], x[1]), add_neighbors(x[2], x[3]));
}

// From add_four of kLanes vectors: lane i is the sum of the i-th.
HR_INLINE vf add_lanes(const vf* x) {
  if (kLanes == 4) return x[0];
  if (kLanes == 8) return add_quarters(x[0], x[1]);
  return add_quarters(add_quarters(x[0], x[1]), add_quarters(x[2], x[3]));
}

// ---- scores -------------------------------------------------------------------------------------

// Rows of queries in the order of `widened`, and where their scores go.
struct Queries {
  const float* rows;
  int64_t stride;
  float* scores;
  int64_t score_stride;
};

// sums[r][i] += the products of what `widened` made of element d of key i on with row r.
template <int R, int Made>
HR_INLINE void multiply_wide(const float* query, int64_t stride, const vf (*wide)[Made],
                             vf (*sums)[kDotKeys]) {
#pragma GCC unroll 2
  for (int p = 0; p < Made; ++p) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const vf factor = load(query + r * stride + p * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) sums[r][i] = fma(factor, wide[i][p], sums[r][i]);
    }
  }
}

// Partial sums of kDotKeys keys and R rows.
template <class T, int R>
HR_INLINE void dot_keys(const float* query, int64_t stride, const T* const* keys, int64_t dim,
                        vf (*sums)[kDotKeys], Ahead& ahead) {
  constexpr int kMade = Wide<T>::count, kTake = kMade * kLanes;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) sums[r][i] = zero();
  }
  vf wide[kDotKeys][kMade];
  int64_t d = 0;
#pragma GCC unroll 4
  for (; d + kTake <= dim; d += kTake) {
#pragma GCC unroll 4
    for (int i = 0; i < kDotKeys; ++i) widened(keys[i] + d, wide[i]);
    multiply_wide<R>(query + d, stride, wide, sums);
    ahead.lines(lines_of(kDotKeys * kTake * static_cast<int64_t>(sizeof(T))));
  }
  if (d < dim) {
    for (int i = 0; i < kDotKeys; ++i) widened_part(keys[i] + d, dim - d, wide[i]);
    multiply_wide<R>(query + d, stride, wide, sums);
    ahead.lines(lines_of(kDotKeys * (dim - d) * static_cast<int64_t>(sizeof(T))));
  }
}

// scores[r][j] for the positions j < kStep at `place`.
template <class T, int R>
static void dots(const Queries& q, const Place& place, int64_t dim, Ahead& ahead) {
  for (int64_t j = 0; j < kStep; j += kLanes) {
    vf added[R][kLanes / kDotKeys];
    for (int g = 0; g < kLanes / kDotKeys; ++g) {
      const T* keys[kDotKeys];
#pragma GCC unroll 4
      for (int i = 0; i < kDotKeys; ++i) keys[i] = place.at<T>(j + g * kDotKeys + i);
      vf sums[R][kDotKeys];
      dot_keys<T, R>(q.rows, q.stride, keys, dim, sums, ahead);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) added[r][g] = add_four(sums[r]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) store(q.scores + r * q.score_stride + j, add_lanes(added[r]));
  }
}

// Any number of rows, at most R at once.
template <class T, int R = kDotRows>
static void dot_rows(Queries q, int64_t rows, const Place& place, int64_t dim, Ahead& ahead) {
  for (; rows >= R; rows -= R) {
    dots<T, R>(q, place, dim, ahead);
    q.rows += R * q.stride;
    q.scores += R * q.score_stride;
  }
  if constexpr (R > 1) dot_rows<T, R - 1>(q, rows, place, dim, ahead);
}

// ---- values -------------------------------------------------------------------------------------

// mix[r][d] (+)= sum over j < depth of weights[r][j] * value j, elements in the order of `widened`.
struct Mixing {
  const float* weights;
  int64_t weight_stride;
  int64_t depth;
  float* mix;
  int64_t mix_stride;
  bool fresh;  // mix is not read
};

// N vectors from element c on; `rest`: how many elements there are.
template <class T, int R, int N>
static void mix_vectors(const Mixing& m, const Place& place, int64_t c, int64_t rest,
                        Ahead& ahead) {
  constexpr int kMade = Wide<T>::count, kTake = kMade * kLanes;
  vf sums[R][N];
  float* mix = m.mix + c;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      sums[r][n] = m.fresh ? zero() : load(mix + r * m.mix_stride + n * kLanes);
    }
  }
  const bool part = N == kMade && rest < kTake;
  for (int64_t k = 0; k < m.depth; ++k) {
    const T* row = place.at<T>(k) + c;
    vf weights[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) weights[r] = set(m.weights[r * m.weight_stride + k]);
#pragma GCC unroll 8
    for (int n = 0; n < N; n += kMade) {
      vf wide[kMade];
      if (part) {
        widened_part(row, rest, wide);
      } else {
        widened(row + n * kLanes, wide);
      }
#pragma GCC unroll 2
      for (int p = 0; p < kMade; ++p) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sums[r][n + p] = fma(weights[r], wide[p], sums[r][n + p]);
      }
    }
    ahead.lines(lines_of(N * kLanes * static_cast<int64_t>(sizeof(T))));
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(mix + r * m.mix_stride + n * kLanes, sums[r][n]);
  }
}

// At most R rows.
template <class T, int R = kRegisterRows>
static void mix_rows(const Mixing& m, int64_t rows, const Place& place, int64_t dim,
                     Ahead& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return mix_rows<T, R - 1>(m, rows, place, dim, ahead);
  }
  constexpr int kMade = Wide<T>::count;
  constexpr int kMost = (HR_LEVEL >= 2 ? 2 : 1) * (R <= 3 ? 4 : 2);  // of 32 or 16 registers
  int64_t c = 0;
  for (; c + kMost * kLanes <= dim; c += kMost * kLanes) {
    mix_vectors<T, R, kMost>(m, place, c, dim - c, ahead);
  }
  for (; c < dim; c += kMade * kLanes) mix_vectors<T, R, kMade>(m, place, c, dim - c, ahead);
}

}  // namespace HR_NS
