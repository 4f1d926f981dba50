// linear_int4: unsigned 4-bit weights with a scale per group of inputs, x quantized to int8 with a
// scale per row and group.
//
// y = sum over groups of x_scale * (scale * dot - offset * sum_q) + bias, where dot = sum of w * q and
// sum_q are exact integers. A scale of x per group keeps one outlier from costing all inputs of its
// row their precision, for one multiplication per group. Groups are added in rising order, one
// accumulator per output element, whatever the number of rows. In the symmetric form 8 * sum_q is
// taken off the integer at no cost: the sum of products starts there.
#include "dot_int8.h"
#include "lowbit.h"

namespace HR_NS {

// The register tile: kRows rows of x by kVectors vectors of outputs.
constexpr int kVectors = 2;
constexpr int kRows = HR_LEVEL >= 2 ? 12 : 4;
constexpr int kTile = kVectors * kLanes;
constexpr int64_t kBlock = 4 * HR_PANEL;  // bytes of a panel for eight inputs
constexpr int64_t kBlocksIn16Bits = 4;    // of products that one 16-bit sum can hold

HR_INLINE int64_t groups_of(const hr_weight& w) { return (w.in + w.group - 1) / w.group; }
HR_INLINE int64_t header_bytes(const hr_weight& w) {  // scales of a panel's group, and the rest
  return HR_PANEL * (w.scaling == HR_SYMMETRIC ? 2 : w.scaling == HR_ZEROS ? 4 : 8);
}
HR_INLINE int64_t group_bytes(const hr_weight& w) {
  return header_bytes(w) + w.group / 8 * kBlock;
}

// One group of x in one tile, beside which lie the values: [2 * blocks][R] quads.
template <int R>
struct Sides {
  float scale[R];  // of x
  float sum[R];    // scale * sum_q
  int32_t start[R];  // -8 * sum_q in the symmetric form, else 0
};
constexpr int64_t kSideBytes = 12;  // of one row

#if HR_LEVEL >= 3
// sum [R][kVectors] = start + products of `blocks` blocks.
template <int R>
HR_INLINE void multiply_group(const char* w, const char* x, int64_t blocks, const int32_t* start,
                              vi (&sum)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = set_int(start[r]);
  }
  for (; blocks > 0; --blocks, w += kBlock, x += 2 * R * kInt4Quad) {
    vu low[kVectors], high[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      const vu raw = load_words(w + v * 4 * kLanes);
      low[v] = raw & 0x0f0f0f0fu;
      high[v] = (raw >> 4) & 0x0f0f0f0fu;
    }
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    for (int r = 0; r < R; ++r) {
      const vi s = repeat(x + r * kInt4Quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot4(sum[r][v], low[v], s);
    }
    for (int r = 0; r < R; ++r) {
      const vi s = repeat(x + (R + r) * kInt4Quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot4(sum[r][v], high[v], s);
    }
  }
}
#else
// part [R][kVectors] = products of at most kBlocksIn16Bits blocks, in 16 bits.
template <int R>
HR_INLINE void multiply_blocks(const char* w, const char* x, int64_t blocks,
                               vs (&part)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) part[r][v] = vs{};
  }
  for (; blocks > 0; --blocks, w += kBlock, x += 2 * R * kInt4Quad) {
    vu four[kVectors];
    for (int v = 0; v < kVectors; ++v) four[v] = load_words(w + v * 4 * kLanes) & 0x0f0f0f0fu;
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    for (int r = 0; r < R; ++r) {
      const char* quad = x + r * kInt4Quad;
      for (int v = 0; v < kVectors; ++v) part[r][v] = dot_nibbles(part[r][v], four[v], quad);
    }
    for (int v = 0; v < kVectors; ++v) {
      four[v] = (load_words(w + v * 4 * kLanes) >> 4) & 0x0f0f0f0fu;
    }
    for (int r = 0; r < R; ++r) {
      const char* quad = x + (R + r) * kInt4Quad;
      for (int v = 0; v < kVectors; ++v) part[r][v] = dot_nibbles(part[r][v], four[v], quad);
    }
  }
}

