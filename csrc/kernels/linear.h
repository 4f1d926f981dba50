// Sizes of packed weights, shared by packing and multiplying.
#pragma once
#include "simd.h"

namespace HR_NS {

HR_INLINE int64_t panels(const hr_weight& w) { return (w.out + HR_PANEL - 1) / HR_PANEL; }
HR_INLINE int64_t pairs(const hr_weight& w) { return (w.in + 1) / 2; }
HR_INLINE int64_t panel_bytes(const hr_weight& w) {
  return pairs(w) * HR_PANEL * (w.dtype == HR_F32 ? 8 : 4);
}

}  // namespace HR_NS
