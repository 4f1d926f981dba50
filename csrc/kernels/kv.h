// Elements of a KV cache: fp32, bf16, f16, int8 and fp8 (e4m3), widened to fp32 without loss.
//
// Part of the kernel files: the same rules as simd.h. A row of a cache is read in two ways: as
// vectors of fp32 (`widened`), in the order that costs least, or as a vector of kLanes units of 32
// bits, which hold kPack elements each (`units`), so that a transposition moves narrow elements in
// groups; `unpack` takes the group apart. Does not know scales, but for Wide<T>::meaning.
#pragma once
#include "types.h"

namespace HR_NS {

struct e4m3 {  // FP8 of arXiv 2209.05433: no infinity; what is written here is never NaN
  uint8_t bits;
};

typedef int8_t vb __attribute__((vector_size(kLanes), may_alias));
typedef int8_t vb_loose __attribute__((vector_size(kLanes), may_alias, aligned(1)));
typedef uint8_t vc __attribute__((vector_size(kLanes), may_alias));
typedef uint8_t vc_loose __attribute__((vector_size(kLanes), may_alias, aligned(1)));

// ---- fp8 ----------------------------------------------------------------------------------------

// The top byte of each lane as a number / 256. Exponents are moved as if there were no subnormal
// numbers; those came out as y instead of 2y - 2^-14, which is the smaller of the two for them
// alone.
HR_INLINE vf from_e4m3(vu top) {
  const vu moved = ((top >> 4) & 0x07f00000u) + 0x38000000u;
  const vf y = min((vf)moved, fma((vf)moved, set(2.0f), set(-0x1p-14f)));
  return (vf)((vu)y | (top & 0x80000000u));
}

// The nearest e4m3 of each lane, ties to even, at most 448 in size; NaN becomes 448 too.
HR_INLINE vu to_e4m3(vf x) {
  const vu sign = (vu)x & 0x80000000u;
  const vf size = min((vf)((vu)x & 0x7fffffffu), set(448.0f));
  const vu bits = (vu)size;
  const vu normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const vu small = (vu)(size + set(16384.0f)) - (vu)set(16384.0f);  // a multiple of 2^-9
  const vu is_small = (vu)(size < set(0.015625f));
  return (small & is_small) | (normal & ~is_small) | (sign >> 24);
}

HR_INLINE void store(e4m3* p, vf x) {
  *reinterpret_cast<vc_loose*>(p) = __builtin_convertvector(to_e4m3(x), vc);
}

// ---- vectors of fp32 ----------------------------------------------------------------------------

// `count` vectors are made at once of as many times kLanes neighbors. Lane i of the p-th holds
// element i * count + p of them: what shifting and masking words of 32 bits gives. A number stands
// for `meaning` times itself.
template <class T>
struct Wide {
  static constexpr int count = 1;
  static constexpr float meaning = 1;
};
template <>
struct Wide<bf16> {
  static constexpr int count = 2;
  static constexpr float meaning = 1;
};
template <>
struct Wide<e4m3> {
  static constexpr int count = 1;
  static constexpr float meaning = 256;
};

HR_INLINE void widened(const float* p, vf* out) { out[0] = load(p); }
HR_INLINE void widened(const f16* p, vf* out) { out[0] = load(p); }
HR_INLINE void widened(const bf16* p, vf* out) {
  const vu units = (vu) * reinterpret_cast<const vf_loose*>(p);
  out[0] = (vf)(units << 16);
  out[1] = (vf)(units & 0xffff0000u);
}
HR_INLINE void widened(const int8_t* p, vf* out) {
#if HR_LEVEL >= 2
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  out[0] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits));
#else
  const vb bytes = *reinterpret_cast<const vb_loose*>(p);
  out[0] = __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}
HR_INLINE void widened(const e4m3* p, vf* out) {
  const vc bytes = *reinterpret_cast<const vc_loose*>(p);
  out[0] = from_e4m3(__builtin_convertvector(bytes, vu) << 24);
}

// Of the first `count` < kLanes * Wide<T>::count elements; the others are zero.
template <class T>
HR_INLINE void widened_part(const T* p, int64_t count, vf* out) {
  T some[kLanes * Wide<T>::count] = {};
  memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  widened(some, out);
}