template <int R>
HR_INLINE void multiply_group(const char* w, const char* x, int64_t blocks, const int32_t* start,
                              vi (&sum)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = set_int(start[r]);
  }
  while (blocks > 0) {
    const int64_t now = least(blocks, kBlocksIn16Bits);
    vs part[R][kVectors];
    multiply_blocks<R>(w, x, now, part);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] += pair_dot(part[r][v], vs{} + 1);
    }
    blocks -= now, w += now * kBlock, x += now * 2 * R * kInt4Quad;
  }
}
#endif

// Scales and offsets of kLanes outputs from j on; there are none in the symmetric form.
template <bool Symmetric>
HR_INLINE void read_header(int32_t scaling, const char* header, int j, vf* scale, vf* offset) {
  const f16* half = reinterpret_cast<const f16*>(header) + j;
  const float* full = reinterpret_cast<const float*>(header) + j;
  if (Symmetric || scaling == HR_ZEROS) {
    *scale = load(half);
    *offset = Symmetric ? zero() : *scale * load(half + HR_PANEL);
  } else {
    *scale = load(full);
    *offset = load(full + HR_PANEL);
  }
}

// One tile in one panel: c [R, HR_PANEL] = sums of all groups.
template <bool Symmetric, int R>
static void tile(const hr_weight& w, const char* panel, const char* x, float* c) {
  const int64_t groups = groups_of(w), header = header_bytes(w), blocks = w.group / 8;
  for (int j = 0; j < R * HR_PANEL; j += kLanes) store(c + j, zero());
  for (int64_t g = 0; g < groups; ++g, panel += header + blocks * kBlock) {
    const Sides<R>& side = *reinterpret_cast<const Sides<R>*>(x);
    x += sizeof side;
    for (int j = 0; j < HR_PANEL; j += kTile) {
      vi dots[R][kVectors];
      multiply_group<R>(panel + header + 4 * j, x, blocks, side.start, dots);
      vf scale[kVectors], offset[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        read_header<Symmetric>(w.scaling, panel, j + v * kLanes, scale + v, offset + v);
      }
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < kVectors; ++v) {
          float* sum = c + r * HR_PANEL + j + v * kLanes;
          const vf dot = __builtin_convertvector(dots[r][v], vf) * set(side.scale[r]);
          vf total = fma(dot, scale[v], load(sum));
          if (!Symmetric) total = fma(set(-side.sum[r]), offset[v], total);
          store(sum, total);
        }
      }
    }
    x += 2 * blocks * R * kInt4Quad;
  }
}

using TileOf = void (*)(const hr_weight&, const char*, const char*, float*);
template <bool S>
static constexpr TileOf kTiles[] = {
    nullptr,    tile<S, 1>, tile<S, 2>, tile<S, 3>,  tile<S, 4>,
#if HR_LEVEL >= 2
    tile<S, 5>, tile<S, 6>, tile<S, 7>, tile<S, 8>,  tile<S, 9>,  tile<S, 10>,
    tile<S, 11>, tile<S, 12>,
#endif
};

// x as the kernel wants it: per tile and group Sides, then values.
namespace {  // the linker must not share its functions between levels
struct Input {
  RowTiles tiles;
  int64_t row_bytes;
  char* data;

  Input(const hr_linear_args& args, int64_t first, int64_t rows)
      : tiles(rows, kRows),
        row_bytes(groups_of(args.weight) * (kSideBytes + args.weight.group / 4 * kInt4Quad)) {
    data = static_cast<char*>(hr::scratch(static_cast<size_t>(rows * row_bytes), 0));
    each_row(rows, args.x.columns, [&](int64_t row) {
      const RowBuffer buffer(groups_of(args.weight) * args.weight.group);
      buffer.read(args.x, first + row, args.x.columns);
      put_row(args.weight, buffer, row);
    });
  }
  char* tile(int64_t t) const { return data + tiles.begin(t) * row_bytes; }

