// embedding, gather, columns, gated, combine: operators whose output elements depend on one row and one column.
#include "types.h"

namespace HR_NS {

constexpr int64_t kGrain = 1 << 14;  // elements worth handing to another thread

static int64_t grain(int64_t columns) { return 1 + kGrain / (columns + 1); }

static void embedding(const hr_embedding_args& args, const hr_step& step) {
  with_type(args.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(args.weight);
    const int64_t columns = args.y.columns;
    hr::parallel(step.tokens, grain(columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = args.by_position ? step.positions[i] + args.first : step.ids[i];
        const T* row = weight + place * columns;
        if (args.dtype == args.y.dtype) {
          memcpy(row_of<T>(args.y, i), row, static_cast<size_t>(columns) * sizeof(T));
          continue;
        }
        alignas(64) float wide[kLanes];
        for (int64_t c = 0; c < columns; c += kLanes) {
          const int64_t count = columns - c < kLanes ? columns - c : kLanes;
          load_elements(row + c, count, wide);
          store_row(args.y, i, c, count, wide);
        }
      }
    });
  });
}

static void gather(const hr_gather_args& args, const hr_step& step) {
  const int64_t size = args.x.dtype == HR_F32 ? 4 : 2, columns = args.x.columns;
  const char* x = static_cast<const char*>(args.x.data);
  char* y = static_cast<char*>(args.y.data);
  hr::parallel(step.tokens, grain(columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      memcpy(y + i * args.y.stride * size, x + step.picks[i] * args.x.stride * size,
             static_cast<size_t>(columns * size));
    }
  });
}

template <class T>
static void pick_columns(const hr_columns_args& args, int64_t row) {
  const T* x = row_of<T>(args.x, row);
  T* y = row_of<T>(args.y, row);
  for (int64_t c = 0; c < args.y.columns; ++c) y[c] = x[args.order[c]];
}

static void columns(const hr_columns_args& args, const hr_step& step) {
  hr::parallel(step.tokens, grain(args.y.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      args.x.dtype == HR_F32 ? pick_columns<float>(args, i) : pick_columns<uint16_t>(args, i);
    }
  });
}

template <int Activation, bool Gated, class T>
static void gated_rows(const hr_gated_args& args, const hr_step& step) {
  const int64_t columns = args.y.columns;
  hr::parallel(step.tokens, grain(4 * columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* gate = row_of<T>(args.x, i);
      const T* up = gate + columns;
      T* y = row_of<T>(args.y, i);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t n = columns - c < kLanes ? columns - c : kLanes;
        if constexpr (Activation == HR_SWIGLU_CLAMPED) {
          put(y + c, swiglu_clamped(take(gate + c, n), take(up + c, n), args.alpha, args.limit), n);
          continue;
        }
        const auto active = activate<Activation>(take(gate + c, n));
        if constexpr (Gated) {
          put(y + c, active * take(up + c, n), n);
        } else {
          put(y + c, active, n);
        }
      }
    }
  });
}

template <bool Gated, class T>
static void activated(const hr_gated_args& args, const hr_step& step) {
  if (args.activation == HR_SILU) gated_rows<HR_SILU, Gated, T>(args, step);
  if (args.activation == HR_GELU_TANH) gated_rows<HR_GELU_TANH, Gated, T>(args, step);
  if (args.activation == HR_GELU_ERF) gated_rows<HR_GELU_ERF, Gated, T>(args, step);
  if (args.activation == HR_RELU) gated_rows<HR_RELU, Gated, T>(args, step);
  if (args.activation == HR_RELU_SQUARED) gated_rows<HR_RELU_SQUARED, Gated, T>(args, step);
  if (Gated && args.activation == HR_SWIGLU_CLAMPED) {
    gated_rows<HR_SWIGLU_CLAMPED, Gated, T>(args, step);
  }
}

static void gated(const hr_gated_args& args, const hr_step& step) {
  with_type(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    if (args.x.columns == args.y.columns) {
      activated<false, T>(args, step);
    } else {
      activated<true, T>(args, step);
    }
  });
}

template <class T>
static void combine_row(const hr_combine_args& args, int64_t row) {
  const T* x = row_of<T>(args.x, row);
  const T* z = args.z.data ? row_of<T>(args.z, row) : nullptr;
  T* y = row_of<T>(args.y, row);
  vf b = set(args.b);
  if (args.gate.data) b = b / (set(1.0f) + exp(set(-widen(*row_of<T>(args.gate, row)))));
  const vf a = set(args.a), cap = set(args.cap), limit = set(args.limit);
  for (int64_t c = 0; c < args.y.columns; c += kLanes) {
    const int64_t n = args.y.columns - c < kLanes ? args.y.columns - c : kLanes;
    vf v = a * take(x + c, n);
    if (z) v = v + b * take(z + c, n);
    if (args.cap > 0) v = cap * tanh(v / cap);
    if (args.limit > 0) v = min(max(v, zero() - limit), limit);
    put(y + c, v, n);
  }
}

static void combine(const hr_combine_args& args, const hr_step& step) {
  with_type(args.y.dtype, [&](auto type) {
    using T = decltype(type);
    hr::parallel(step.tokens, grain(args.y.columns), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) combine_row<T>(args, i);
    });
  });
}

HR_OPERATOR(combine, hr_combine_args)
HR_OPERATOR(columns, hr_columns_args)
HR_OPERATOR(embedding, hr_embedding_args)
HR_OPERATOR(gather, hr_gather_args)
HR_OPERATOR(gated, hr_gated_args)

}  // namespace HR_NS
