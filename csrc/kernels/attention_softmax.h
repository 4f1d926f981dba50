// The softmax of attention over one span of positions, and how spans are joined (as in online
// softmax, arXiv 1805.02867). Part of the kernel files: the same rules as simd.h.
//
// Invariant: the weight of a position is kept by lane `position % kLanes`, in the order of
// positions; a position out of sight adds exactly zero.
#pragma once
#include "types.h"

namespace HR_NS {

constexpr int kSpan = 256;          // positions of one softmax
constexpr float kNothing = -1e30f;  // a maximum before any key was seen

// What a row has seen: the largest score, the sum of weights relative to it. Its mix is elsewhere.
struct Seen {
  float most;
  float total;
};

// The positions of a span, relative to its begin, that one row sees; none if low > high.
struct Sight {
  int64_t low, high;
};

// What is done to scores before the softmax: scales of keys and values may be null.
struct Scaling {
  float soft_cap;  // 0: none
  float slope;     // 0: none
  const float* keys;
  const float* values;
};

static inline void hide(float* scores, int64_t first, int64_t end, Sight sight) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vi low = set_int(static_cast<int32_t>(sight.low));
  const vi high = set_int(static_cast<int32_t>(sight.high));
  for (int64_t j = first; j < end; j += kLanes) {
    const vi at = lane + static_cast<int32_t>(j);
    const vf s = load(scores + j);
    store(scores + j, select((at >= low) & (at <= high), s, set(-__builtin_inff())));
  }
}

// `newest`: the position of the query, see Sight.
static inline void scale_scores(float* scores, int64_t first, int64_t end, int64_t newest,
                                const Scaling& scaling) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int64_t j = first; j < end; j += kLanes) {
    vf s = load(scores + j);
    if (scaling.keys) s = s * load(scaling.keys + j);
    if (scaling.soft_cap > 0) {
      s = set(scaling.soft_cap) * tanh(s * set(1 / scaling.soft_cap));
    }
    if (scaling.slope != 0) {
      const vi distance = lane + static_cast<int32_t>(j - newest);
      s = fma(set(scaling.slope), __builtin_convertvector(distance, vf), s);
    }
    store(scores + j, s);
  }
}

static inline float largest_score(const float* scores, int64_t first, int64_t end) {
  vf most[2] = {set(kNothing), set(kNothing)};
  int64_t j = first;
  for (; j + 2 * kLanes <= end; j += 2 * kLanes) {
    most[0] = max(most[0], load(scores + j));
    most[1] = max(most[1], load(scores + j + kLanes));
  }
  if (j < end) most[0] = max(most[0], load(scores + j));
  return largest(max(most[0], most[1]));
}

// scores[first .. end) of one row, multiples of kLanes, become weights; those out of sight are 0.
static inline Seen weigh(float* scores, int64_t first, int64_t end, Sight sight,
                         const Scaling& scaling) {
  if (scaling.keys || scaling.soft_cap > 0 || scaling.slope != 0) {
    scale_scores(scores, first, end, sight.high, scaling);
  }
  const int64_t whole = (sight.low + kLanes - 1) / kLanes * kLanes;
  const int64_t rest = (sight.high + 1) / kLanes * kLanes;
  if (whole > first) hide(scores, first, whole < end ? whole : end, sight);
  if (rest < end) hide(scores, rest > first ? rest : first, end, sight);
  const float top = largest_score(scores, first, end);
  const vf tops = set(top);
  vf total = zero();
  for (int64_t j = first; j < end; j += kLanes) {
    vf weight = exp_falling(load(scores + j) - tops);
    total = total + weight;
    if (scaling.values) weight = weight * load(scaling.values + j);
    store(scores + j, weight);
  }
  return {top, sum(total)};
}

// Adds what a row saw in a span to what it saw before.
static inline void join(Seen& seen, float* mix, const Seen& span, const float* span_mix,
                        int64_t width) {
  const float top = seen.most > span.most ? seen.most : span.most;
  const float before = exp(set(seen.most - top))[0], now = exp(set(span.most - top))[0];
  seen.total = seen.total * before + span.total * now;
  seen.most = top;
  for (int64_t d = 0; d < width; d += kLanes) {
    store(mix + d, fma(load(mix + d), set(before), load(span_mix + d) * set(now)));
  }
}

}  // namespace HR_NS
