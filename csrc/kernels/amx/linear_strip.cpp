// The float linear family's products of bf16 with bf16 in AMX tiles: up to 32 rows of x by a panel.
#include "../linear.h"
#include "tile.h"

namespace HR_NS {

template <bool Second>
static void tile(const TileArgs& args) {
  multiply_strip<DotBf16, Second>({static_cast<const char*>(args.x), kStride<uint32_t> * 4, args.w,
                                   args.count, args.c, args.first, args.ahead,
                                   kWords * args.ahead_step});
}

struct Tiles {
  Tile by_rows[kStripRows + 1] = {};

  constexpr Tiles() {
    for (int r = 1; r <= kStripRows; ++r) by_rows[r] = r > kTileRows ? tile<true> : tile<false>;
  }
};
static constexpr Tiles kTiles;

const Multiplier& strips() {
  static const Multiplier made{kTiles.by_rows, nullptr, nullptr,    nullptr,
                               4 * HR_PANEL,   true,    kStripRows, configure};
  return made;
}

}  // namespace HR_NS
