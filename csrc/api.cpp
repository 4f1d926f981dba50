// The C functions of headrace.h, but for programs; and the table (operator, level) -> kernel.
#include "api.h"

#include <string.h>

#include <atomic>

#include "isa.h"

// Begin and end of the section that HR_OPERATOR fills; made by the linker.
extern "C" hr::Operator __start_hr_operators[] __attribute__((visibility("hidden")));
extern "C" hr::Operator __stop_hr_operators[] __attribute__((visibility("hidden")));

namespace hr {
namespace {

struct Row {
  const char* name = nullptr;
  int32_t args_size = 0;
  Kernel kernels[kLevels] = {};
};

struct Table {
  Row rows[kMostOperators];
  int32_t count = 0;

  Table() {
    for (const Operator* op = __start_hr_operators; op < __stop_hr_operators; ++op) {
      Row& row = rows[find_or_add(op->name)];
      row.args_size = op->args_size;
      row.kernels[op->level] = op->kernel;
    }
    for (int32_t i = 0; i < count; ++i) {
      for (int l = 1; l < kLevels; ++l) {
        if (!rows[i].kernels[l]) rows[i].kernels[l] = rows[i].kernels[l - 1];
      }
    }
  }

  int32_t find(const char* name) const {
    for (int32_t i = 0; i < count; ++i) {
      if (strcmp(rows[i].name, name) == 0) return i;
    }
    return -1;
  }

  int32_t find_or_add(const char* name) {
    const int32_t found = find(name);
    if (found >= 0) return found;
    rows[count].name = name;
    return count++;
  }
};

const Table& table() {
  static const Table made;
  return made;
}

// Asked once: cpuid is slow under a hypervisor.
int32_t best() {
  static const int32_t asked = best_level();
  return asked;
}
int32_t permission() {
  static const int32_t asked = amx_permission();
  return asked;
}

std::atomic<int32_t> level{-1};

}  // namespace

Kernel kernel_of(int32_t index) { return table().rows[index].kernels[hr_level_in_use()]; }

}  // namespace hr

int32_t hr_abi(void) { return HR_ABI; }

int32_t hr_level_best(void) { return hr::best(); }

int32_t hr_amx_permission(void) { return hr::permission(); }

int32_t hr_level_in_use(void) {
  const int32_t chosen = hr::level.load(std::memory_order_relaxed);
  return chosen >= 0 ? chosen : hr_level_best();
}

int32_t hr_set_level(int32_t level) {
  if (level < 0 || level > hr_level_best()) return -1;
  hr::level.store(level);
  return 0;
}

int32_t hr_threads(void) { return hr::threads(); }

void hr_set_threads(int32_t count) { hr::set_threads(count); }

int32_t hr_operator(const char* name, int64_t args_size) {
  const int32_t index = hr::table().find(name);
  if (index < 0) return -1;
  return hr::table().rows[index].args_size == args_size ? index : -2;
}

int32_t hr_operator_count(void) { return hr::table().count; }

const char* hr_operator_name(int32_t index) { return hr::table().rows[index].name; }

void hr_call(int32_t operator_index, const void* args, const hr_step* step) {
  hr::kernel_of(operator_index)(args, *step);
}
