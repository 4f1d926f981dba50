// router and moe: mixtures of experts (arXiv 2401.04088).
//
// Rows are sorted by expert, so that an expert's weights are read once for all its rows; an
// expert's sums do not depend on how many rows it has, and each token adds its experts in the order
// of its choice. Nothing depends on which other tokens there are. Experts of float weights share the
// threads' work; of others the linear operators are called, one expert after another.
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

// SparseMixer (arXiv 2409.12136): the best expert is weighed against those near it, and so is the
// best of those that are left.
static void mix_sparsely(const hr_router_args& args, const float* scores, const int32_t* ids,
                         float* weights) {
  for (int64_t r = 0; r < args.top_k; ++r) {
    const float best = scores[ids[r]];
    float total = 0;
    for (int64_t e = 0; e < args.logits.columns; ++e) {
      bool out = false;
      for (int64_t i = 0; i < r; ++i) out = out || ids[i] == e;
      const float size = __builtin_fabsf(scores[e]), most = size > best ? size : best;
      if (!out && !((best - scores[e]) / most > 2 * args.jitter)) {
        total += exp(set(scores[e] - best))[0];
      }
    }
    weights[r] = 1 / total * args.scale;
  }
}

static void route(const hr_router_args& args, int64_t row, int64_t padded, float* scores,
                  float* keys) {
  const int64_t experts = args.logits.columns;
  int32_t* ids = args.ids + row * args.top_k;
  float* weights = row_of<float>(args.weights, row);
  load_row(args.logits, row, 0, experts, scores);
  if (args.jitter > 0) {
    choose(scores, experts, args.top_k, ids);
    return mix_sparsely(args, scores, ids, weights);
  }
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
  // Of x's dtype: [rows, inner], [rows, hidden]; where not all weights are floats, or weights of
  // choices are on the input, x itself [rows, hidden], and in the first case [rows, gate | up] and
  // the inputs of a matrix in its own order.
  char *inner, *outer, *x, *gate_up, *ordered;
};

static int64_t lined_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// The order of inputs of matrix e of the gates (0), ups (1) or downs (2); null: as they are.
static const int64_t* order_of(const hr_moe_args& args, int64_t kind, int64_t e) {
  return args.orders ? args.orders[kind * args.experts + e] : nullptr;
}

// The most inputs that any matrix takes in an order of its own.
static int64_t widest_order(const hr_moe_args& args) {
  const hr_weight* const all[] = {args.gates, args.ups, args.downs};
  int64_t widest = 0;
  for (int64_t kind = 0; kind < 3; ++kind) {
    for (int64_t e = 0; e < args.experts; ++e) {
      const int64_t in = order_of(args, kind, e) ? all[kind][e].in : 0;
      widest = in > widest ? in : widest;
    }
  }
  return widest;
}

static Sorted memory(const hr_moe_args& args, int64_t rows, bool floats) {
  const int64_t size = args.x.dtype == HR_F32 ? 4 : 2;
  const int64_t experts = lined_up((args.experts + 1) * static_cast<int64_t>(sizeof(Expert)));
  const int64_t index = lined_up(rows * 4), inner = lined_up(rows * args.inner * size);
  const int64_t outer = lined_up(rows * args.y.columns * size);
  const int64_t x = floats && !args.on_input ? 0 : lined_up(rows * args.x.columns * size);
  const int64_t gate_up = floats ? 0 : 2 * inner, ordered = rows * widest_order(args) * size;
  const int64_t all = experts + 2 * index + inner + outer + x + gate_up + ordered;
  char* at = static_cast<char*>(hr::scratch(static_cast<size_t>(all), 3));
  char* const order = at + experts;
  char* const first = order + 2 * index;
  return {reinterpret_cast<Expert*>(at), reinterpret_cast<int32_t*>(order),
          reinterpret_cast<int32_t*>(order + index), first, first + inner, first + inner + outer,
          first + inner + outer + x, first + inner + outer + x + gate_up};
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

// Sorted rows of x as they are.
static void gather_inputs(const hr_moe_args& args, int64_t rows, const Sorted& sorted) {
  const int64_t size = args.x.dtype == HR_F32 ? 4 : 2, bytes = args.x.columns * size;
  hr::parallel(rows, 1 + (1 << 15) / bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* const row =
          static_cast<const char*>(args.x.data) + sorted.order[i] * args.x.stride * size;
      memcpy(sorted.x + i * bytes, row, static_cast<size_t>(bytes));
    }
  });
}

// Sorted rows of x, each times the weight of its choice.
template <class T>
static void weigh_inputs(const hr_moe_args& args, int64_t token, int64_t tokens,
                         const Sorted& sorted) {
  const int64_t columns = args.x.columns, top_k = args.top_k;
  T* weighed = reinterpret_cast<T*>(sorted.x);
  hr::parallel(tokens, 1 + (1 << 14) / (columns * top_k + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      if (sorted.place[i] < 0) continue;
      const int64_t row = token + i / top_k;
      const vf weight = set(row_of<float>(args.weights, row)[i % top_k]);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t n = columns - c < kLanes ? columns - c : kLanes;
        put(weighed + sorted.place[i] * columns + c, weight * take(row_of<T>(args.x, row) + c, n),
            n);
      }
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
          const vf weight = set(args.on_input ? 1.0f : weights[r]);
          sum = fma(weight, take(outer + place[r] * columns + c, n), sum);
        }
        put(row_of<T>(args.y, token + i) + c, sum, n);
      }
    }
  });
}

// Rows of the bias of expert e, null if there is none.
static const float* bias_of(const float* biases, int64_t e, int64_t size) {
  return biases ? biases + e * size : nullptr;
}

