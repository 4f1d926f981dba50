// A thin layer over vector instructions, one meaning at every level.
//
// A kernel file is compiled once per level with -DHR_LEVEL=0..4 and the flags of that level:
//
//     HR_LEVEL 0  HR_NS hr_portable     any CPU, 4 lanes, multiply and add rounded separately
//     HR_LEVEL 1  HR_NS hr_avx2         AVX2 FMA F16C, 8 lanes
//     HR_LEVEL 2  HR_NS hr_avx512       F BW DQ VL, 16 lanes
//     HR_LEVEL 3  HR_NS hr_avx512_bf16  the same and BF16, VNNI
//     HR_LEVEL 4  HR_NS hr_amx          the same and AMX tiles of bf16 and int8
//
// The last two levels have only the files that use what they add (hatch_build.py): an operator
// that a level lacks is that of the level below.
//
// Rules for kernel files, all for one reason (the linker keeps one copy of an inline function, and
// it may be the one this CPU cannot run): everything in `namespace HR_NS`; functions `static`;
// nothing from std:: that is more than a constant; shared headers only with internal linkage.
// The build refuses weak symbols in the objects.
//
// `vf` is a vector of kLanes fp32 numbers; + - * / and comparison are the compiler's vector
// operators. Contraction is off: only fma() fuses. Sums across lanes have a fixed order.
// Elements are float, bf16 or f16 in memory and always fp32 in registers.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../api.h"

#ifndef HR_LEVEL
#error "compile kernel files with -DHR_LEVEL=0..4"
#endif
#if HR_LEVEL == 0
#define HR_NS hr_portable
#elif HR_LEVEL == 1
#define HR_NS hr_avx2
#elif HR_LEVEL == 2
#define HR_NS hr_avx512
#elif HR_LEVEL == 3
#define HR_NS hr_avx512_bf16
#else
#define HR_NS hr_amx
#endif
#if HR_LEVEL > 0
#include <immintrin.h>
#endif

#define HR_INLINE static inline __attribute__((always_inline, unused))

