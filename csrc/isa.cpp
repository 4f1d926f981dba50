// Asks cpuid for the instructions, xgetbv whether the system saves the registers they use, and the
// system itself for those of AMX: it gives them to processes that ask.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace hr {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

// Register files that the system saves: 0x06 is xmm and ymm, 0xe6 the AVX-512 ones too, 0x60000
// tiles and their shapes.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

}  // namespace

hr_level best_level() {
  const Registers basic = cpuid(1, 0), wide = cpuid(7, 0), more = cpuid(7, 1);
  if (!bit(basic.c, 27)) return HR_PORTABLE;  // OSXSAVE
  const uint64_t saved = saved_state();
  const bool avx2 = bit(basic.c, 28) && bit(basic.c, 12) && bit(basic.c, 29) && bit(wide.b, 5);
  if (!avx2 || (saved & 0x06) != 0x06) return HR_PORTABLE;
  // F, DQ, CD, BW, VL
  const bool avx512 = bit(wide.b, 16) && bit(wide.b, 17) && bit(wide.b, 28) && bit(wide.b, 30) &&
                      bit(wide.b, 31);
  if (!avx512 || (saved & 0xe6) != 0xe6) return HR_AVX2;
  const bool vnni = bit(wide.c, 11), bf16 = bit(more.a, 5);
  if (!vnni || !bf16) return HR_AVX512;
  return amx_permission() == HR_GRANTED ? HR_AMX : HR_AVX512_BF16;
}

hr_permission amx_permission() {
  const Registers basic = cpuid(1, 0), wide = cpuid(7, 0);
  if (!bit(wide.d, 24) || !bit(wide.d, 22) || !bit(wide.d, 25)) return HR_NO_CPU;
  if (!bit(basic.c, 27) || (saved_state() & 0x60000) != 0x60000) return HR_NO_STATE;
  // Linux: Documentation/arch/x86/xstate.rst. Permission is the whole process's and its children's.
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? HR_GRANTED : HR_REFUSED;
}

}  // namespace hr
#else
namespace hr {
hr_level best_level() { return HR_PORTABLE; }
hr_permission amx_permission() { return HR_NO_CPU; }
}  // namespace hr
#endif
