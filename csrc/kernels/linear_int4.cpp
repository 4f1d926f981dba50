// linear_int4: weights of 4 or 8 bits with a scale per group of inputs, x quantized to int8 with a
// scale per row and group. Values of 4 bits are numbers or, of mxfp4, places in a table.
//
// y = sum over groups of x_scale * (scale * dot - offset * sum_q) + bias, where dot = sum of w * q and
// sum_q are exact integers. A scale of x per group keeps one outlier from costing all inputs of its
// row their precision, for one multiplication per group. Groups are added in rising order, one
// accumulator per output element, whatever the number of rows. What makes bytes unsigned, times
// sum_q, is taken off the integer at no cost: the sum of products starts there.
#include "dot_int8.h"
#include "lowbit.h"

namespace HR_NS {

// The register tile: kRows rows of x by kVectors vectors of outputs.
constexpr int kVectors = 2;
constexpr int kRows = HR_LEVEL >= 2 ? 12 : 4;
constexpr int kTile = kVectors * kLanes;
constexpr int64_t kBlock = 4 * HR_PANEL;  // bytes of a panel for eight inputs

// What the bytes of a weight are: 4 bits with zero at 8, or with a zero of its own, places in the
// table of e2m1, or 8 bits.
enum Form { kEven, kOdd, kTable, kEight };
constexpr int kForms = 4;

HR_INLINE Form form_of(const hr_weight& w) {
  if (w.dtype == HR_G8) return kEight;
  if (w.dtype == HR_MX4) return kTable;
  return w.scaling == HR_SYMMETRIC ? kEven : kOdd;
}
// What was added to a value to make its byte unsigned.
HR_INLINE int32_t zero_of(Form form) {
  constexpr int32_t zeros[kForms] = {8, 0, 12, 128};
  return zeros[form];
}
// Bytes of x for four inputs; blocks of eight inputs as bytes; how many's products fit 16 bits.
HR_INLINE constexpr int64_t quad_of(Form form) { return form == kEight ? kInt8Quad : kInt4Quad; }
HR_INLINE constexpr int64_t block_of(Form form) { return form == kEight ? 2 * kBlock : kBlock; }
HR_INLINE constexpr int64_t blocks_in_16_bits(Form form) { return form == kTable ? 2 : 4; }

// Twice the values of e2m1 (OCP microscaling), plus 12.
alignas(16) static const uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                              12, 11, 10, 9,  8,  6,  4,  0};

// Four values of 4 bits per lane as what they stand for.
template <Form F>
HR_INLINE vu looked_up(vu nibbles) {
  if constexpr (F != kTable) return nibbles;
#if HR_LEVEL >= 2
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)kE2m1));
  return (vu)_mm512_shuffle_epi8(table, (__m512i)nibbles);
#elif HR_LEVEL == 1
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)kE2m1));
  return (vu)_mm256_shuffle_epi8(table, (__m256i)nibbles);
#else
  uint8_t bytes[4 * kLanes];
  memcpy(bytes, &nibbles, sizeof bytes);
  for (uint8_t& byte : bytes) byte = kE2m1[byte];
  return load_words(bytes);
#endif
}
template <Form F>
HR_INLINE vu low_half(vu raw) { return looked_up<F>(raw & 0x0f0f0f0fu); }
template <Form F>
HR_INLINE vu high_half(vu raw) { return looked_up<F>((raw >> 4) & 0x0f0f0f0fu); }

HR_INLINE int64_t groups_of(const hr_weight& w) { return (w.in + w.group - 1) / w.group; }
HR_INLINE int64_t header_bytes(const hr_weight& w) {  // scales of a panel's group, and the rest
  constexpr int64_t bytes[] = {2, 4, 8, 4};  // by hr_scaling
  return HR_PANEL * bytes[w.scaling];
}
HR_INLINE int64_t group_bytes(const hr_weight& w) {
  return header_bytes(w) + w.group / 8 * block_of(form_of(w));
}

