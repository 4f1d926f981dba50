// Sizes of packed weights, for those who allocate them.
#include "headrace.h"

static int64_t up(int64_t value, int64_t by) { return (value + by - 1) / by; }

int64_t hr_weight_bytes(const hr_weight* weight) {
  int64_t input_bytes;  // of one output
  if (weight->dtype == HR_I8) {
    input_bytes = up(weight->in, 4) * 4;
  } else if (weight->dtype == HR_F8) {
    input_bytes = weight->in;
  } else if (weight->dtype == HR_I4) {
    const int64_t scale = weight->scaling == HR_SYMMETRIC ? 2 : weight->scaling == HR_ZEROS ? 4 : 8;
    input_bytes = up(weight->in, weight->group) * (scale + weight->group / 2);
  } else {
    input_bytes = up(weight->in, 2) * (weight->dtype == HR_F32 ? 8 : 4);
  }
  return up(weight->out, HR_PANEL) * HR_PANEL * input_bytes;
}
