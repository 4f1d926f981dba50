// embedding, gather, gated: operators whose output elements depend on one row and one column.
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
        const T* row = weight + step.ids[i] * columns;
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

HR_OPERATOR(embedding, hr_embedding_args)
HR_OPERATOR(gather, hr_gather_args)
HR_OPERATOR(gated, hr_gated_args)

}  // namespace HR_NS
