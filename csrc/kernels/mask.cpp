// mask_logits: forbidden tokens get -inf. Words that allow everything or nothing, the usual ones,
// cost one test or one fill; logits that stay are not written.
#include "simd.h"

namespace HR_NS {

constexpr float kForbidden = -__builtin_inff();

HR_INLINE void mask_word(float* x, uint32_t allowed, int64_t count) {
  if (allowed == 0xFFFFFFFFu) return;
#if HR_LEVEL >= 2
  const __m512 forbidden = _mm512_set1_ps(kForbidden);
  const uint32_t bits = ~allowed & (count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1);
  _mm512_mask_storeu_ps(x, static_cast<__mmask16>(bits), forbidden);
  _mm512_mask_storeu_ps(x + 16, static_cast<__mmask16>(bits >> 16), forbidden);
#else
  for (int64_t i = 0; i < count; ++i) {
    if (!(allowed >> i & 1)) x[i] = kForbidden;
  }
#endif
}

static void mask_logits(const hr_mask_logits_args& args, const hr_step& step) {
  float* const logits = static_cast<float*>(args.logits.data);
  const int64_t columns = args.logits.columns, stride = args.logits.stride;
  const int64_t* const rows = args.rows;
  const int32_t* const masks = args.masks;
  const int64_t words = args.words;
  hr::parallel(step.tokens, 1 + (1 << 15) / (columns + 1), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const x = logits + rows[i] * stride;
      const int32_t* const mask = masks + i * words;
      for (int64_t at = 0; at < columns; at += 32) {
        const int64_t left = columns - at;
        mask_word(x + at, static_cast<uint32_t>(mask[at / 32]), left < 32 ? left : 32);
      }
    }
  });
}

HR_OPERATOR(mask_logits, hr_mask_logits_args)

}  // namespace HR_NS
