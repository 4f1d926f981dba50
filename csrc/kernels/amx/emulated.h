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

// One element [row][4 bytes] of a tile.
template <class T>
static T element(int t, int row, int column) {
  T value;
  memcpy(&value, own_tiles.data[t][row] + column * sizeof value, sizeof value);
  return value;
}

static float flushed(float x) {
  const uint32_t bits = as_bits(x);
  return bits & 0x7f800000 ? x : as_float(bits & 0x80000000);
}
static float add_flushed(float a, float b) { return flushed(flushed(a) + flushed(b)); }
static float fma_flushed(bf16 a, bf16 b, float c) {
  return flushed(__builtin_fmaf(flushed(widen(a)), flushed(widen(b)), c));
}

// What a product does to one element of c, as sum(row, column, value before).
template <class T, class Sum>
static void each_sum(int c, int x, int w, const Sum& sum) {
  fault_unless_there(c), fault_unless_there(x), fault_unless_there(w);
  const TileShapes& shapes = own_tiles.shapes;
  fault_unless(c != x && c != w && x != w && shapes.rows[c] == shapes.rows[x]);
  fault_unless(shapes.bytes[c] == shapes.bytes[w] && shapes.bytes[x] == 4 * shapes.rows[w]);
  for (int row = 0; row < shapes.rows[c]; ++row) {
    for (int column = 0; column < shapes.bytes[c] / 4; ++column) {
      const T after = sum(row, column, element<T>(c, row, column));
      memcpy(own_tiles.data[c][row] + column * 4, &after, 4);
    }
  }
}

template <int C, int X, int W>
static void tile_dot_bf16() {
  each_sum<float>(C, X, W, [](int row, int column, float before) {
    float even = 0.0f, odd = 0.0f;
    for (int k = 0; k < own_tiles.shapes.rows[W]; ++k) {
      even = fma_flushed(element<bf16>(X, row, 2 * k), element<bf16>(W, k, 2 * column), even);
      odd = fma_flushed(element<bf16>(X, row, 2 * k + 1), element<bf16>(W, k, 2 * column + 1), odd);
    }
    return add_flushed(before, add_flushed(even, odd));
  });
}

template <int C, int X, int W>
static void tile_dot_int8() {
  each_sum<int32_t>(C, X, W, [](int row, int column, int32_t sum) {
    for (int k = 0; k < own_tiles.shapes.rows[W]; ++k) {
      for (int i = 0; i < 4; ++i) {
        sum += element<int8_t>(X, row, 4 * k + i) * element<uint8_t>(W, k, 4 * column + i);
      }
    }
    return sum;
  });
}

}  // namespace HR_NS
