// pack and unpack: between a matrix [out, in] and its panels (see hr_weight in headrace.h).
#include "linear.h"
#include "simd.h"

namespace HR_NS {

// Element [k][j] of a panel is what row j has at k: plain for fp32 and f16, in pairs of k for bf16.
HR_INLINE int64_t place(int32_t dtype, int64_t k, int64_t j) {
  return dtype == HR_BF16 ? (k / 2 * HR_PANEL + j) * 2 + k % 2 : k * HR_PANEL + j;
}

// `rows` rows of `source` into a panel, from k = `from` on; blocks of k keep both sides in the
// first-level cache.
template <class T>
static void fill_panel(const hr_weight& w, const T* source, int64_t stride, int64_t rows, T* panel,
                       int64_t from) {
  constexpr int64_t kBlock = 32;
  for (int64_t first = from; first < w.in; first += kBlock) {
    const int64_t last = first + kBlock < w.in ? first + kBlock : w.in;
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t k = first; k < last; ++k) panel[place(w.dtype, k, j)] = source[j * stride + k];
    }
  }
}

// Nobody reads a panel soon: past the caches, which would first fetch what is overwritten.
HR_INLINE void stream(void* to, vu words) {
#if HR_LEVEL >= 2
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)words);
#else
  *static_cast<vu*>(to) = words;
#endif
}

// Rows j and j + kStep trade what lies across the diagonal of each square of 2 kStep.
template <int kStep>
HR_INLINE void trade(vu* rows) {
  vi upper, lower;
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = i & kStep ? kLanes + i - kStep : i;
    lower[i] = i & kStep ? kLanes + i : i + kStep;
  }
  for (int j = 0; j < kLanes; ++j) {
    if (j & kStep) continue;
    const vu above = rows[j], below = rows[j + kStep];
    rows[j] = __builtin_shuffle(above, below, upper);
    rows[j + kStep] = __builtin_shuffle(above, below, lower);
  }
}

// Whole panels of 32-bit words [word of k][row]: fp32, and bf16 in pairs. Returns how many words of
// each row are done, which is all but fewer than kLanes.
static int64_t turn_words(const char* source, int64_t stride_bytes, int64_t words, char* panel) {
  const int64_t done = words - words % kLanes;
  for (int64_t k = 0; k < done; k += kLanes) {
    for (int64_t j = 0; j < HR_PANEL; j += kLanes) {
      vu square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        memcpy(square + i, source + (j + i) * stride_bytes + k * 4, sizeof(vu));
      }
      trade<1>(square);
      trade<2>(square);
      if constexpr (kLanes > 4) trade<4>(square);
      if constexpr (kLanes > 8) trade<8>(square);
      for (int i = 0; i < kLanes; ++i) stream(panel + ((k + i) * HR_PANEL + j) * 4, square[i]);
    }
  }
  return done;
}

template <class T>
static void pack_as(const hr_pack_args& args) {
  const hr_weight w = args.weight;
  const int64_t stride = args.source.stride, bytes = panel_bytes(w);
  hr::parallel(panels(w), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      char* panel = static_cast<char*>(w.data) + p * bytes;
      const int64_t first = p * HR_PANEL, left = w.out - first;
      const int64_t rows = left < HR_PANEL ? left : HR_PANEL;
      if (rows < HR_PANEL || w.in % 2) memset(panel, 0, static_cast<size_t>(bytes));
      const T* source = static_cast<const T*>(args.source.data) + first * stride;
      int64_t done = 0;
      if (rows == HR_PANEL && w.dtype != HR_F16) {
        constexpr int64_t kPerWord = 4 / sizeof(T);
        done = kPerWord * turn_words(reinterpret_cast<const char*>(source), stride * sizeof(T),
                                     w.in / kPerWord, panel);
      }
      fill_panel(w, source, stride, rows, reinterpret_cast<T*>(panel), done);
    }
#if HR_LEVEL >= 2
    _mm_sfence();
#endif
  });
}

static void pack(const hr_pack_args& args, const hr_step&) {
  if (args.weight.dtype == HR_F32) {
    pack_as<float>(args);
  } else {
    pack_as<uint16_t>(args);
  }
}

template <class T, class Y>
static void unpack_as(const hr_unpack_args& args, const hr_step& step) {
  const hr_weight w = args.weight;
  hr::parallel(step.tokens, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = step.ids[i] - args.first;
      Y* y = static_cast<Y*>(args.y.data) + i * args.y.stride;
      if (row < 0 || row >= w.out) {
        memset(y, 0, static_cast<size_t>(w.in) * sizeof(Y));
        continue;
      }
      const char* panel = static_cast<const char*>(w.data) + row / HR_PANEL * panel_bytes(w);
      const T* elements = reinterpret_cast<const T*>(panel);
      for (int64_t k = 0; k < w.in; ++k) {
        narrow(widen(elements[place(w.dtype, k, row % HR_PANEL)]), y + k);
      }
    }
  });
}

template <class T>
static void unpack_from(const hr_unpack_args& args, const hr_step& step) {
  if (args.y.dtype == HR_F32) {
    unpack_as<T, float>(args, step);
  } else if (args.y.dtype == HR_BF16) {
    unpack_as<T, bf16>(args, step);
  } else {
    unpack_as<T, f16>(args, step);
  }
}

static void unpack(const hr_unpack_args& args, const hr_step& step) {
  if (args.weight.dtype == HR_F32) {
    unpack_from<float>(args, step);
  } else if (args.weight.dtype == HR_BF16) {
    unpack_from<bf16>(args, step);
  } else {
    unpack_from<f16>(args, step);
  }
}

HR_OPERATOR(pack, hr_pack_args)
HR_OPERATOR(unpack, hr_unpack_args)

}  // namespace HR_NS