// One group of x in one tile, beside which lie the values: [2 * blocks][R] quads.
template <int R>
struct Sides {
  float scale[R];  // of x
  float sum[R];    // scale * sum_q
  int32_t start[R];  // -zero_of(form) * sum_q
};
constexpr int64_t kSideBytes = 12;  // of one row

// Bytes of eight inputs, four by four.
template <Form F>
HR_INLINE void read_block(const char* w, vu (&low)[kVectors], vu (&high)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    const vu raw = load_words(w + v * 4 * kLanes);
    low[v] = F == kEight ? raw : low_half<F>(raw);
    high[v] = F == kEight ? load_words(w + kBlock + v * 4 * kLanes) : high_half<F>(raw);
  }
  prefetch(w + kAhead);
  prefetch(w + kAhead + 64);
}

#if HR_LEVEL >= 3
// Calls finish(r, v, start + products of `blocks` blocks).
template <Form F, int R, class Finish>
HR_INLINE void multiply_group(const char* w, const char* x, int64_t blocks, const int32_t* start,
                              const Finish& finish) {
  vi sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = set_int(start[r]);
  }
  constexpr int64_t quad = quad_of(F);
  for (; blocks > 0; --blocks, w += block_of(F), x += 2 * R * quad) {
    vu low[kVectors], high[kVectors];
    read_block<F>(w, low, high);
    for (int r = 0; r < R; ++r) {
      const vi s = repeat(x + r * quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot4(sum[r][v], low[v], s);
    }
    for (int r = 0; r < R; ++r) {
      const vi s = repeat(x + (R + r) * quad);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = dot4(sum[r][v], high[v], s);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) finish(r, v, sum[r][v]);
  }
}
#else
// part [R][kVectors] = products of so few blocks that they fit 16 bits.
template <Form F, int R>
HR_INLINE void multiply_blocks(const char* w, const char* x, int64_t blocks,
                               vs (&part)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) part[r][v] = vs{};
  }
  for (; blocks > 0; --blocks, w += kBlock, x += 2 * R * kInt4Quad) {
    vu four[kVectors];
    for (int v = 0; v < kVectors; ++v) four[v] = low_half<F>(load_words(w + v * 4 * kLanes));
    prefetch(w + kAhead);
    prefetch(w + kAhead + 64);
    for (int r = 0; r < R; ++r) add_nibbles(part[r], four, x + r * kInt4Quad);
    for (int v = 0; v < kVectors; ++v) four[v] = high_half<F>(load_words(w + v * 4 * kLanes));
    for (int r = 0; r < R; ++r) add_nibbles(part[r], four, x + (R + r) * kInt4Quad);
  }
}

// The same of values of 8 bits, which fit no 16.
template <int R, class Finish>
HR_INLINE void multiply_eights(const char* w, const char* x, int64_t blocks, const int32_t* start,
                               const Finish& finish) {
  vi sum[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = set_int(start[r]);
  }
  for (int64_t quads = 2 * blocks; quads > 0; --quads, w += kBlock, x += R * kInt8Quad) {
    prefetch(w + kAhead);
    for (int v = 0; v < kVectors; ++v) {
      const vu raw = load_words(w + v * 4 * kLanes);
      const vs even = even_bytes(raw), odd = odd_bytes(raw);
      for (int r = 0; r < R; ++r) {
        const char* quad = x + r * kInt8Quad;
        sum[r][v] += pair_dot(even, (vs)repeat(quad)) + pair_dot(odd, (vs)repeat(quad + 4));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) finish(r, v, sum[r][v]);
  }
}

// Calls finish(r, v, start + products of `blocks` blocks). What does not fit 16 bits at once is
// added up in memory: registers are for sums of 16 bits.
template <Form F, int R, class Finish>
HR_INLINE void multiply_group(const char* w, const char* x, int64_t blocks, const int32_t* start,
                              const Finish& finish) {
  if constexpr (F == kEight) return multiply_eights<R>(w, x, blocks, start, finish);
  constexpr int64_t kMost = blocks_in_16_bits(F);
  alignas(64) int32_t before[R * kTile];
  vs part[R][kVectors];
  const bool several = blocks > kMost;
  for (int64_t done = 0; blocks > kMost; blocks -= kMost, done += kMost) {
    multiply_blocks<F, R>(w, x, kMost, part);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        vi* sum = reinterpret_cast<vi*>(before + r * kTile + v * kLanes);
        *sum = pair_dot(part[r][v], vs{} + 1) + (done > 0 ? *sum : set_int(start[r]));
      }
    }
    w += kMost * kBlock, x += kMost * 2 * R * kInt4Quad;
  }
  multiply_blocks<F, R>(w, x, blocks, part);
  if (several) {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const vi sum = *reinterpret_cast<const vi*>(before + r * kTile + v * kLanes);
        finish(r, v, pair_dot(part[r][v], vs{} + 1) + sum);
      }
    }
  } else {
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        finish(r, v, pair_dot(part[r][v], vs{} + 1) + set_int(start[r]));
      }
    }
  }
}
#endif

