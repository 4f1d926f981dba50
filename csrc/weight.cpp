// Sizes of packed weights, for those who allocate them.
#include "headrace.h"

int64_t hr_weight_bytes(const hr_weight* weight) {
  const int64_t panels = (weight->out + HR_PANEL - 1) / HR_PANEL, pairs = (weight->in + 1) / 2;
  return panels * pairs * HR_PANEL * (weight->dtype == HR_F32 ? 8 : 4);
}
