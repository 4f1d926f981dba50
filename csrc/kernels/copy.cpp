// copy: rows of one buffer into another of the same shape; also the smallest example of a kernel.
#include "simd.h"

namespace HR_NS {

static int64_t bytes_of(int32_t dtype) {
  return dtype == HR_F32 ? 4 : dtype == HR_BF16 || dtype == HR_F16 ? 2 : 1;
}

static void copy(const hr_copy_args& args, const hr_step& step) {
  const int64_t size = bytes_of(args.source.dtype), row = args.source.columns * size;
  const int64_t from = args.source.stride * size, to = args.target.stride * size;
  const char* source = static_cast<const char*>(args.source.data);
  char* target = static_cast<char*>(args.target.data);
  hr::parallel(step.tokens, 1 + (1 << 15) / (row + 1), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      memcpy(target + i * to, source + i * from, static_cast<size_t>(row));
    }
  });
}

HR_OPERATOR(copy, hr_copy_args)

}  // namespace HR_NS