// Scales and offsets of kLanes outputs from j on; 0 where there are none.
template <Form F>
HR_INLINE void read_header(int32_t scaling, const char* header, int j, vf* scale, vf* offset) {
  const f16* half = reinterpret_cast<const f16*>(header) + j;
  const float* full = reinterpret_cast<const float*>(header) + j;
  *offset = zero();
  if constexpr (F == kTable) {
    *scale = load(reinterpret_cast<const bf16*>(header) + j);
  } else if (F == kEven || scaling == HR_SYMMETRIC || scaling == HR_ZEROS) {
    *scale = load(half);
    if (F != kEven && scaling == HR_ZEROS) *offset = *scale * load(half + HR_PANEL);
  } else {
    *scale = load(full);
    if (scaling == HR_OFFSETS) *offset = load(full + HR_PANEL);
  }
}

// One tile in one panel: c [R, HR_PANEL] = sums of all groups.
template <Form F, int R>
static void tile(const hr_weight& w, const char* panel, const char* x, float* c) {
  const int64_t groups = groups_of(w), header = header_bytes(w), blocks = w.group / 8;
  const bool offsets = F == kOdd || (F == kEight && w.scaling != HR_SYMMETRIC);
  for (int j = 0; j < R * HR_PANEL; j += kLanes) store(c + j, zero());
  for (int64_t g = 0; g < groups; ++g, panel += header + blocks * block_of(F)) {
    const Sides<R>& side = *reinterpret_cast<const Sides<R>*>(x);
    x += sizeof side;
    for (int j = 0; j < HR_PANEL; j += kTile) {
      vf scale[kVectors], offset[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        read_header<F>(w.scaling, panel, j + v * kLanes, scale + v, offset + v);
      }
      const auto add = [&](int r, int v, vi dot) {
        float* sum = c + r * HR_PANEL + j + v * kLanes;
        const vf scaled = __builtin_convertvector(dot, vf) * set(side.scale[r]);
        vf total = fma(scaled, scale[v], load(sum));
        if (offsets) total = fma(set(-side.sum[r]), offset[v], total);
        store(sum, total);
      };
      multiply_group<F, R>(panel + header + 4 * j, x, blocks, side.start, add);
    }
    x += 2 * blocks * R * quad_of(F);
  }
}

using TileOf = void (*)(const hr_weight&, const char*, const char*, float*);
template <Form F>
static constexpr TileOf kTiles[] = {
    nullptr,    tile<F, 1>, tile<F, 2>, tile<F, 3>,  tile<F, 4>,
#if HR_LEVEL >= 2
    tile<F, 5>, tile<F, 6>, tile<F, 7>, tile<F, 8>,  tile<F, 9>,  tile<F, 10>,
    tile<F, 11>, tile<F, 12>,
#endif
};
static constexpr const TileOf* kTilesOf[kForms] = {kTiles<kEven>, kTiles<kOdd>, kTiles<kTable>,
                                                   kTiles<kEight>};

