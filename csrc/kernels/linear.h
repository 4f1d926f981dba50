// How the files of the float linear family share work: linear_tile.cpp multiplies a few rows by one
// panel, linear_block.cpp lays rows of x out and walks a block of rows and panels, linear.cpp and
// moe.cpp turn sums into outputs.
//
// One accumulator per output element runs over k from 0 to the end, whatever the number of rows:
// a row of y is the same number in every batch. Parking accumulators in memory as fp32 between
// blocks of k changes nothing.
//
// Functions declared here are the exception to "static" in simd.h: their namespace is the level's,
// and they are not inline, so no two levels can share one.
#pragma once
#include "simd.h"

namespace HR_NS {

HR_INLINE int64_t panels(const hr_weight& w) { return (w.out + HR_PANEL - 1) / HR_PANEL; }
HR_INLINE int64_t pairs(const hr_weight& w) { return (w.in + 1) / 2; }
HR_INLINE int64_t panel_bytes(const hr_weight& w) {
  return pairs(w) * HR_PANEL * (w.dtype == HR_F32 ? 8 : 4);
}

constexpr int kMostTileRows = HR_LEVEL >= 2 ? 12 : HR_LEVEL == 1 ? 6 : 4;
constexpr int64_t kPairsAtOnce = 512;  // of k: 64 kB of a bf16 panel, 128 kB of an fp32 one

// ---- linear_tile.cpp ----------------------------------------------------------------------------

// `count` pairs of k of one tile: c [rows, HR_PANEL] += x [rows, pairs] times a panel.
struct TileArgs {
  const char* w;
  const void* x;  // rows `kStride` (see Multiplier) apart
  int64_t count;
  float* c;
  bool first;           // c holds nothing yet
  float* wide;          // as fp32 [pairs][2][HR_PANEL]: see Multiplier
  const char* ahead;    // what to fetch from memory meanwhile,
  int64_t ahead_step;   // this many bytes for every pair
};
using Tile = void (*)(const TileArgs& args);

// How weights of one type are multiplied with rows of one type.
struct Multiplier {
  const Tile* tiles;    // by number of rows, from 1 on
  const Tile* keeping;  // the same for the first of many tiles: leave the weights in `wide`; or null
  const Tile* again;    // the same over what `keeping` or `widen` left there
  void (*widen)(const char* w, int64_t count, float* wide);  // before all tiles; or null
  int64_t pair_bytes;   // of a panel
  bool bf16_rows;       // x is laid out as pairs of bf16, else as fp32
  int64_t most_rows = kMostTileRows;            // of a tile
  void (*configure)(int64_t rows) = nullptr;  // before tiles of another size; 0: after the last
};
const Multiplier& multiplier(int32_t weight_dtype, int32_t x_dtype);
const Multiplier& strips();  // of level 4: bf16 by bf16 (amx/linear_strip.cpp)

// From one row of x to the next: not a multiple of a page, else rows fall into one set of the cache.
template <class X>
constexpr int64_t kStride = 2 * kPairsAtOnce + 16;  // floats
template <>
constexpr int64_t kStride<uint32_t> = kPairsAtOnce + 16;  // pairs of bf16

// ---- linear_block.cpp ---------------------------------------------------------------------------

// Rows cut into tiles whose sizes differ by at most one, the larger ones first.
struct Tiling {
  int64_t rows, tiles;
  int64_t each, larger;  // rows of a tile; how many have one more

  Tiling(int64_t rows, int64_t most)
      : rows(rows),
        tiles((rows + most - 1) / most),
        each(tiles > 0 ? rows / tiles : 0),
        larger(rows - each * tiles) {}
  int64_t begin(int64_t tile) const { return each * tile + (tile < larger ? tile : larger); }
  int64_t size(int64_t tile) const { return each + (tile < larger ? 1 : 0); }
};

// Rows of x as tiles read them: [block of k][row][stride]. Those of some tiles or of all.
struct Input {
  Tiling tiling;
  const Multiplier& how;
  int64_t depth;  // pairs of k
  int64_t first, held;  // rows in `data`
  char* data;

  Input(int64_t rows, const hr_weight& weight, int32_t x_dtype)
      : Input(rows, multiplier(weight.dtype, x_dtype), pairs(weight)) {}
  Input(int64_t rows, const Multiplier& how, int64_t depth)
      : tiling(rows, how.most_rows), how(how), depth(depth), first(0), held(rows), data(nullptr) {}
  int64_t row_bytes() const {
    return (how.bf16_rows ? kStride<uint32_t> : kStride<float>) * 4;
  }
  int64_t bytes() const { return (depth + kPairsAtOnce - 1) / kPairsAtOnce * held * row_bytes(); }
  const char* at(int64_t k, int64_t row) const {
    return data + (k / kPairsAtOnce * held + row - first) * row_bytes();
  }
};

// Copies the held rows to input.data: rows which[0], which[1], ... of x (null: first, first + 1, ...).
void lay_out(const hr_rows& x, int64_t first, const int32_t* which, const Input& input);

constexpr int64_t kPanelsAtOnce = 8;

// Tiles [first_tile, last_tile) by up to kPanelsAtOnce panels [first, last).
struct Block {
  int64_t first_tile, last_tile, first, last;

  int64_t rows(const Tiling& tiling) const {
    return tiling.begin(last_tile) - tiling.begin(first_tile);
  }
};

// How a product is cut into blocks: a block's rows stay in the second-level cache.
struct Cut {
  int64_t tiles, panels;       // of a block
  int64_t all_tiles, all_panels;
  int64_t groups;              // blocks side by side

  Cut(const Input& input, const hr_weight& weight);
  int64_t count() const { return groups * ((all_tiles + tiles - 1) / tiles); }
  Block block(int64_t index) const;
};

// sums [panel][row][HR_PANEL] of a block.
void multiply(const Input& input, const hr_weight& weight, const Block& block, float* sums);

// ---- linear.cpp ---------------------------------------------------------------------------------

// One block of an operator; row 0 of `input` is row `row` of y.
void linear_block(const hr_linear_args& args, const Input& input, const Block& block, int64_t row);
void gated_block(const hr_gated_linear_args& args, const Input& input, const Block& block,
                 int64_t row);

}  // namespace HR_NS
