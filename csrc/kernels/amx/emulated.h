// The instructions of tile.h in plain C, as Intel's manual describes them (Software Developer's
// Manual, volume 2): also their faults, which end the process, so that a test sees them.
#pragma once
#include <stdlib.h>

#include "tile.h"

namespace HR_NS {

struct Registers {
  TileShapes shapes;
  uint8_t data[kRegisters][kTileRows][64];
};
static thread_local Registers own_tiles;

static void fault_unless(bool allowed) {
  if (!allowed) abort();
}
static void fault_unless_there(int t) {
  fault_unless(own_tiles.shapes.palette == 1 && own_tiles.shapes.rows[t] > 0);
}

static void tile_shapes(const TileShapes& shapes) {
  fault_unless(shapes.palette == 1 && shapes.start_row == 0);
  for (int t = 0; t < 16; ++t) {
    const bool there = shapes.rows[t] > 0;
    fault_unless(there == (shapes.bytes[t] > 0) && (t < kRegisters || !there));
    fault_unless(shapes.rows[t] <= kTileRows && shapes.bytes[t] <= 64);
  }
  memset(&own_tiles, 0, sizeof own_tiles);
  own_tiles.shapes = shapes;
}

static void tile_release() { memset(&own_tiles, 0, sizeof own_tiles); }

template <int T>
static void tile_zero() {
  fault_unless_there(T);
  memset(own_tiles.data[T], 0, sizeof own_tiles.data[T]);
}

template <int T>
static void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int row = 0; row < own_tiles.shapes.rows[T]; ++row) {
    memcpy(own_tiles.data[T][row], static_cast<const char*>(p) + row * stride,
           own_tiles.shapes.bytes[T]);
  }
}

template <int T>
static void tile_store(void* p, int64_t stride) {
  fault_unless_there(T);
  for (int row = 0; row < own_tiles.shapes.rows[T]; ++row) {
    memcpy(static_cast<char*>(p) + row * stride, own_tiles.data[T][row],
           own_tiles.shapes.bytes[T]);
  }
}

// What a product needs: registers of matching shapes, none of them twice.
static void fault_unless_matching(int c, int x, int w) {
  fault_unless_there(c), fault_unless_there(x), fault_unless_there(w);
  const TileShapes& shapes = own_tiles.shapes;
  fault_unless(c != x && c != w && x != w && shapes.rows[c] == shapes.rows[x]);
  fault_unless(shapes.bytes[c] == shapes.bytes[w] && shapes.bytes[x] == 4 * shapes.rows[w]);
}

// Elements of one row of a register. What lies past its shape is zero, so whole rows are multiplied.
template <class T>
struct Row {
  T at[64 / sizeof(T)];

  Row(int t, int row) { memcpy(at, own_tiles.data[t][row], 64); }
  void keep(int t, int row) const { memcpy(own_tiles.data[t][row], at, 64); }
};

static inline float flushed(float x) {
  const uint32_t bits = as_bits(x);
  return as_float(bits & 0x7f800000 ? bits : bits & 0x80000000);
}
static inline float wide(bf16 x) { return flushed(widen(x)); }

template <int C, int X, int W>
static void tile_dot_bf16() {
  fault_unless_matching(C, X, W);
  for (int row = 0; row < own_tiles.shapes.rows[C]; ++row) {
    const Row<bf16> x(X, row);
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < own_tiles.shapes.rows[W]; ++k) {
      const Row<bf16> w(W, k);
      const float x0 = wide(x.at[2 * k]), x1 = wide(x.at[2 * k + 1]);
      for (int n = 0; n < 16; ++n) {
        even[n] = flushed(__builtin_fmaf(x0, wide(w.at[2 * n]), even[n]));
        odd[n] = flushed(__builtin_fmaf(x1, wide(w.at[2 * n + 1]), odd[n]));
      }
    }
    Row<float> sums(C, row);
    for (int n = 0; n < 16; ++n) {
      sums.at[n] = flushed(flushed(sums.at[n]) + flushed(even[n] + odd[n]));
    }
    sums.keep(C, row);
  }
}

template <int C, int X, int W>
static void tile_dot_int8() {
  fault_unless_matching(C, X, W);
  for (int row = 0; row < own_tiles.shapes.rows[C]; ++row) {
    const Row<int8_t> x(X, row);
    Row<int32_t> sums(C, row);
    for (int k = 0; k < own_tiles.shapes.rows[W]; ++k) {
      const Row<uint8_t> w(W, k);
      for (int n = 0; n < 16; ++n) {
        for (int i = 0; i < 4; ++i) sums.at[n] += x.at[4 * k + i] * w.at[4 * n + i];
      }
    }
    sums.keep(C, row);
  }
}

}  // namespace HR_NS
