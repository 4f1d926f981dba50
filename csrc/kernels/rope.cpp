// rotary_kv: rotary embedding (arXiv 2104.09864) of q and k in place, then k and v into the cache.
//
// One pass over a token while its q, k, v are in the cache of the core. Products are rounded before
// they are added, at every level alike, as the definition does.
#include "types.h"

namespace HR_NS {

constexpr int64_t kGrain = 1 << 13;  // elements worth handing to another thread

// Pairs (i, i + half).
template <class T>
static void turn(T* head, const float* cos, const float* sin, int64_t half) {
  T* other = head + half;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const vf a = load(head + i), b = load(other + i), c = load(cos + i), s = load(sin + i);
    store(head + i, a * c - b * s);
    store(other + i, b * c + a * s);
  }
  for (; i < half; ++i) {
    const float a = widen(head[i]), b = widen(other[i]);
    narrow(a * cos[i] - b * sin[i], head + i);
    narrow(b * cos[i] + a * sin[i], other + i);
  }
}

// Pairs (2i, 2i + 1).
template <class T>
static void turn_interleaved(T* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = widen(head[2 * i]), b = widen(head[2 * i + 1]);
    narrow(a * cos[i] - b * sin[i], head + 2 * i);
    narrow(b * cos[i] + a * sin[i], head + 2 * i + 1);
  }
}

template <class T>
static void turn_row(const hr_rotary_kv_args& args, const hr_rows& rows, int64_t heads,
                     int64_t row) {
  if (!rows.data) return;
  const int64_t half = args.cos_sin.columns / 2, dim = rows.columns / heads;
  const float* cos = row_of<float>(args.cos_sin, row);
  T* head = row_of<T>(rows, row);
  for (int64_t h = 0; h < heads; ++h, head += dim) {
    if (args.interleaved) {
      turn_interleaved(head, cos, cos + half, half);
    } else {
      turn(head, cos, cos + half, half);
    }
  }
}

template <class T>
static void put_row(const hr_rows& rows, int64_t row, void* cache, int32_t dtype, int64_t slot) {
  const T* from = row_of<T>(rows, row);
  const int64_t count = rows.columns;
  with_type(dtype, [&](auto type) {
    using C = decltype(type);
    C* to = static_cast<C*>(cache) + slot * count;
    if (rows.dtype == dtype) {
      memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; ++i) narrow(widen(from[i]), to + i);
  });
}

static void rotary_kv(const hr_rotary_kv_args& args, const hr_step& step) {
  with_type(args.k.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t elements = args.q.columns + 2 * args.k.columns;
    hr::parallel(step.tokens, 1 + kGrain / (elements + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (args.cos_sin.data) {
          turn_row<T>(args, args.q, args.heads, row);
          turn_row<T>(args, args.k, args.kv_heads, row);
        }
        if (args.keys) {
          const int64_t slot = step.slots[row];
          put_row<T>(args.k, row, args.keys, args.cache_dtype, slot);
          put_row<T>(args.v, row, args.values, args.cache_dtype, slot);
        }
      }
    });
  });
}

HR_OPERATOR(rotary_kv, hr_rotary_kv_args)

}  // namespace HR_NS
