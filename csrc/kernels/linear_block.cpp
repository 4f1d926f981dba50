// Blocks of rows and panels: how x is laid out, in which order a block's products run, and what is
// fetched from memory meanwhile. Knows no types of weights: a Multiplier has them.
#include "linear.h"
#include "types.h"

namespace HR_NS {

constexpr int64_t kBlockBytes = 320 << 10;  // of x, kept in the second-level cache
constexpr int64_t kTilesToKeepFor = 3;  // and fewer read bf16 weights one after the other
// Bytes that a single tile fetches ahead in its own stream, of which AMX takes 2 kB at once.
constexpr int64_t kNear = 4096;

// ---- rows of x ----------------------------------------------------------------------------------

template <class X>
static void widen_row(const X* from, int64_t count, char* to) {
  float* out = reinterpret_cast<float*>(to);
  load_elements(from, count, out);
  if (count % 2) out[count] = 0.0f;
}

static void copy_pairs(const uint16_t* from, int64_t count, char* to) {
  const int64_t width = (count + 31) / 32 * 32;  // AMX reads 16 pairs at once
  memcpy(to, from, static_cast<size_t>(count) * 2);
  memset(to + count * 2, 0, static_cast<size_t>(width - count) * 2);
}

void lay_out(const hr_rows& x, int64_t first, const int32_t* which, const Input& input) {
  const int64_t width = 2 * kPairsAtOnce, bytes = input.row_bytes();
  const int64_t size = x.dtype == HR_F32 ? 4 : 2;
  for (int64_t r = 0; r < input.held; ++r) {
    const int64_t row = which ? which[r] : first + r;
    const char* source = static_cast<const char*>(x.data) + row * x.stride * size;
    for (int64_t k = 0; k < x.columns; k += width) {
      const int64_t count = x.columns - k < width ? x.columns - k : width;
      char* target = input.data + (k / width * input.held + r) * bytes;
      const char* from = source + k * size;
      if (input.how.bf16_rows) {
        copy_pairs(reinterpret_cast<const uint16_t*>(from), count, target);
      } else {
        with_type(x.dtype, [&](auto type) {
          widen_row(reinterpret_cast<const decltype(type)*>(from), count, target);
        });
      }
    }
  }
}

// ---- blocks -------------------------------------------------------------------------------------

// Whether all of k fits: then a panel is read from front to back, one after another.
static bool fits(const Input& input, int64_t rows) {
  return rows * input.depth * (input.row_bytes() / kPairsAtOnce) <= kBlockBytes;
}

Cut::Cut(const Input& input, const hr_weight& weight)
    : tiles(input.tiling.tiles), all_tiles(tiles), all_panels(HR_NS::panels(weight)) {
  const int64_t rows = input.tiling.rows, work = input.depth * rows;
  panels = 1 + (1 << 14) / (work + 1);
  if (!fits(input, rows)) {
    const int64_t most = kBlockBytes / (input.how.most_rows * input.row_bytes());
    const int64_t blocks = (tiles + most - 1) / most;
    tiles = (tiles + blocks - 1) / blocks;
    panels = kPanelsAtOnce;
  }
  if (panels > kPanelsAtOnce) panels = kPanelsAtOnce;
  groups = (all_panels + panels - 1) / panels;
}

Block Cut::block(int64_t index) const {
  const int64_t tile = index / groups * tiles, panel = index % groups * panels;
  const int64_t last_tile = tile + tiles, last_panel = panel + panels;
  return {tile, last_tile < all_tiles ? last_tile : all_tiles, panel,
          last_panel < all_panels ? last_panel : all_panels};
}

namespace {

// One panel and one block of k, all tiles of the block.
struct Pass {
  const Input& input;
  const Block& block;
  float* wide;
  int64_t configured = 0;

  // w: the panel's block of k; then: what is read next.
  void run(const char* w, int64_t k, int64_t count, float* c, const char* then) {
    const Tiling& tiling = input.tiling;
    const Multiplier& how = input.how;
    const int64_t tiles = block.last_tile - block.first_tile;
    const int64_t share = (how.pair_bytes + tiles - 1) / tiles;
    // Storing costs the first tile about as much as reading saves two others, and on a core that is
    // shared with another hyperthread saves them nothing.
    const bool keep = how.keeping && tiles > kTilesToKeepFor;
    TileArgs args{w, nullptr, count, c, k == 0, wide, w + kNear, how.pair_bytes};
    if (how.widen) how.widen(w, count, wide);
    for (int64_t t = block.first_tile; t < block.last_tile; ++t) {
      const bool stored = how.widen || (keep && t > block.first_tile);
      args.w = stored ? reinterpret_cast<const char*>(wide) : w;
      args.x = input.at(k, tiling.begin(t));
      if (tiles > 1) {
        args.ahead = then + (t - block.first_tile) * count * share;
        args.ahead_step = share;
      }
      const int64_t size = tiling.size(t);
      if (how.configure && size != configured) how.configure(configured = size);
      (stored ? how.again : keep ? how.keeping : how.tiles)[size](args);
      args.c += size * HR_PANEL;
    }
  }
};

}  // namespace

void multiply(const Input& input, const hr_weight& weight, const Block& block, float* sums) {
  const int64_t rows = block.rows(input.tiling), depth = input.depth;
  const int64_t pair = input.how.pair_bytes, panel = depth * pair;
  const char* data = static_cast<const char*>(weight.data);
  const int64_t at_once = fits(input, input.tiling.rows) ? 1 : block.last - block.first;
  float* wide = nullptr;
  if (input.how.again) {
    wide = static_cast<float*>(hr::scratch(kPairsAtOnce * 2 * HR_PANEL * sizeof(float), 2));
  }
  Pass pass{input, block, wide};
  for (int64_t first = block.first; first < block.last; first += at_once) {
    for (int64_t k = 0; k < depth; k += kPairsAtOnce) {
      const int64_t count = depth - k < kPairsAtOnce ? depth - k : kPairsAtOnce;
      for (int64_t p = first; p < first + at_once; ++p) {
        const char* w = data + p * panel + k * pair;
        // One panel at a time: the next block of k, or of the next panel, which lies behind it and
        // which this thread most likely takes next. That is no latency to hide but a long way to
        // go: 8 kB are too few.
        const char* next = w + (at_once == 1 ? kPairsAtOnce * pair : panel);
        pass.run(w, k, count, sums + (p - block.first) * rows * HR_PANEL, next);
      }
    }
  }
  if (input.how.configure) input.how.configure(0);
}

}  // namespace HR_NS
