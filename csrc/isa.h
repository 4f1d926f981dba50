// Instruction-set levels: what this CPU and operating system allow.
#pragma once
#include "headrace.h"

namespace hr {

// The highest level that may run here.
hr_level best_level();

// Whether this process may use AMX; asks the system for it.
hr_permission amx_permission();

}  // namespace hr
