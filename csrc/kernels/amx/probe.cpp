// probe_bf16 and probe_int8 of ../probe.cpp for AMX: products of whole tiles, without loads.
#include "tile.h"

namespace HR_NS {

// Six sums in turns hide the latency of a product. Registers 6 and 7 are x and weights.
template <class Dot>
static void add_six() {
  Dot::template add<0, 6, 7>(), Dot::template add<1, 6, 7>(), Dot::template add<2, 6, 7>();
  Dot::template add<3, 6, 7>(), Dot::template add<4, 6, 7>(), Dot::template add<5, 6, 7>();
}

template <class Dot>
static void run_chains(const hr_probe_args& args) {
  static_assert(HR_PROBE_CHAINS % 6 == 0, "sums take turns");
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int t = 0; t < kRegisters; ++t) shapes.rows[t] = kTileRows, shapes.bytes[t] = 64;
  hr::parallel(args.pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      alignas(64) float sums[kTileRows * kWords];
      tile_shapes(shapes);  // clears all registers
      for (int64_t n = args.rounds * (HR_PROBE_CHAINS / 6); n > 0; --n) add_six<Dot>();
      tile_store<0>(sums, 64);
      tile_release();
      args.sink[i] = sums[0];
    }
  });
}

static void probe_bf16(const hr_probe_args& args, const hr_step&) { run_chains<DotBf16>(args); }
static void probe_int8(const hr_probe_args& args, const hr_step&) { run_chains<DotInt8>(args); }

static void probe_width(const hr_probe_args& args, const hr_step&) {
  constexpr int64_t kTile = kTileRows * kWords * kWords;
  args.sink[0] = kLanes;
  args.sink[1] = 2 * kTile;
  args.sink[2] = 4 * kTile;
  args.sink[3] = 4 * kLanes;
}

HR_OPERATOR(probe_bf16, hr_probe_args)
HR_OPERATOR(probe_int8, hr_probe_args)
HR_OPERATOR(probe_width, hr_probe_args)

}  // namespace HR_NS
