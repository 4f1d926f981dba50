// Rows of logits: largest values, sums of exponentials, and the few tokens that matter.
//
// A row is cut into blocks at fixed places. One pass over memory keeps of each block its largest
// logit and the sum of exp((x - largest) / temperature); all else follows from these and from the
// few blocks whose largest logit says that they hold what is looked for. Part of the kernel files:
// the same rules as simd.h.
#pragma once
#include "types.h"

extern "C" float logf(float x);
extern "C" double log(double x);

namespace HR_NS {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kSegment = 1 << 14;  // logits worth handing to another thread

// Lane i of a mask (all ones or zero) as bit i.
HR_INLINE uint32_t bits_of(vi mask) {
#if HR_LEVEL >= 2
  return _mm512_movepi32_mask((__m512i)mask);
#elif HR_LEVEL == 1
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<uint32_t>(mask[i]) & 1) << i;
  return bits;
#endif
}

// `count` logits at x; lanes past them are -inf.
HR_INLINE vf take_logits(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  vf v = load_part(x, count);
  for (int64_t lane = count; lane < kLanes; ++lane) v[lane] = -kInfinity;
  return v;
}

// The blocks of one row.
struct Blocks {
  int64_t vocab;
  int64_t size;   // logits per block
  int64_t count;
  float* largest;  // NaN if the block has one
  float* sums;     // of exp((x - largest) / temperature)

  int64_t begin(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return block + 1 == count ? vocab : (block + 1) * size; }
};

// Small vocabularies get small blocks: there should be more of them than tokens looked for.
// (As powers of 2: a division takes as long as reading a block.)
inline int block_bits(int64_t vocab) { return vocab > 1 << 15 ? 8 : 6; }

inline int64_t block_size(int64_t vocab) { return 1ll << block_bits(vocab); }

inline int64_t block_count(int64_t vocab) {
  const int bits = block_bits(vocab);
  return (vocab + (1ll << bits) - 1) >> bits;
}

// The blocks of row `row`, whose numbers stand in `memory` [rows][2][count].
inline Blocks blocks_of(int64_t vocab, int64_t row, float* memory) {
  const int64_t count = block_count(vocab);
  float* own = memory + row * 2 * count;
  return {vocab, block_size(vocab), count, own, own + count};
}

inline float* memory_for_blocks(int64_t vocab, int64_t rows) {
  const int64_t floats = rows * 2 * block_count(vocab);
  return static_cast<float*>(hr::scratch(static_cast<size_t>(floats) * sizeof(float), 0));
}

// Whether a lane of a or b is NaN, in `seen`.
#if HR_LEVEL >= 2
typedef __mmask16 Odd;
HR_INLINE void look_for_nan(Odd& seen, vf a, vf b) {
  seen = _kor_mask16(seen, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q));
}
HR_INLINE bool any(Odd seen) { return seen != 0; }
#else
typedef vi Odd;
HR_INLINE void look_for_nan(Odd& seen, vf a, vf b) { seen = seen | (a != a) | (b != b); }
HR_INLINE bool any(Odd seen) { return bits_of(seen) != 0; }
#endif

inline float largest_in(const float* x, int64_t count) {
  vf most[2] = {set(-kInfinity), set(-kInfinity)};
  Odd odd[2] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      const vf a = load(x + i + 2 * s * kLanes), b = load(x + i + (2 * s + 1) * kLanes);
      most[s] = max(max(a, b), most[s]);  // what a NaN leaves does not matter
      look_for_nan(odd[s], a, b);
    }
  }
  for (; i < count; i += kLanes) {
    const vf v = take_logits(x + i, count - i);
    most[0] = max(v, most[0]);
    look_for_nan(odd[0], v, v);
  }
  return any(odd[0]) || any(odd[1]) ? __builtin_nanf("") : largest(max(most[0], most[1]));
}

// exp((x - top) * inverse) of `count` logits; `to` may be x.
inline void weigh(const float* x, int64_t count, float top, float inverse, float* to) {
  const vf tops = set(top), inverses = set(inverse);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    put(to + i, exp_falling((take_logits(x + i, n) - tops) * inverses), n);
  }
}

inline float sum_weights(const float* x, int64_t count, float top, float inverse) {
  const vf tops = set(top), inverses = set(inverse);
  vf sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
#pragma GCC unroll 2
    for (int s = 0; s < 2; ++s) {
      sums[s] = sums[s] + exp_falling((load(x + i + s * kLanes) - tops) * inverses);
    }
  }
  for (; i < count; i += kLanes) {
    sums[0] = sums[0] + exp_falling((take_logits(x + i, count - i) - tops) * inverses);
  }
  return sum(sums[0] + sums[1]);
}

