// rms_norm (+ residual) and layer_norm. Sums over a row run in kSums vectors, in a fixed order.
#include "types.h"

namespace HR_NS {

constexpr int kSums = 4;
constexpr int64_t kGrain = 1 << 13;  // elements worth handing to another thread

// Sum over i < count of f(lane values at i), with the last partial vector given its length.
template <class F>
HR_INLINE float sum_of(int64_t count, const F& f) {
  vf sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes <= count; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) sums[s] = sums[s] + f(i + s * kLanes, kLanes);
  }
  for (; i < count; i += kLanes) {
    sums[0] = sums[0] + f(i, count - i < kLanes ? count - i : kLanes);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

HR_INLINE vf take_as(const void* p, int32_t dtype, int64_t at, int64_t count) {
  if (dtype == HR_F32) return take(static_cast<const float*>(p) + at, count);
  if (dtype == HR_BF16) return take(static_cast<const bf16*>(p) + at, count);
  return take(static_cast<const f16*>(p) + at, count);
}

template <class T>
static void add(const T* x, const T* residual, T* total, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    put(total + i, take(x + i, n) + take(residual + i, n), n);
  }
}

template <class T>
static void rms_part(const T* x, T* y, int64_t count, const hr_rms_norm_args& args) {
  const float square = sum_of(count, [&](int64_t i, int64_t n) {
    const vf v = take(x + i, n);
    return v * v;
  });
  const float root = __builtin_sqrtf(square / static_cast<float>(count) + args.eps);
  const vf factor = set(1.0f / root);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    put(y + i, take(x + i, n) * factor * take_as(args.weight, args.weight_dtype, i, n), n);
  }
}

static void rms_norm(const hr_rms_norm_args& args, const hr_step& step) {
  with_type(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t columns = args.x.columns, part = columns / args.parts;
    hr::parallel(step.tokens, 1 + kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(args.x, row);
        if (args.residual.data) {
          T* total = row_of<T>(args.total, row);
          add(x, row_of<T>(args.residual, row), total, columns);
          x = total;
        }
        T* y = row_of<T>(args.y, row);
        for (int64_t at = 0; at < columns; at += part) rms_part(x + at, y + at, part, args);
      }
    });
  });
}

template <class T>
static void layer_part(const T* x, T* y, int64_t count, int64_t first,
                       const hr_layer_norm_args& args) {
  const float size = static_cast<float>(count);
  const vf mean = set(sum_of(count, [&](int64_t i, int64_t n) { return take(x + i, n); }) / size);
  const float square = sum_of(count, [&](int64_t i, int64_t n) {
    vf v = take(x + i, n) - mean;
    for (int64_t lane = n; lane < kLanes; ++lane) v[lane] = 0;
    return v * v;
  });
  const vf factor = set(1.0f / __builtin_sqrtf(square / size + args.eps));
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    vf v = (take(x + i, n) - mean) * factor * take_as(args.weight, args.weight_dtype, first + i, n);
    if (args.bias) v = v + take_as(args.bias, args.weight_dtype, first + i, n);
    put(y + i, v, n);
  }
}

static void layer_norm(const hr_layer_norm_args& args, const hr_step& step) {
  with_type(args.x.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t columns = args.x.columns, part = columns / args.parts;
    hr::parallel(step.tokens, 1 + kGrain / (columns + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = row_of<T>(args.x, row);
        T* y = row_of<T>(args.y, row);
        for (int64_t at = 0; at < columns; at += part) {
          layer_part(x + at, y + at, part, args.weights > 1 ? at : 0, args);
        }
      }
    });
  });
}

HR_OPERATOR(rms_norm, hr_rms_norm_args)
HR_OPERATOR(layer_norm, hr_layer_norm_args)

}  // namespace HR_NS