// x as the kernel wants it: per tile and group Sides, then values.
namespace {  // the linker must not share its functions between levels
struct Input {
  RowTiles tiles;
  int64_t row_bytes;
  char* data;

  Input(const hr_linear_args& args, int64_t first, int64_t rows)
      : tiles(rows, kRows),
        row_bytes(groups_of(args.weight) *
                  (kSideBytes + args.weight.group / 4 * quad_of(form_of(args.weight)))) {
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
    const int64_t quad = quad_of(form_of(w));
    char* to = tile(t);
    for (int64_t k = 0; k < buffer.width; k += w.group) {
      int32_t sum;
      const float scale = quantize(buffer.numbers + k, w.group, buffer.bytes, &sum);
      float* sides = reinterpret_cast<float*>(to);
      sides[r] = scale;
      sides[size + r] = scale * static_cast<float>(sum);
      const int32_t start = -zero_of(form_of(w)) * sum;
      memcpy(sides + 2 * size + r, &start, 4);
      to += size * kSideBytes;
      place_quads(buffer.bytes, w.group / 4, quad, to + r * quad, size * quad);
      to += w.group / 4 * size * quad;
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
        const int64_t row = input.tiles.begin(t), size = input.tiles.size(t);
        alignas(64) float sums[kRows * HR_PANEL];
        result.expect(first + row, size);
        kTilesOf[form_of(w)][size](w, panel, input.tile(t), sums);
        result.write(first + row, size, sums);
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
static void put_header(const hr_weight& w, const Group& group, int64_t j, char* header) {
  f16* half = reinterpret_cast<f16*>(header);
  float* full = reinterpret_cast<float*>(header);
  if (w.scaling == HR_OFFSETS || w.scaling == HR_WIDE) {
    full[j] = group.scale;
    if (w.scaling == HR_OFFSETS) full[HR_PANEL + j] = group.offset;
    return;
  }
  if (w.dtype == HR_MX4) {  // the table has twice the values
    narrow(0.5f * group.scale, reinterpret_cast<bf16*>(header) + j);
    return;
  }
  narrow(group.scale, half + j);
  if (w.scaling == HR_ZEROS) {
    narrow(group.scale == 0.0f ? 0.0f : group.offset / group.scale, half + HR_PANEL + j);
  }
}

// Byte of a group with its input k of output j; of 4 bits the odd four inputs of eight lie in the
// high halves.
HR_INLINE int64_t place(const hr_weight& w, int64_t k, int64_t j) {
  return k / (w.dtype == HR_G8 ? 4 : 8) * kBlock + j * 4 + k % 4;
}
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
    put_header(w, group, j, panel);
    char* bytes = panel + header_bytes(w);
    for (int64_t k = 0; k < w.group; ++k) {
      char& byte = bytes[place(w, k, j)];
      byte = static_cast<char>(w.dtype == HR_G8 ? q[k] + 128 : byte | q[k] << shift_of(k));
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
  const uint8_t byte =
      static_cast<uint8_t>(header[header_bytes(w) + place(w, k % w.group, j)]);
  if (w.dtype == HR_MX4) {
    const float scale = widen(reinterpret_cast<const bf16*>(header)[j]);
    return static_cast<float>(kE2m1[byte >> shift_of(k) & 15] - 12) * scale;
  }
  const bool wide = w.scaling == HR_OFFSETS || w.scaling == HR_WIDE;
  const float scale = wide ? full[j] : widen(half[j]);
  float offset = w.dtype == HR_I4 ? scale * 8.0f : 0.0f;
  if (w.scaling == HR_ZEROS) offset = scale * widen(half[HR_PANEL + j]);
  if (w.scaling == HR_OFFSETS) offset = full[HR_PANEL + j];
  const int value = w.dtype == HR_G8 ? byte - 128 : byte >> shift_of(k) & 15;
  return static_cast<float>(value) * scale - offset;
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
