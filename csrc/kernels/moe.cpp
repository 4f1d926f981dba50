// router and moe: mixtures of experts (arXiv 2401.04088).
//
// Rows are sorted by expert, so that an expert's weights are read once for all its rows; an
// expert's sums do not depend on how many rows it has, and each token adds its experts in the order
// of its choice. Nothing depends on which other tokens there are.
#include "linear.h"
#include "types.h"

namespace HR_NS {

constexpr int64_t kMostTokens = 1024;  // sorted at once

// ---- router -------------------------------------------------------------------------------------

// The `count` largest keys, the largest first and the lower number among equals.
static void choose(const float* keys, int64_t experts, int64_t count, int32_t* ids) {
  for (int64_t r = 0; r < count; ++r) {
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      bool taken = false;
      for (int64_t i = 0; i < r; ++i) taken = taken || ids[i] == e;
      if (!taken && (best < 0 || keys[e] > keys[best])) best = e;
    }
    ids[r] = static_cast<int32_t>(best);
  }
}

// Leaves only the keys of the best groups; a group counts as much as its best keys together.
static void limit_groups(const hr_router_args& args, int64_t experts, float* keys) {
  const int64_t size = experts / args.groups;
  float totals[HR_MOST_GROUPS];
  int32_t best[HR_MOST_GROUPS];
  bool kept[HR_MOST_GROUPS] = {};
  for (int64_t g = 0; g < args.groups; ++g) {
    choose(keys + g * size, size, args.group_best, best);
    totals[g] = 0;
    for (int64_t i = 0; i < args.group_best; ++i) totals[g] += keys[g * size + best[i]];
  }
  choose(totals, args.groups, args.top_groups, best);
  for (int64_t i = 0; i < args.top_groups; ++i) kept[best[i]] = true;
  for (int64_t e = 0; e < experts; ++e) {
    if (!kept[e / size]) keys[e] = -__builtin_inff();
  }
}

// Logits to what is weighted with: sigmoids, or numerators of a softmax, whose sum is returned.
static float score(const hr_router_args& args, int64_t padded, float* scores) {
  if (args.sigmoid) {
    for (int64_t e = 0; e < padded; e += kLanes) {
      store(scores + e, set(1.0f) / (set(1.0f) + exp(zero() - load(scores + e))));
    }
    return 1.0f;
  }
  vf top = load(scores), total = zero();
  for (int64_t e = kLanes; e < padded; e += kLanes) top = max(top, load(scores + e));
  top = set(largest(top));
  for (int64_t e = 0; e < padded; e += kLanes) {
    store(scores + e, exp(load(scores + e) - top));
    total = total + load(scores + e);
  }
  return sum(total);
}

static void route(const hr_router_args& args, int64_t row, int64_t padded, float* scores,
                  float* keys) {
  const int64_t experts = args.logits.columns;
  int32_t* ids = args.ids + row * args.top_k;
  float* weights = row_of<float>(args.weights, row);
  load_row(args.logits, row, 0, experts, scores);
  for (int64_t e = experts; e < padded; ++e) scores[e] = -__builtin_inff();
  memcpy(keys, scores, static_cast<size_t>(experts) * 4);
  float total = score(args, padded, scores);
  if (args.bias) {
    for (int64_t e = 0; e < experts; ++e) keys[e] = scores[e] / total + args.bias[e];
  }
  if (args.groups > 1) limit_groups(args, experts, keys);
  choose(keys, experts, args.top_k, ids);
  if (args.renormalize) {
    total = 0;
    for (int64_t r = 0; r < args.top_k; ++r) total += scores[ids[r]];
  }
  for (int64_t r = 0; r < args.top_k; ++r) weights[r] = scores[ids[r]] / total * args.scale;
}

static void router(const hr_router_args& args, const hr_step& step) {
  const int64_t padded = (args.logits.columns + kLanes - 1) / kLanes * kLanes;
  hr::parallel(step.tokens, 16, [&](int64_t begin, int64_t end) {
    float* scores = static_cast<float*>(hr::scratch(static_cast<size_t>(padded) * 8, 3));
    for (int64_t row = begin; row < end; ++row) route(args, row, padded, scores, scores + padded);
  });
}

// ---- moe ----------------------------------------------------------------------------------------

struct Expert {
  int64_t begin, rows;   // of the sorted rows
  int64_t laid_out;      // bytes before its rows of x, or of the inner activations
  int64_t first_block;   // number of its first block
};

// Memory of one part of the tokens. `order` [rows]: token of each sorted row; `place` [tokens,
// top_k]: the sorted row of each choice, -1 of one that is not here.
struct Sorted {
  Expert* experts;
  int32_t *order, *place;
  char *inner, *outer;  // [rows, inner], [rows, hidden], of x's dtype
};

static int64_t lined_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static Sorted memory(const hr_moe_args& args, int64_t rows) {
  const int64_t size = args.x.dtype == HR_F32 ? 4 : 2;
  const int64_t experts = lined_up((args.experts + 1) * static_cast<int64_t>(sizeof(Expert)));
  const int64_t index = lined_up(rows * 4), inner = lined_up(rows * args.gates[0].out * size);
  const int64_t all = experts + 2 * index + inner + rows * args.y.columns * size;
  char* at = static_cast<char*>(hr::scratch(static_cast<size_t>(all), 3));
  char* const order = at + experts;
  return {reinterpret_cast<Expert*>(at), reinterpret_cast<int32_t*>(order),
          reinterpret_cast<int32_t*>(order + index), order + 2 * index, order + 2 * index + inner};
}

