// The products of attention on one block of positions, as register tiles.
//
// A panel is fp32, [up to kBlock][kBlock]: keys transposed (element of the head x position) or
// values (position x element of the head). It fits the L1 cache and serves all query rows of a tile.
// Part of the kernel files: the same rules as simd.h.
//
// Invariant: each sum is one chain of fma in the order of k, whatever tile computed it.
#pragma once
#include "kv.h"

namespace HR_NS {

constexpr int kBlock = 64;                       // positions, and elements of a head, of a panel
constexpr int kColumns = HR_LEVEL >= 2 ? 4 : 2;  // vectors of a register tile
constexpr int kRegisterRows = 6;
constexpr int kNear = 8;  // positions to ask for before they are read

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

// Asks for memory that is read later, line by line in the order of addresses, so that the CPU's own
// prefetchers go along. Whoever reads asks for as much as it reads.
HR_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

struct Ahead {
  const char* rows = nullptr;
  const int64_t* offsets = nullptr;  // in bytes
  int64_t left = 0;                  // rows
  int64_t size = 64;                 // bytes of a row
  int64_t at = 0;

  __attribute__((always_inline)) inline void lines(int64_t count) {
    while (count > 0 && left > 0) {
      const char* next = rows + *offsets + at;
      const int64_t rest = (size - at + 63) / 64, some = rest < count ? rest : count;
      for (int64_t i = 0; i < some; ++i) prefetch_far(next + i * 64);
      at += some * 64;
      count -= some;
      if (at < size) return;
      at = 0;
      ++offsets;
      --left;
    }
  }
};

// Where kBlock positions of a cache are.
struct Place {
  const char* rows;        // element 0 of the head at offset 0
  const int64_t* offsets;  // [kBlock + kNear] in bytes; positions that are not read repeat one that is

  template <class T>
  __attribute__((always_inline)) inline const T* at(int64_t position) const {
    return reinterpret_cast<const T*>(rows + offsets[position]);
  }
};

// panel[d][j] = key of position j, element d0 + d, for `count` elements and the vectors of positions
// [first, last].
template <class T>
static void transpose_keys(const Place& place, int64_t first, int64_t last, int64_t d0,
                           int64_t count, float* panel, Ahead& ahead) {
  constexpr int kPack = Pack<T>::count;
  first = first / kLanes * kLanes;
  for (int64_t lane = first; lane <= last; lane += kLanes) {
    // Rows that lie 2^n bytes apart do not stay in the L1 cache: ask again for what comes next.
    const bool more = lane + kLanes <= last;
    const Place near = {place.rows + (more ? 0 : count * static_cast<int64_t>(sizeof(T))),
                        place.offsets + (more ? lane + kLanes : first)};
    for (int64_t e = 0; e < count; e += kLanes * kPack) {
      vf unit[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) prefetch(near.at<T>(i) + d0 + e);
      if (e + kLanes * kPack <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) unit[i] = units(place.at<T>(lane + i) + d0 + e);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          unit[i] = units_part(place.at<T>(lane + i) + d0 + e, count - e);
        }
      }
      ahead.lines(kLanes * kLanes * kPack * static_cast<int64_t>(sizeof(T)) / 64);
      transpose(unit);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        vf out[kPack];
        unpack(static_cast<const T*>(nullptr), unit[i], out);
#pragma GCC unroll 4
        for (int p = 0; p < kPack; ++p) store(panel + (e + i * kPack + p) * kBlock + lane, out[p]);
      }
    }
  }
}

// panel[j][c] = value of position j, element c0 + c, for `count` elements and positions
// [first, last].
template <class T>
static void widen_values(const Place& place, int64_t first, int64_t last, int64_t c0,
                         int64_t count, float* panel, Ahead& ahead) {
  for (int64_t j = first; j <= last; ++j) {
    const T* from = place.at<T>(j) + c0;
    const T* near = place.at<T>(j + kNear) + c0;
    float* to = panel + j * kBlock;
    for (int64_t c = 0; c < count; c += 64 / static_cast<int64_t>(sizeof(T))) prefetch(near + c);
    ahead.lines((count * static_cast<int64_t>(sizeof(T)) + 63) / 64);
    int64_t c = 0;
    for (; c + kLanes <= count; c += kLanes) store(to + c, lanes(from + c));
    if (c < count) store(to + c, lanes_part(from + c, count - c));
  }
}

