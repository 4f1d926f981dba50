// Elements of a KV cache: fp32, bf16, f16, int8 and fp8 (e4m3), widened to fp32 without loss.
//
// Part of the kernel files: the same rules as simd.h. A row of a cache is read in two ways: kLanes
// neighbors at once (`lanes`), or as a vector of kLanes units of 32 bits, which hold kPack elements
// each (`units`), so that a transposition moves narrow elements in groups; `unpack` takes the group
// apart. Does not know scales.
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

// The top byte of each lane as a number. Exponents are moved as if there were no subnormal numbers;
// those came out as y instead of 2y - 2^-6, which is the smaller of the two for them alone.
HR_INLINE vf from_e4m3(vu top) {
  const vu moved = ((top >> 4) & 0x07f00000u) + 0x3c000000u;
  const vf y = min((vf)moved, fma((vf)moved, set(2.0f), set(-0.015625f)));
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

// ---- kLanes neighbors ---------------------------------------------------------------------------

HR_INLINE vf lanes(const float* p) { return load(p); }
HR_INLINE vf lanes(const bf16* p) {
#if HR_LEVEL >= 2  // gcc 12 widens the halves of a vector apart
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
  return load(p);
#endif
}
HR_INLINE vf lanes(const f16* p) { return load(p); }
HR_INLINE vf lanes(const int8_t* p) {
#if HR_LEVEL >= 2
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits));
#else
  const vb bytes = *reinterpret_cast<const vb_loose*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, vi), vf);
#endif
}
HR_INLINE vf lanes(const e4m3* p) {
#if HR_LEVEL >= 2
  // As f16 with the same exponent field, which means 2^-8 times the number.
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  return (vf)_mm512_cvtph_ps(half) * set(256.0f);
#else
  const vc bytes = *reinterpret_cast<const vc_loose*>(p);
  return from_e4m3(__builtin_convertvector(bytes, vu) << 24);
#endif
}

// The first `count` < kLanes of them; the others are zero.
template <class T>
HR_INLINE vf lanes_part(const T* p, int64_t count) {
  T some[kLanes] = {};
  memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return lanes(some);
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
