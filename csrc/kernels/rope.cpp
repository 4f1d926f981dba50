// rotary_kv: rotary embedding (arXiv 2104.09864) of q and k in place, then k and v into the cache.
//
// One pass over a token while its q, k, v are in the cache of the core. Products are rounded before
// they are added, at every level alike, as the definition does.
#include "kv.h"

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
  T* head = row_of<T>(rows, row) + args.first;
  for (int64_t h = 0; h < heads; ++h, head += dim) {
    if (args.interleaved) {
      turn_interleaved(head, cos, cos + half, half);
    } else {
      turn(head, cos, cos + half, half);
    }
  }
}

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class T, class C>
static void put_elements(const T* from, C* to, int64_t count, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * set(factor));
  if (i == count) return;
  C some[kLanes];
  store(some, load_part(from + i, count - i) * set(factor));
  memcpy(to + i, some, static_cast<size_t>(count - i) * sizeof(C));
}

// One head as int8; returns its scale.
template <class T>
static float quantize_head(const T* from, int8_t* to, int64_t count) {
  vf most = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf x = take(from + i, count - i < kLanes ? count - i : kLanes);
    most = max(most, max(x, zero() - x));
  }
  const float top = largest(most), factor = top > 0 ? 127.0f / top : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float x = widen(from[i]) * factor;
    to[i] = static_cast<int8_t>(static_cast<int32_t>((x + 12582912.0f) - 12582912.0f));
  }
  return top / 127.0f;
}

// A row of k or v into slot `slot` of its cache.
template <class T>
static void put_row(const hr_rows& rows, int64_t row, const hr_rotary_kv_args& args, void* cache,
                    float* scales, float scale, int64_t slot) {
  const T* from = row_of<T>(rows, row);
  const int64_t count = rows.columns, dim = count / args.kv_heads;
  with_cache_type(args.cache_dtype, [&](auto type) {
    using C = decltype(type);
    C* to = static_cast<C*>(cache) + slot * count;
    if constexpr (Same<C, int8_t>::value) {
      for (int64_t h = 0; h < args.kv_heads; ++h) {
        scales[slot * args.kv_heads + h] = quantize_head(from + h * dim, to + h * dim, dim);
      }
    } else if constexpr (Same<C, T>::value) {
      memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    } else {
      put_elements(from, to, count, Same<C, e4m3>::value ? 1 / scale : 1);
    }
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
          put_row<T>(args.k, row, args, args.keys, args.key_scales, args.key_scale, slot);
          if (!args.values) continue;
          put_row<T>(args.v, row, args, args.values, args.value_scales, args.value_scale, slot);
        }
      }
    });
  });
}

HR_OPERATOR(rotary_kv, hr_rotary_kv_args)

}  // namespace HR_NS
