// The bf16 product of AVX512_BF16, the only place that names it.
//
// Each 32-bit lane holds a pair of inputs, the even one low. VDPBF16PS adds the odd product first,
// then the even one; a product of two bf16 numbers is exact in fp32, each addition rounds to
// nearest even. It treats subnormal inputs and sums as zero whatever the control register says.
// -DHR_EMULATE gives the same sums on a CPU without the instruction, but for that flush: there
// subnormal numbers keep their value.
#pragma once
#include "simd.h"

#if HR_LEVEL >= 3
namespace HR_NS {

// sum + weights . x, lane by lane.
HR_INLINE vf dot_bf16(vf sum, vu weights, vu x) {
#ifdef HR_EMULATE
  sum = fma((vf)(weights & 0xffff0000u), (vf)(x & 0xffff0000u), sum);
  return fma((vf)(weights << 16), (vf)(x << 16), sum);
#else
  // Not the intrinsic: gcc 12 copies its accumulator between registers.
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
  return sum;
#endif
}

}  // namespace HR_NS
#endif
