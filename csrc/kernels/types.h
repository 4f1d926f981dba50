// Rows of activations in any float dtype, and functions of vectors beyond simd.h.
//
// Part of the kernel files: the same rules as simd.h.
#pragma once
#include "simd.h"

namespace HR_NS {

template <class T>
HR_INLINE T* row_of(const hr_rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Up to kLanes elements; the lanes past them are zero, the memory past them is not touched.
template <class T>
HR_INLINE vf take(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count);
}
template <class T>
HR_INLINE void put(T* p, vf x, int64_t count) {
  if (count == kLanes) {
    store(p, x);
  } else {
    store_part(p, x, count);
  }
}

// Columns [column, column + columns) of some rows will be written.
HR_INLINE void expect_rows(const hr_rows& y, int64_t first, int64_t rows, int64_t column,
                           int64_t columns) {
  const int64_t size = y.dtype == HR_F32 ? 4 : 2;
  const char* at = static_cast<const char*>(y.data) + (first * y.stride + column) * size;
  for (int64_t r = 0; r < rows; ++r) prefetch_to_write(at + r * y.stride * size, columns * size);
}

// Elements [column, column + count) of a row, as fp32.
template <class T>
static inline void load_elements(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}
template <class T>
static inline void store_elements(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) narrow(from[i], to + i);
}
static inline void load_row(const hr_rows& rows, int64_t row, int64_t column, int64_t count,
                            float* to) {
  if (rows.dtype == HR_F32) load_elements(row_of<float>(rows, row) + column, count, to);
  if (rows.dtype == HR_BF16) load_elements(row_of<bf16>(rows, row) + column, count, to);
  if (rows.dtype == HR_F16) load_elements(row_of<f16>(rows, row) + column, count, to);
}
static inline void store_row(const hr_rows& rows, int64_t row, int64_t column, int64_t count,
                             const float* from) {
  if (rows.dtype == HR_F32) store_elements(from, count, row_of<float>(rows, row) + column);
  if (rows.dtype == HR_BF16) store_elements(from, count, row_of<bf16>(rows, row) + column);
  if (rows.dtype == HR_F16) store_elements(from, count, row_of<f16>(rows, row) + column);
}

// x as it is after a stay in memory.
template <class T>
HR_INLINE vf rounded(vf x) {
  alignas(64) T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

// Calls body(T()) for the element type of a float dtype.
template <class Body>
static inline void with_type(int32_t dtype, const Body& body) {
  if (dtype == HR_F32) body(float());
  if (dtype == HR_BF16) body(bf16());
  if (dtype == HR_F16) body(f16());
}

// e^x for x <= 0; the values of exp() of simd.h, with fewer steps. NaN for NaN.
HR_INLINE vf exp_falling(vf x) {
  const vf low = set(-87.3365f), magic = set(12582912.0f);
  const vf kept = max(low, x);
  const vf shifted = fma(kept, set(1.44269504f), magic), n = shifted - magic;
  vf r = fma(n, set(-0.693359375f), kept);
  r = fma(n, set(2.12194440e-4f), r);
  vf p = fma(r, set(1.3981999e-3f), set(8.3334519e-3f));
  p = fma(p, r, set(4.1665795e-2f));
  p = fma(p, r, set(1.6666666e-1f));
  p = fma(p, r, set(0.5f));
  p = fma(p, r * r, r) + set(1.0f);
  // The low bits of `shifted` are n: adding them to the exponent multiplies by 2^n.
  const vf y = (vf)((vi)p + ((vi)shifted << 23));
#if HR_LEVEL >= 2
  return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ),
                                 (__m512)y);
#else
  return select(x < low, zero(), y);
#endif
}

// Absolute error below 2e-7.
HR_INLINE vf tanh(vf x) { return set(1.0f) - set(2.0f) / (exp(x + x) + set(1.0f)); }

// Absolute error below 5e-7: Abramowitz and Stegun, 7.1.26.
HR_INLINE vf erf(vf x) {
  const vf size = max(x, zero() - x), t = set(1.0f) / fma(set(0.3275911f), size, set(1.0f));
  vf p = fma(set(1.061405429f), t, set(-1.453152027f));
  p = fma(p, t, set(1.421413741f));
  p = fma(p, t, set(-0.284496736f));
  p = fma(p, t, set(0.254829592f));
  const vf y = set(1.0f) - p * t * exp(zero() - size * size);
  return select(x < zero(), zero() - y, y);
}

template <int Activation>
HR_INLINE vf activate(vf x) {
  if (Activation == HR_SILU) return x / (set(1.0f) + exp(zero() - x));
  if (Activation == HR_GELU_TANH) {
    const vf inner = set(0.7978845608f) * fma(set(0.044715f) * x, x * x, x);
    return set(0.5f) * x * (set(1.0f) + tanh(inner));
  }
  if (Activation == HR_RELU || Activation == HR_RELU_SQUARED) {
    const vf kept = max(x, zero());
    return Activation == HR_RELU ? kept : kept * kept;
  }
  return set(0.5f) * x * (set(1.0f) + erf(x * set(0.7071067812f)));
}
HR_INLINE vf activate(vf x, int32_t activation) {
  if (activation == HR_SILU) return activate<HR_SILU>(x);
  if (activation == HR_RELU) return activate<HR_RELU>(x);
  if (activation == HR_RELU_SQUARED) return activate<HR_RELU_SQUARED>(x);
  return activation == HR_GELU_TANH ? activate<HR_GELU_TANH>(x) : activate<HR_GELU_ERF>(x);
}
HR_INLINE vf swiglu_clamped(vf gate, vf up, float alpha, float limit) {
  const vf g = min(gate, set(limit)), u = min(max(up, set(-limit)), set(limit));
  return g / (set(1.0f) + exp(set(-alpha) * g)) * (u + set(1.0f));
}

}  // namespace HR_NS