  void put_row(const hr_weight& w, const RowBuffer& buffer, int64_t row) const {
    const int64_t t = tiles.holding(row), size = tiles.size(t), r = row - tiles.begin(t);
    char* to = tile(t);
    for (int64_t k = 0; k < buffer.width; k += w.group) {
      int32_t sum;
      const float scale = quantize(buffer.numbers + k, w.group, buffer.bytes, &sum);
      float* sides = reinterpret_cast<float*>(to);
      sides[r] = scale;
      sides[size + r] = scale * static_cast<float>(sum);
      const int32_t start = w.scaling == HR_SYMMETRIC ? -8 * sum : 0;
      memcpy(sides + 2 * size + r, &start, 4);
      to += size * kSideBytes;
      for (int64_t i = 0; i < w.group; i += 4, to += size * kInt4Quad) {
        place_quad(buffer.bytes + i, kInt4Quad, to + r * kInt4Quad);
      }
    }
  }
};
}  // namespace

static void linear_int4(const hr_linear_args& args, const hr_step& step) {
  const hr_weight& w = args.weight;
  const int64_t panel_bytes = groups_of(w) * group_bytes(w);
  each_part(args, step, [&](int64_t first, int64_t rows) {
    const Input input(args, first, rows);
    const auto block = [&](int64_t p, int64_t begin, int64_t end) {
      const char* panel = static_cast<const char*>(w.data) + p * panel_bytes;
      const Result result(args, p);
      for (int64_t t = begin; t < end; ++t) {
        alignas(64) float sums[kRows * HR_PANEL];
        const bool symmetric = w.scaling == HR_SYMMETRIC;
        const TileOf multiply = (symmetric ? kTiles<true> : kTiles<false>)[input.tiles.size(t)];
        multiply(w, panel, input.tile(t), sums);
        for (int64_t r = 0; r < input.tiles.size(t); ++r) {
          for (int j = 0; j < HR_PANEL; j += kLanes) {
            result.write(first + input.tiles.begin(t) + r, j, load(sums + r * HR_PANEL + j));
          }
        }
      }
    };
    const int64_t work = w.in * rows * HR_PANEL;
    each_block(panels_of(w), input.tiles, kRows * input.row_bytes, work, block);
  });
}

// ---- packing ------------------------------------------------------------------------------------

// What a panel holds of one output in one group.
struct Group {
  float scale, offset;
  const int8_t* values;
};

// 16 levels, the number farthest from zero at level 0 or 16: the scale is f16, the zero level 8.
static Group quantize_group(const float* x, int64_t count, int8_t* q) {
  float high = 0.0f, low = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    high = x[i] > high ? x[i] : high;
    low = x[i] < low ? x[i] : low;
  }
  const float farthest = high > -low ? high : low;
  const float wanted = farthest * -0.125f;
  f16 rounded;
  narrow(wanted > 65504.0f ? 65504.0f : wanted < -65504.0f ? -65504.0f : wanted, &rounded);
  const float scale = widen(rounded), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf level = round(load(x + i) * set(inverse)) + set(8.0f);
    const vi values = __builtin_convertvector(min(max(level, zero()), set(15.0f)), vi);
    for (int lane = 0; lane < kLanes; ++lane) q[i + lane] = static_cast<int8_t>(values[lane]);
  }
  return {scale, 0.0f, q};
}

// Element j of a header.
static void put_header(int32_t scaling, const Group& group, int64_t j, char* header) {
  f16* half = reinterpret_cast<f16*>(header);
  float* full = reinterpret_cast<float*>(header);
  if (scaling == HR_OFFSETS) {
    full[j] = group.scale;
    full[HR_PANEL + j] = group.offset;
    return;
  }
  narrow(group.scale, half + j);
  if (scaling == HR_ZEROS) {
    narrow(group.scale == 0.0f ? 0.0f : group.offset / group.scale, half + HR_PANEL + j);
  }
}