namespace HR_NS {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- types --------------------------------------------------------------------------------------

#if HR_LEVEL >= 2
constexpr int kLanes = 16;
#elif HR_LEVEL == 1
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes), may_alias));
typedef float vf_loose __attribute__((vector_size(4 * kLanes), may_alias, aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint16_t vh_loose __attribute__((vector_size(2 * kLanes), may_alias, aligned(2)));

HR_INLINE vf set(float x) { return x - vf{}; }
HR_INLINE vf zero() { return vf{}; }
HR_INLINE vi set_int(int32_t x) { return x - vi{}; }

// ---- conversions of one element -----------------------------------------------------------------

HR_INLINE float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
HR_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
HR_INLINE float widen(float x) { return x; }
HR_INLINE float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
HR_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Scaling by 2^112 is exact and turns subnormal numbers of f16 into normal ones.
  return as_float(sign | as_bits(as_float(rest << 13) * as_float(0x77800000)));
}
HR_INLINE void narrow(float x, float* out) { *out = x; }
// Round to nearest even; NaN stays NaN.
HR_INLINE void narrow(float x, bf16* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}
HR_INLINE void narrow(float x, f16* out) {
  const uint32_t bits = as_bits(x), sign = (bits >> 16) & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  uint32_t half;
  if (size > 0x7f800000) {
    half = 0x7e00 | (size >> 13 & 0x1ff);
  } else if (size >= 0x477ff000) {
    half = 0x7c00;
  } else if (size < 0x38800000) {  // adding 0.5 leaves a multiple of 2^-24, rounded to even
    half = as_bits(as_float(size) + 0.5f) - as_bits(0.5f);
  } else {
    half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// ---- loads and stores ---------------------------------------------------------------------------

HR_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_loose*>(p); }
HR_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_loose*>(p) = x; }

HR_INLINE vf load(const bf16* p) {
  const vh bits = *reinterpret_cast<const vh_loose*>(p);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}
HR_INLINE void store(bf16* p, vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu kept = (vu)(x != x);  // all ones where NaN
  const vu chosen = (((bits >> 16) | 0x40) & kept) | (rounded & ~kept);
  *reinterpret_cast<vh_loose*>(p) = __builtin_convertvector(chosen, vh);
}

#if HR_LEVEL >= 2
HR_INLINE vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HR_INLINE void store(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
}
#elif HR_LEVEL == 1
HR_INLINE vf load(const f16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HR_INLINE void store(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
}
#else
HR_INLINE vf load(const f16* p) {
  return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
HR_INLINE void store(f16* p, vf x) {
  for (int i = 0; i < kLanes; ++i) narrow(x[i], p + i);
}
#endif

// The first `count` < kLanes lanes; the others are zero. Memory past them is not touched.
template <class T>
HR_INLINE vf load_part(const T* p, int64_t count) {
  alignas(64) float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
template <class T>
HR_INLINE void store_part(T* p, vf x, int64_t count) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int64_t i = 0; i < count; ++i) narrow(lanes[i], p + i);
}
#if HR_LEVEL >= 2
HR_INLINE vf load_part(const float* p, int64_t count) {
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
HR_INLINE void store_part(float* p, vf x, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)x);
}
HR_INLINE vf load_part(const bf16* p, int64_t count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
}
#endif

// ---- arithmetic ---------------------------------------------------------------------------------

// a * b + c; one rounding from level 1 on, two at level 0.
HR_INLINE vf fma(vf a, vf b, vf c) {
#if HR_LEVEL >= 2
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif HR_LEVEL == 1
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// a where mask (a comparison of vf: all ones or zero per lane), else b.
HR_INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

HR_INLINE vf max(vf a, vf b) {
#if HR_LEVEL >= 2
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif HR_LEVEL == 1
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
HR_INLINE vf min(vf a, vf b) {
#if HR_LEVEL >= 2
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif HR_LEVEL == 1
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return select(a < b, a, b);
#endif
}

HR_INLINE vf sqrt(vf x) {
#if HR_LEVEL >= 2
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif HR_LEVEL == 1
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// To the nearest integer, ties to even, for |x| < 2^22.
HR_INLINE vf round(vf x) {
  const vf magic = set(12582912.0f);
  return (x + magic) - magic;
}

// e^x by halving the range to |r| <= ln 2 / 2 and a polynomial of degree 6; relative error below
// 2e-7. 0 below -87.3 (also for -inf), +inf above 88.7, NaN for NaN.
HR_INLINE vf exp(vf x) {
  const vf n = round(min(max(x, set(-104.0f)), set(104.0f)) * set(1.44269504f));
  vf r = fma(n, set(-0.693359375f), min(max(x, set(-104.0f)), set(104.0f)));
  r = fma(n, set(2.12194440e-4f), r);
  vf p = fma(r, set(1.3981999e-3f), set(8.3334519e-3f));
  p = fma(p, r, set(4.1665795e-2f));
  p = fma(p, r, set(1.6666666e-1f));
  p = fma(p, r, set(0.5f));
  p = fma(p, r * r, r) + set(1.0f);
  const vi power = __builtin_convertvector(n, vi);
  vf y = p * (vf)((power + 127) << 23);
  y = select(x < set(-87.3365f), zero(), y);
  y = select(x > set(88.7f), set(__builtin_inff()), y);
  return select(x != x, x, y);
}

// Combines all lanes in a fixed order: halves are combined until one lane is left.
template <class Vector, class Pair>
HR_INLINE auto fold(Vector x, const Pair& pair) {
  vi other;
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) other[i] = i ^ half;
    x = pair(x, __builtin_shuffle(x, other));
  }
  const auto first = x[0];
  return first;
}
HR_INLINE float sum(vf x) {
  return fold(x, [](vf a, vf b) { return a + b; });
}
HR_INLINE float largest(vf x) {
  return fold(x, [](vf a, vf b) { return max(a, b); });
}

HR_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// Asks for memory that will be overwritten: a store to a line that another core or no cache holds
// waits for it, and all later stores wait behind. An instruction that does nothing on old CPUs.
HR_INLINE void prefetch_to_write(const void* p) {
#if HR_LEVEL > 0
  __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}
HR_INLINE void prefetch_to_write(const char* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch_to_write(p + at);
}

}  // namespace HR_NS