// `width` floats in the order of memory to the order of `widened`, and back.
template <class T>
static inline void part(const float* from, int64_t width, float* to) {
  constexpr int kMade = Wide<T>::count;
  vi even;
  for (int i = 0; i < kLanes; ++i) even[i] = 2 * i;
  for (int64_t d = 0; d < width; d += kMade * kLanes) {
    const vf low = load(from + d), high = load(from + d + (kMade - 1) * kLanes);
    store(to + d, kMade == 1 ? low : __builtin_shuffle(low, high, even));
    if (kMade == 2) store(to + d + kLanes, __builtin_shuffle(low, high, even + 1));
  }
}
template <class T>
static inline void unite(const float* from, int64_t width, float* to) {
  constexpr int kMade = Wide<T>::count;
  vi low;
  for (int i = 0; i < kLanes; ++i) low[i] = i / 2 + (i & 1) * kLanes;
  for (int64_t d = 0; d < width; d += kMade * kLanes) {
    const vf even = load(from + d), odd = load(from + d + (kMade - 1) * kLanes);
    store(to + d, kMade == 1 ? even : __builtin_shuffle(even, odd, low));
    if (kMade == 2) store(to + d + kLanes, __builtin_shuffle(even, odd, low + kLanes / 2));
  }
}

// Where fp8 is read a few times, it is put down first as f16, in which the same bits mean 1 / 256 of
// the number and which an instruction widens (level 0 has none: fp32).
template <class T>
struct Staged {
  typedef T type;
};
template <>
struct Staged<e4m3> {
#if HR_LEVEL >= 1
  typedef f16 type;
#else
  typedef float type;
#endif
};

HR_INLINE void stage(const e4m3* from, int64_t count, Staged<e4m3>::type* to) {
#if HR_LEVEL >= 1
  constexpr int kStep = 16;
  const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
  int64_t i = 0;
#if HR_LEVEL >= 2
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m512i moved = _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7);
    const __m512i half = _mm512_and_si512(moved, _mm512_broadcastw_epi16(_mm256_castsi256_si128(kept)));
    _mm512_storeu_si512(to + i, half);
  }
#endif
  for (; i < count; i += kStep) {
    const int64_t rest = count - i;
    e4m3 some[kStep] = {};
    if (rest < kStep) memcpy(some, from + i, static_cast<size_t>(rest));
    const __m128i* p = reinterpret_cast<const __m128i*>(rest < kStep ? some : from + i);
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(p)), 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm256_and_si256(moved, kept));
  }
#else
  for (int64_t i = 0; i < count; i += kLanes) {
    vf x;
    if (i + kLanes <= count) {
      widened(from + i, &x);
    } else {
      widened_part(from + i, count - i, &x);
    }
    store(to + i, x);
  }
#endif
}

// ---- units --------------------------------------------------------------------------------------

template <class T>
struct Pack {
  static constexpr int count = 4 / sizeof(T);
};
template <>
struct Pack<f16> {  // widened by an instruction of its own when read
  static constexpr int count = 1;
};

template <class T>
HR_INLINE vf units(const T* p) {
  return *reinterpret_cast<const vf_loose*>(p);
}
HR_INLINE vf units(const f16* p) { return load(p); }

// The first `count` elements, zeros after them.
template <class T>
HR_INLINE vf units_part(const T* p, int64_t count) {
  T some[kLanes * Pack<T>::count] = {};
  memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return units(some);
}

HR_INLINE void unpack(const float*, vf unit, vf* out) { out[0] = unit; }
HR_INLINE void unpack(const f16*, vf unit, vf* out) { out[0] = unit; }
HR_INLINE void unpack(const bf16*, vf unit, vf* out) {
  out[0] = (vf)((vu)unit << 16);
  out[1] = (vf)((vu)unit & 0xffff0000u);
}
HR_INLINE void unpack(const int8_t*, vf unit, vf* out) {
  out[0] = __builtin_convertvector((vi)unit << 24 >> 24, vf);
  out[1] = __builtin_convertvector((vi)unit << 16 >> 24, vf);
  out[2] = __builtin_convertvector((vi)unit << 8 >> 24, vf);
  out[3] = __builtin_convertvector((vi)unit >> 24, vf);
}
HR_INLINE void unpack(const e4m3*, vf unit, vf* out) {
  out[0] = from_e4m3((vu)unit << 24);
  out[1] = from_e4m3((vu)unit << 16);
  out[2] = from_e4m3((vu)unit << 8);
  out[3] = from_e4m3((vu)unit);
}

// Calls body(T()) for the element type of a cache.
template <class Body>
static inline void with_cache_type(int32_t dtype, const Body& body) {
  if (dtype == HR_I8) body(int8_t());
  if (dtype == HR_F8) body(e4m3());
  with_type(dtype, body);
}

}  // namespace HR_NS