// Byte of a group with its input k of output j; the odd four inputs of eight lie in the high halves.
HR_INLINE int64_t place(int64_t k, int64_t j) { return k / 8 * kBlock + j * 4 + k % 4; }
HR_INLINE int shift_of(int64_t k) { return k % 8 < 4 ? 0 : 4; }

static void pack_row(const hr_pack_lowbit_args& args, const RowBuffer& buffer, int64_t row,
                     char* panel) {
  const hr_weight& w = args.weight;
  const int64_t groups = groups_of(w), j = row % HR_PANEL;
  const bool given = args.source.dtype == HR_I8;
  if (given) {
    memset(buffer.bytes, 0, static_cast<size_t>(buffer.width));
    memcpy(buffer.bytes, row_of<int8_t>(args.source, row), static_cast<size_t>(w.in));
  } else {
    buffer.read(args.source, row, w.in);
  }
  for (int64_t g = 0; g < groups; ++g, panel += group_bytes(w)) {
    int8_t* q = buffer.bytes + g * w.group;
    const int64_t at = row * groups + g;
    const Group group = given ? Group{args.scales[at], args.offsets ? args.offsets[at] : 0.0f, q}
                              : quantize_group(buffer.numbers + g * w.group, w.group, q);
    put_header(w.scaling, group, j, panel);
    char* bytes = panel + header_bytes(w);
    for (int64_t k = 0; k < w.group; ++k) {
      bytes[place(k, j)] = static_cast<char>(bytes[place(k, j)] | q[k] << shift_of(k));
    }
  }
}

static void pack_int4(const hr_pack_lowbit_args& args, const hr_step&) {
  const hr_weight w = args.weight;
  const int64_t panel_bytes = groups_of(w) * group_bytes(w);
  hr::parallel(panels_of(w), 1, [&](int64_t begin, int64_t end) {
    const RowBuffer buffer(groups_of(w) * w.group);
    for (int64_t p = begin; p < end; ++p) {
      char* panel = static_cast<char*>(w.data) + p * panel_bytes;
      memset(panel, 0, static_cast<size_t>(panel_bytes));
      for (int64_t j = 0; j < least(HR_PANEL, w.out - p * HR_PANEL); ++j) {
        pack_row(args, buffer, p * HR_PANEL + j, panel);
      }
    }
  });
}

static float value_of(const hr_weight& w, const char* panel, int64_t j, int64_t k) {
  const char* header = panel + k / w.group * group_bytes(w);
  const f16* half = reinterpret_cast<const f16*>(header);
  const float* full = reinterpret_cast<const float*>(header);
  const float scale = w.scaling == HR_OFFSETS ? full[j] : widen(half[j]);
  const float zero = w.scaling == HR_ZEROS ? widen(half[HR_PANEL + j]) : 8.0f;
  const float offset = w.scaling == HR_OFFSETS ? full[HR_PANEL + j] : scale * zero;
  const int byte = header[header_bytes(w) + place(k % w.group, j)];
  return static_cast<float>(byte >> shift_of(k) & 15) * scale - offset;
}

static void unpack_int4(const hr_unpack_args& args, const hr_step& step) {
  const hr_weight w = args.weight;
  const int64_t panel_bytes = groups_of(w) * group_bytes(w);
  unpack_rows(args, step, [&](int64_t row, int64_t k) {
    const char* panel = static_cast<const char*>(w.data) + row / HR_PANEL * panel_bytes;
    return value_of(w, panel, row % HR_PANEL, k);
  });
}

HR_OPERATOR(linear_int4, hr_linear_args)
HR_OPERATOR(pack_int4, hr_pack_lowbit_args)
HR_OPERATOR(unpack_int4, hr_unpack_args)

}  // namespace HR_NS