static hr_rows sorted_x(const hr_moe_args& args, const Sorted& sorted) {
  return {sorted.x, args.x.columns, args.x.columns, args.x.dtype};
}

static void float_experts(const hr_moe_args& args, const Sorted& sorted, const hr_rows& inner,
                          const hr_rows& outer) {
  Expert* experts = sorted.experts;
  const hr_rows x = args.on_input ? sorted_x(args, sorted) : args.x;
  const auto gated = [&](int64_t e, const Input& input, const Block& block) {
    gated_block({x, inner, args.gates[e], args.ups[e],
                 bias_of(args.gate_up_bias, e, 2 * args.inner), HR_F32, args.activation, args.alpha,
                 args.limit},
                input, block, experts[e].begin);
  };
  each_block(args, args.gates, x, args.on_input ? nullptr : sorted.order, experts, gated);
  const auto down = [&](int64_t e, const Input& input, const Block& block) {
    linear_block({inner, outer, args.downs[e], bias_of(args.down_bias, e, outer.columns), HR_F32,
                  HR_TOKENS, hr_rows{}},
                 input, block, experts[e].begin);
  };
  each_block(args, args.downs, inner, nullptr, experts, down);
}

// The operator that multiplies with a weight.
static hr::Kernel linear_of(const hr_weight& weight) {
  const char* const names[] = {"linear",     "linear",      "linear",      "linear_int8",
                               "linear_fp8", "linear_int4", "linear_int4", "linear_int4",
                               "linear_fp8"};
  return hr::kernel_of(hr_operator(names[weight.dtype], sizeof(hr_linear_args)));
}

static hr_rows rows_from(const hr_rows& rows, int64_t first) {
  const int64_t size = rows.dtype == HR_F32 ? 4 : 2;
  return {static_cast<char*>(rows.data) + first * rows.stride * size, rows.stride, rows.columns,
          rows.dtype};
}

// x with the columns that matrix e of a kind takes.
static hr_rows taken(const hr_moe_args& args, int64_t kind, int64_t e, int64_t in, const hr_rows& x,
                     const hr_step& step, const Sorted& sorted) {
  const int64_t* order = order_of(args, kind, e);
  if (!order) return x;
  const hr_columns_args columns{x, {sorted.ordered, in, in, x.dtype}, order};
  hr::kernel_of(hr_operator("columns", sizeof columns))(&columns, step);
  return columns.y;
}

// One product of all experts, each with its sorted rows; biases lie `apart` from expert to expert.
static void each_expert(const hr_moe_args& args, int64_t kind, const float* biases, int64_t apart,
                        const hr_rows& x, const hr_rows& y, const Sorted& sorted) {
  const hr_weight* const all[] = {args.gates, args.ups, args.downs};
  for (int64_t e = 0; e < args.experts; ++e) {
    const Expert& expert = sorted.experts[e];
    if (expert.rows == 0) continue;
    const hr_weight& weight = all[kind][e];
    hr_step step{};
    step.tokens = expert.rows;
    const hr_rows own = taken(args, kind, e, weight.in, rows_from(x, expert.begin), step, sorted);
    const hr_linear_args linear{own,    rows_from(y, expert.begin), weight, bias_of(biases, e, apart),
                                HR_F32, HR_TOKENS,                  hr_rows{}};
    linear_of(weight)(&linear, step);
  }
}

static void single_experts(const hr_moe_args& args, int64_t rows, const Sorted& sorted,
                            const hr_rows& inner, const hr_rows& outer) {
  const hr_rows x = sorted_x(args, sorted);
  const int64_t width = args.inner, size = args.x.dtype == HR_F32 ? 4 : 2;
  const hr_rows gate_up{sorted.gate_up, 2 * width, 2 * width, args.x.dtype};
  const hr_rows gate{sorted.gate_up, 2 * width, width, args.x.dtype};
  const hr_rows up{sorted.gate_up + width * size, 2 * width, width, args.x.dtype};
  const float* up_bias = args.gate_up_bias ? args.gate_up_bias + width : nullptr;
  each_expert(args, 0, args.gate_up_bias, 2 * width, x, gate, sorted);
  each_expert(args, 1, up_bias, 2 * width, x, up, sorted);
  const hr_gated_args gated{gate_up, inner, args.activation, args.alpha, args.limit};
  hr_step step{};
  step.tokens = rows;
  hr::kernel_of(hr_operator("gated", sizeof gated))(&gated, step);
  each_expert(args, 2, args.down_bias, outer.columns, inner, outer, sorted);
}

static bool all_floats(const hr_moe_args& args) {
  bool floats = true;
  const hr_weight* const all[] = {args.gates, args.ups, args.downs};
  for (const hr_weight* weights : all) {
    for (int64_t e = 0; e < args.experts; ++e) floats = floats && weights[e].dtype <= HR_F16;
  }
  return floats;
}

static void part(const hr_moe_args& args, int64_t token, int64_t tokens) {
  const bool floats = all_floats(args);
  const Sorted sorted = memory(args, tokens * args.top_k, floats);
  sort(args, token, tokens, sorted);
  const int64_t rows = sorted.experts[args.experts].begin;
  const hr_rows inner{sorted.inner, args.inner, args.inner, args.x.dtype};
  const hr_rows outer{sorted.outer, args.y.columns, args.y.columns, args.x.dtype};
  if (args.on_input) {
    with_type(args.x.dtype, [&](auto type) {
      weigh_inputs<decltype(type)>(args, token, tokens, sorted);
    });
  } else if (!floats) {
    gather_inputs(args, rows, sorted);
  }
  if (floats) {
    float_experts(args, sorted, inner, outer);
  } else {
    single_experts(args, rows, sorted, inner, outer);
  }
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
