// AMX tiles: registers of up to 16 rows of 64 bytes, and products of them. The only place that names
// their instructions.
//
// A product adds rows of x, 16 words each, times 16 words of 16 outputs, as they lie side by side in
// half a panel (hr_weight in headrace.h); a word is a pair of bf16 or four bytes. So a panel is read
// as it is packed for every other level.
//
// TDPBF16PS sums the even and the odd inputs of its 16 pairs apart, from zero, in rising order, each
// step one fma; then their sum is added to what was there. All round to nearest even, subnormal
// numbers count as zero whatever the control register says. Here a product always takes 16 words,
// the last ones filled up with zeros, and k runs from 0 to the end: a row's sums do not depend on
// the other rows. TDPBSUD is exact.
//
// Registers are configured for the rows of one strip (`configure`) and given back before the thread
// does anything else, so that neither the system has to save them nor others find them changed.
// -DHR_EMULATE replaces the instructions (emulated.h). Part of the kernel files: the same rules as
// simd.h, for level 4 alone.
#pragma once
#include "../simd.h"

static_assert(HR_PANEL == 32, "a panel is two tiles wide");

namespace HR_NS {

constexpr int64_t kTileRows = 16;  // of x, and words of k
constexpr int64_t kStripRows = 2 * kTileRows;
constexpr int64_t kWords = 16;               // of k, in one product
constexpr int64_t kDeepBytes = 4 * HR_PANEL;  // of a panel, for one word of k

// Numbers of registers: four of sums (rows by outputs), two of x, two of weights.
constexpr int kSums = 0, kX = 4, kW = 6, kRegisters = 8;

struct alignas(64) TileShapes {  // what LDTILECFG reads
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

}  // namespace HR_NS

#ifdef HR_EMULATE
#include "emulated.h"
#else
namespace HR_NS {

// Inline assembly, because gcc 12 does not know that its intrinsics read memory.
HR_INLINE void tile_shapes(const TileShapes& shapes) {
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
}
HR_INLINE void tile_release() { __asm__ volatile("tilerelease"); }

template <int T>
HR_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
HR_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
HR_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}

// c += x . w
template <int C, int X, int W>
HR_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(X), "i"(W));
}
// The same with signed bytes of x and unsigned ones of w.
template <int C, int X, int W>
HR_INLINE void tile_dot_int8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(X), "i"(W));
}

}  // namespace HR_NS
#endif

namespace HR_NS {

// Shapes of a strip of 1..kStripRows rows; 0 gives the registers back.
static inline void configure(int64_t rows) {
  if (rows == 0) {
    tile_release();
    return;
  }
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int t = 0; t < kRegisters; ++t) {
    const bool second = t == kSums + 2 || t == kSums + 3 || t == kX + 1;
    const int64_t own = second ? rows - kTileRows : rows < kTileRows ? rows : kTileRows;
    if (t < kW && own <= 0) continue;  // not there
    shapes.rows[t] = static_cast<uint8_t>(t < kW ? own : kWords);
    shapes.bytes[t] = 64;
  }
  tile_shapes(shapes);
}

// A strip of rows by one panel: sums [rows][HR_PANEL] (+)= x . w, `count` words deep.
struct Strip {
  const char* x;  // rows `stride` bytes apart, zero from `count` words up to a multiple of kWords
  int64_t stride;
  const char* w;
  int64_t count;
  void* sums;  // fp32 or int32
  bool first;  // sums hold nothing yet
  const char* ahead;   // what to fetch from memory meanwhile,
  int64_t ahead_step;  // this many bytes for every product
};

struct DotBf16 {
  template <int C, int X, int W>
  HR_INLINE void add() {
    tile_dot_bf16<C, X, W>();
  }
};
struct DotInt8 {
  template <int C, int X, int W>
  HR_INLINE void add() {
    tile_dot_int8<C, X, W>();
  }
};

template <class Dot, bool Second>
HR_INLINE void add_products(const char* x, int64_t stride, const char* w) {
  tile_load<kW>(w, kDeepBytes);
  tile_load<kX>(x, stride);
  Dot::template add<kSums, kX, kW>();
  tile_load<kW + 1>(w + 64, kDeepBytes);
  Dot::template add<kSums + 1, kX, kW + 1>();
  if (Second) {
    tile_load<kX + 1>(x + kTileRows * stride, stride);
    Dot::template add<kSums + 2, kX + 1, kW>();
    Dot::template add<kSums + 3, kX + 1, kW + 1>();
  }
}

// After configure(rows); `Second`: more than kTileRows.
template <class Dot, bool Second>
static void multiply_strip(const Strip& strip) {
  char* sums = static_cast<char*>(strip.sums);
  char* below = sums + kTileRows * kDeepBytes;
  if (strip.first) {
    tile_zero<kSums>(), tile_zero<kSums + 1>();
    if (Second) tile_zero<kSums + 2>(), tile_zero<kSums + 3>();
  } else {
    tile_load<kSums>(sums, kDeepBytes), tile_load<kSums + 1>(sums + 64, kDeepBytes);
    if (Second) {
      tile_load<kSums + 2>(below, kDeepBytes), tile_load<kSums + 3>(below + 64, kDeepBytes);
    }
  }
  const char *x = strip.x, *w = strip.w, *ahead = strip.ahead;
  int64_t left = strip.count;
  for (; left >= kWords; left -= kWords, x += 64, w += kWords * kDeepBytes) {
    for (int64_t i = 0; i < strip.ahead_step; i += 64) prefetch(ahead + i);
    ahead += strip.ahead_step;
    add_products<Dot, Second>(x, strip.stride, w);
  }
  if (left > 0) {
    alignas(64) char rest[kWords * kDeepBytes] = {};
    memcpy(rest, w, static_cast<size_t>(left * kDeepBytes));
    add_products<Dot, Second>(x, strip.stride, rest);
  }
  tile_store<kSums>(sums, kDeepBytes), tile_store<kSums + 1>(sums + 64, kDeepBytes);
  if (Second) {
    tile_store<kSums + 2>(below, kDeepBytes), tile_store<kSums + 3>(below + 64, kDeepBytes);
  }
}

}  // namespace HR_NS
