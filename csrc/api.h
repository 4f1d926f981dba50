// How kernels become operators.
//
// A kernel file (csrc/kernels/NAME.cpp) is compiled once per level. It includes kernels/simd.h,
// writes its code inside `namespace HR_NS { ... }` and ends each operator with
//
//     HR_OPERATOR(gated, hr_gated_args)
//
// for a function `static void gated(const hr_gated_args& args, const hr_step& step)`. The
// macro puts a constant into the linker section `hr_operators`; nothing runs at load time and there
// is no central list. Argument structs stand in headrace.h, and their ctypes mirrors beside the
// Python function; `hr_operator` checks that the sizes agree. An operator that a level lacks is that
// of the level below; the lowest one has all.
#pragma once
#include "headrace.h"
#include "pool.h"

namespace hr {

using Kernel = void (*)(const void* args, const hr_step& step);

struct alignas(32) Operator {  // the size is a multiple of the alignment: the section has no gaps
  const char* name;
  int32_t level;
  int32_t args_size;
  Kernel kernel;
};

constexpr int kLevels = 5;
constexpr int kMostOperators = 128;

// The kernel of operator `index` at the level in use.
Kernel kernel_of(int32_t index);

}  // namespace hr

#define HR_OPERATOR(NAME, ARGS)                                                              \
  static void NAME##_entry(const void* args, const hr_step& step) {                          \
    NAME(*static_cast<const ARGS*>(args), step);                                             \
  }                                                                                          \
  __attribute__((section("hr_operators"), used)) static hr::Operator NAME##_operator = {     \
      #NAME, HR_LEVEL, static_cast<int32_t>(sizeof(ARGS)), NAME##_entry};
