// Exact sums of products of unsigned and signed bytes, the inner step of int8 and int4 products.
//
// The unsigned byte is the weight (an int8 weight plus 128, or 4 bits), the signed one x, -127..127.
// Level 3 has one instruction for four products. Below it bytes become 16-bit words: of int8 the
// even and odd bytes apart, of int4 two products at once, whose sums of up to eight fit 16 bits.
// -DHR_EMULATE replaces the instruction of level 3, so that its kernels can be tested without it.
//
// Part of the kernel files: the same rules as simd.h.
#pragma once
#include "simd.h"

namespace HR_NS {

typedef int16_t vs __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t vus __attribute__((vector_size(4 * kLanes), may_alias));

HR_INLINE vu load_words(const void* p) {
  vu words;
  memcpy(&words, p, sizeof words);
  return words;
}
// The 4 bytes at p in every lane.
HR_INLINE vi repeat(const void* p) {
  int32_t word;
  memcpy(&word, p, 4);
  return set_int(word);
}

// Bytes of x for four inputs: the bytes themselves, or words (0, 2), (1, 3) of 16 bits each.
constexpr int64_t kInt8Quad = HR_LEVEL >= 3 ? 4 : 8;
constexpr int64_t kInt4Quad = HR_LEVEL >= 1 ? 4 : 8;

HR_INLINE void place_quad(const int8_t* from, int64_t quad_bytes, char* to) {
  if (quad_bytes == 4) {
    memcpy(to, from, 4);
  } else {
    const int16_t words[4] = {from[0], from[2], from[1], from[3]};
    memcpy(to, words, 8);
  }
}

// `count` quads, each `step` bytes from the one before.
HR_INLINE void place_quads(const int8_t* from, int64_t count, int64_t quad_bytes, char* to,
                           int64_t step) {
  typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
  typedef int16_t words __attribute__((vector_size(32), may_alias));
  const words order = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  int64_t done = 0;
  for (; quad_bytes == 8 && done + 4 <= count; done += 4) {
    const words wide = __builtin_convertvector(*(const bytes*)(from + 4 * done), words);
    alignas(32) char four[32];
    *(words*)four = __builtin_shuffle(wide, order);
    for (int i = 0; i < 4; ++i) memcpy(to + (done + i) * step, four + 8 * i, 8);
  }
  for (; done < count; ++done) place_quad(from + 4 * done, quad_bytes, to + done * step);
}

HR_INLINE vs even_bytes(vu u) { return (vs)(u & 0x00ff00ffu); }
HR_INLINE vs odd_bytes(vu u) { return (vs)((vus)u >> 8); }

// Each lane: the sum of its two 16-bit products, which themselves fit 16 bits.
HR_INLINE vi pair_dot(vs a, vs b) {
#if HR_LEVEL >= 2
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif HR_LEVEL == 1
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  const vi products = (vi)(a * b);
  return ((products << 16) >> 16) + (products >> 16);
#endif
}

#if HR_LEVEL >= 3
// c + the four products of each lane. Inline assembly, because gcc 12 copies the sums of intrinsics
// from register to register.
HR_INLINE vi dot4(vi c, vu u, vi s) {
#ifdef HR_EMULATE
  const vi even = pair_dot(even_bytes(u), ((vs)s << 8) >> 8);
  return c + even + pair_dot(odd_bytes(u), (vs)s >> 8);
#else
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(u), "v"(s));
  return c;
#endif
}
#else
// c + in each 16-bit word two products of u and x, a quad; at level 0 x and x_odd are its words.
// Inline assembly, because gcc 12 makes all products first and then lacks registers.
HR_INLINE vs dot_nibbles(vs c, vu u, vu x, vu x_odd) {
#if HR_LEVEL >= 1
  (void)x_odd;
  vs products;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(c), "=&v"(products) : "v"(u), "v"(x));
  return c;
#else
  return c + even_bytes(u) * (vs)x + odd_bytes(u) * (vs)x_odd;
#endif
}

// sums[v] + products of u[v] and the quad at x.
template <int N>
HR_INLINE void add_nibbles(vs (&sums)[N], const vu (&u)[N], const char* x) {
  const vu even = (vu)repeat(x), odd = HR_LEVEL >= 1 ? vu{} : (vu)repeat(x + 4);
  for (int v = 0; v < N; ++v) sums[v] = dot_nibbles(sums[v], u[v], even, odd);
}
#endif

}  // namespace HR_NS