static void sort(const hr_moe_args& args, int64_t token, int64_t tokens, const Sorted& sorted) {
  const int32_t* ids = args.ids + token * args.top_k;
  const int64_t rows = tokens * args.top_k;
  Expert* experts = sorted.experts;
  for (int64_t e = 0; e <= args.experts; ++e) experts[e] = {0, 0, 0, 0};
  const auto here = [&](int64_t i) {
    return ids[i] >= args.first && ids[i] < args.first + args.experts;
  };
  for (int64_t i = 0; i < rows; ++i) {
    if (here(i)) ++experts[ids[i] - args.first].rows;
  }
  for (int64_t e = 0; e < args.experts; ++e) {
    experts[e + 1].begin = experts[e].begin + experts[e].rows;
    experts[e].rows = 0;
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (!here(i)) {
      sorted.place[i] = -1;
      continue;
    }
    Expert& expert = experts[ids[i] - args.first];
    const int64_t at = expert.begin + expert.rows++;
    sorted.order[at] = static_cast<int32_t>(token + i / args.top_k);
    sorted.place[i] = static_cast<int32_t>(at);
  }
}

static Input input_of(const Expert& expert, const hr_weight& weight, int32_t dtype, char* data) {
  Input input(expert.rows, weight, dtype);
  input.data = data + expert.laid_out;
  return input;
}

// One product of all experts: lays out rows `which` of x, then calls body(expert, input, block).
template <class Body>
static void each_block(const hr_moe_args& args, const hr_weight* weights, const hr_rows& x,
                       const int32_t* which, Expert* experts, const Body& body) {
  int64_t bytes = 0, blocks = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    const Input input = input_of(experts[e], weights[e], x.dtype, nullptr);
    experts[e].laid_out = bytes;
    experts[e].first_block = blocks;
    bytes += input.bytes();
    if (experts[e].rows > 0) blocks += Cut(input, weights[e]).count();
  }
  experts[args.experts].first_block = blocks;
  char* data = static_cast<char*>(hr::scratch(static_cast<size_t>(bytes), 0));
  hr::parallel(args.experts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t first = experts[e].begin;
      lay_out(x, first, which ? which + first : nullptr,
              input_of(experts[e], weights[e], x.dtype, data));
    }
  });
  hr::parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, e = 0; i < end; ++i) {
      while (experts[e + 1].first_block <= i) ++e;
      const Input input = input_of(experts[e], weights[e], x.dtype, data);
      body(e, input, Cut(input, weights[e]).block(i - experts[e].first_block));
    }
  });
}

template <class T>
static void combine(const hr_moe_args& args, int64_t token, int64_t tokens, const Sorted& sorted) {
  const int64_t columns = args.y.columns, top_k = args.top_k;
  const T* outer = reinterpret_cast<const T*>(sorted.outer);
  hr::parallel(tokens, 1 + (1 << 14) / (columns * top_k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* weights = row_of<float>(args.weights, token + i);
      const int32_t* place = sorted.place + i * top_k;
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t n = columns - c < kLanes ? columns - c : kLanes;
        vf sum = zero();
        for (int64_t r = 0; r < top_k; ++r) {
          if (place[r] < 0) continue;
          sum = fma(set(weights[r]), take(outer + place[r] * columns + c, n), sum);
        }
        put(row_of<T>(args.y, token + i) + c, sum, n);
      }
    }
  });
}

static void part(const hr_moe_args& args, int64_t token, int64_t tokens) {
  const int64_t inner_size = args.gates[0].out;
  const Sorted sorted = memory(args, tokens * args.top_k);
  sort(args, token, tokens, sorted);
  const hr_rows inner{sorted.inner, inner_size, inner_size, args.x.dtype};
  const hr_rows outer{sorted.outer, args.y.columns, args.y.columns, args.x.dtype};
  Expert* experts = sorted.experts;
  const auto gated = [&](int64_t e, const Input& input, const Block& block) {
    gated_block({args.x, inner, args.gates[e], args.ups[e], nullptr, 0,
                 static_cast<int32_t>(args.activation)},
                input, block, experts[e].begin);
  };
  each_block(args, args.gates, args.x, sorted.order, experts, gated);
  const auto down = [&](int64_t e, const Input& input, const Block& block) {
    linear_block({inner, outer, args.downs[e], nullptr, 0, HR_TOKENS, hr_rows{}}, input, block,
                 experts[e].begin);
  };
  each_block(args, args.downs, inner, nullptr, experts, down);
  with_type(args.x.dtype, [&](auto type) { combine<decltype(type)>(args, token, tokens, sorted); });
}

static void moe(const hr_moe_args& args, const hr_step& step) {
  for (int64_t token = 0; token < step.tokens; token += kMostTokens) {
    const int64_t left = step.tokens - token;
    part(args, token, left < kMostTokens ? left : kMostTokens);
  }
}

HR_OPERATOR(router, hr_router_args)
HR_OPERATOR(moe, hr_moe_args)

}  // namespace HR_NS