// Fills blocks [first, last). With `inverse` 0 there are no sums.
inline void scan(const float* x, const Blocks& blocks, int64_t first, int64_t last,
                        float inverse) {
  for (int64_t b = first; b < last; ++b) {
    const float* own = x + blocks.begin(b);
    const int64_t count = blocks.end(b) - blocks.begin(b);
    const float top = largest_in(own, count);
    const bool finite = top - top == 0;
    blocks.largest[b] = top;
    blocks.sums[b] = finite && inverse != 0 ? sum_weights(own, count, top, inverse) : 0;
  }
}

// The same for blocks of whose logits only the largest is asked for: it stands in the first block.
inline void scan_together(const float* x, const Blocks& blocks, int64_t first, int64_t last) {
  const int64_t begin = blocks.begin(first);
  blocks.largest[first] = largest_in(x + begin, blocks.end(last - 1) - begin);
  for (int64_t b = first + 1; b < last; ++b) blocks.largest[b] = -kInfinity;
}

// The largest logit of the row, NaN if there is a NaN.
inline float largest_of(const Blocks& blocks) {
  return largest_in(blocks.largest, blocks.count);
}

// Makes the sums relative to `top`, the largest logit of the row; returns their sum.
inline double rescale(const Blocks& blocks, float top, float inverse) {
  for (int64_t b = 0; b < blocks.count; b += kLanes) {
    const int64_t n = blocks.count - b < kLanes ? blocks.count - b : kLanes;
    const vf factor = exp_falling((take_logits(blocks.largest + b, n) - set(top)) * set(inverse));
    put(blocks.sums + b, take(blocks.sums + b, n) * factor, n);
  }
  double total = 0;
  for (int64_t b = 0; b < blocks.count; ++b) total += blocks.sums[b];
  return total;
}

// A token that may be chosen.
struct Candidate {
  float x;
  float weight;
  int32_t id;
};

struct Candidates {
  Candidate* items;
  int64_t count;
};

// Tokens with bound <= x < limit in the order of ids, without weights; in scratch 1.
inline Candidates collect(const float* x, const Blocks& blocks, float bound,
                                 float limit = kInfinity) {
  int64_t most = 0;
  for (int64_t b = 0; b < blocks.count; ++b) most += blocks.largest[b] >= bound ? blocks.size : 0;
  Candidate* out = static_cast<Candidate*>(
      hr::scratch(static_cast<size_t>(most + 1) * sizeof(Candidate), 1));
  const vf bounds = set(bound), limits = set(limit);
  int64_t count = 0;
  for (int64_t b = 0; b < blocks.count; ++b) {
    if (!(blocks.largest[b] >= bound)) continue;
    const int64_t end = blocks.end(b);
    for (int64_t i = blocks.begin(b); i < end; i += kLanes) {
      const vf v = take_logits(x + i, end - i);
      uint32_t hits = bits_of((v >= bounds) & (v < limits));
      if (end - i < kLanes) hits &= (1u << (end - i)) - 1;
      for (; hits; hits &= hits - 1) {
        const int64_t id = i + __builtin_ctz(hits);
        out[count++] = {x[id], 0, static_cast<int32_t>(id)};
      }
    }
  }
  return {out, count};
}

// The largest value v for which the items with value >= v measure `limit` or more together; the
// smallest value if there is none. Reorders the items (at least one), none of them NaN.
template <class Item, class Value, class Measure>
inline float cut_at(Item* items, int64_t count, double limit, const Value& value,
                           const Measure& measure) {
  double above = 0;
  for (;;) {
    const float a = value(items[0]), b = value(items[count / 2]), c = value(items[count - 1]);
    const float pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    // Larger ones to the front, smaller ones to the back.
    int64_t front = 0, back = count;
    double larger = 0, equal = 0;
    for (int64_t i = 0; i < back;) {
      const Item item = items[i];
      if (value(item) > pivot) {
        larger += measure(item);
        items[i++] = items[front];
        items[front++] = item;
      } else if (value(item) < pivot) {
        items[i] = items[--back];
        items[back] = item;
      } else {
        equal += measure(item);
        ++i;
      }
    }
    if (front > 0 && above + larger >= limit) {
      count = front;
    } else if (above + larger + equal >= limit || back == count) {
      return pivot;
    } else {
      above += larger + equal;
      items += back;
      count -= back;
    }
  }
}

// A bound from below of the `rank`-th largest logit; -inf if there are not as many blocks.
inline float bound_of(const Blocks& blocks, int64_t rank) {
  if (rank > blocks.count) return -kInfinity;
  float* copy = static_cast<float*>(
      hr::scratch(static_cast<size_t>(blocks.count) * sizeof(float), 2));
  memcpy(copy, blocks.largest, static_cast<size_t>(blocks.count) * sizeof(float));
  const auto itself = [](float x) { return x; };
  const auto one = [](float) { return 1.0; };
  return cut_at(copy, blocks.count, static_cast<double>(rank), itself, one);
}

}  // namespace
}  // namespace HR_NS