// Terms of c[i][n] (+)= sum over k of a[i][k] * b[k][n]; i counts rows, n vectors.
struct Product {
  const float* a;
  int64_t a_stride;
  const float* b;  // stride kBlock
  int64_t depth;
  float* c;
  int64_t c_stride;
  bool fresh;  // c is not read
};

template <int R, int N>
static void outer(const Product& p, int64_t n0) {
  vf sums[R][N];
  const float* a = p.a;
  const float* b = p.b + n0 * kLanes;
  float* c = p.c + n0 * kLanes;
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sums[i][n] = p.fresh ? zero() : load(c + i * p.c_stride + n * kLanes);
    }
  }
  const int64_t stride = p.a_stride;
  for (int64_t k = 0; k < p.depth; ++k, b += kBlock, ++a) {
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
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * p.c_stride + n * kLanes, sums[i][n]);
  }
}

template <int N>
static void outer_rows(const Product& p, int64_t rows, int64_t n0) {
  if (rows == 6) outer<6, N>(p, n0);
  if (rows == 5) outer<5, N>(p, n0);
  if (rows == 4) outer<4, N>(p, n0);
  if (rows == 3) outer<3, N>(p, n0);
  if (rows == 2) outer<2, N>(p, n0);
  if (rows == 1) outer<1, N>(p, n0);
}

// Up to kRegisterRows rows and kBlock columns in whole vectors.
static void multiply(const Product& p, int64_t rows, int64_t vectors) {
  int64_t n = 0;
  for (; n + kColumns <= vectors; n += kColumns) outer_rows<kColumns>(p, rows, n);
  if (kColumns > 3 && vectors - n == 3) outer_rows<3>(p, rows, n);
  if (kColumns > 2 && vectors - n == 2) outer_rows<2>(p, rows, n);
  if (vectors - n == 1) outer_rows<1>(p, rows, n);
}

// The same for few rows with b straight from the cache: b[k] are kLanes * N elements from c0 on at
// positions first + k.
template <class T, int R, int N>
static void outer_values(const Product& p, const Place& place, int64_t first, int64_t c0,
                         Ahead& ahead) {
  vf sums[R][N];
  float* c = p.c + c0;
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sums[i][n] = p.fresh ? zero() : load(c + i * p.c_stride + n * kLanes);
    }
  }
  const int64_t stride = p.a_stride;
  for (int64_t k = 0; k < p.depth; ++k) {
    const T* row = place.at<T>(first + k) + c0;
    const T* near = place.at<T>(first + k + kNear) + c0;
    vf right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      right[n] = lanes(row + n * kLanes);
      if (n * kLanes * sizeof(T) % 64 == 0) prefetch(near + n * kLanes);
    }
    ahead.lines((N * kLanes * static_cast<int64_t>(sizeof(T)) + 63) / 64);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const vf left = set(p.a[i * stride + k]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[i][n] = fma(left, right[n], sums[i][n]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + i * p.c_stride + n * kLanes, sums[i][n]);
  }
}

// All whole groups of kColumns vectors of heads of `dim` elements.
template <class T>
static void multiply_values(const Product& p, const Place& place, int64_t rows, int64_t first,
                            int64_t dim, Ahead& ahead) {
  constexpr int N = kColumns;
  for (int64_t c = 0; c + N * kLanes <= dim; c += N * kLanes) {
    if (rows == 6) outer_values<T, 6, N>(p, place, first, c, ahead);
    if (rows == 5) outer_values<T, 5, N>(p, place, first, c, ahead);
    if (rows == 4) outer_values<T, 4, N>(p, place, first, c, ahead);
    if (rows == 3) outer_values<T, 3, N>(p, place, first, c, ahead);
    if (rows == 2) outer_values<T, 2, N>(p, place, first, c, ahead);
    if (rows == 1) outer_values<T, 1, N>(p, place, first, c, ahead);
  }
}

}  // namespace HR_NS
