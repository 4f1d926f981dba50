// Sizes of packed weights, for those who allocate them.
#include "headrace.h"

static int64_t up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t hr_weight_bytes(const hr_weight* weight) {
  int64_t input_bytes;  // of one output
  if (weight->dtype == HR_I8) {
    input_bytes = up(weight->in, 4) * 4;
  } else if (weight->dtype == HR_T4) {
    return up(weight->out, HR_PANEL) * HR_PANEL / 2 * weight->in + 64;
  } else if (weight->dtype == HR_F8) {
    input_bytes = weight->in;
  } else if (weight->dtype == HR_I4 || weight->dtype == HR_G8 || weight->dtype == HR_MX4) {
    const int64_t scale[] = {2, 4, 8, 4};  // by hr_scaling
    const int64_t values = weight->dtype == HR_G8 ? weight->group : weight->group / 2;
    input_bytes = up(weight->in, weight->group) * (scale[weight->scaling] + values);
  } else {
    input_bytes = up(weight->in, 2) * (weight->dtype == HR_F32 ? 8 : 4);
  }
  return up(weight->out, HR_PANEL) * HR_PANEL * input_bytes;
}
