// probe_*: the limits that kernels are measured against: read bandwidth and multiply-add rates.
//
// probe_fma, probe_bf16, probe_int8 and probe_int4 keep HR_PROBE_CHAINS sums in registers, enough to
// hide the latency of two units. The integer ones do what the products with such weights do, without
// loads. probe_width tells the products of one such step, 0 where the level has no instruction.
// probe_start tells whether a core is shared: it starts instructions that do nothing else, which
// another hyperthread of the core halves, while multiply-adds alone may not show it.
#include "dot_int8.h"

// A register whose value the compiler may not guess.
#if HR_LEVEL >= 2
#define HR_OPAQUE(x) __asm__ volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define HR_OPAQUE(x) __asm__ volatile("" : "+x"(x))
#else
#define HR_OPAQUE(x) __asm__ volatile("" : "+m"(x))
#endif

namespace HR_NS {

static void probe_read(const hr_probe_args& args, const hr_step&) {
  hr::parallel(args.pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* data = static_cast<const char*>(args.data) + i * args.bytes;
      vu sums[4] = {};
      for (int64_t at = 0; at + 16 * kLanes <= args.bytes; at += 16 * kLanes) {
        prefetch(data + at + 1024);
        for (int v = 0; v < 4; ++v) {
          vu word;
          memcpy(&word, data + at + v * 4 * kLanes, sizeof word);
          sums[v] = sums[v] | word;
        }
      }
      args.sink[i] = sum(__builtin_convertvector(sums[0] | sums[1] | sums[2] | sums[3], vf));
    }
  });
}

// `rounds` times: every chain gets one more product of x and y. Opaque to the optimizer.
template <class Vector, class Multiply>
static float chains(int64_t rounds, Vector x, Vector y, const Multiply& multiply) {
  Vector sums[HR_PROBE_CHAINS] = {};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 64
    for (Vector& total : sums) {
      HR_OPAQUE(x);  // else products that are made before they are added are made only once
      total = multiply(total, x, y);
      HR_OPAQUE(total);
    }
  }
  float all = 0;
#pragma GCC unroll 64
  for (Vector total : sums) all += total[0];
  return all;
}

template <class Vector, class Multiply>
static void run_chains(const hr_probe_args& args, const Multiply& multiply) {
  hr::parallel(args.pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      args.sink[i] = chains(args.rounds, Vector{} + 1, Vector{} + 1, multiply);
    }
  });
}

static void probe_fma(const hr_probe_args& args, const hr_step&) {
  run_chains<vf>(args, [](vf c, vf x, vf y) { return fma(x, y, c); });
}

static void probe_bf16(const hr_probe_args& args, const hr_step&) {
#if HR_LEVEL >= 3
  run_chains<vf>(args, [](vf c, vf x, vf y) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)x, (__m512bh)y);
  });
#else
  probe_fma(args, hr_step{});
#endif
}

static void probe_int8(const hr_probe_args& args, const hr_step&) {
#if HR_LEVEL >= 3
  run_chains<vi>(args, [](vi c, vi x, vi y) { return dot4(c, (vu)x, y); });
#else
  run_chains<vi>(args, [](vi c, vi x, vi y) { return c + pair_dot((vs)x, (vs)y); });
#endif
}

static void probe_int4(const hr_probe_args& args, const hr_step&) {
#if HR_LEVEL >= 3
  probe_int8(args, hr_step{});
#else
  run_chains<vs>(args, [](vs c, vs x, vs y) { return dot_nibbles(c, (vu)x, (vu)y, (vu)y); });
#endif
}

// sink[0..3] = products per step of fma, bf16, int8 and int4.
static void probe_width(const hr_probe_args& args, const hr_step&) {
  args.sink[0] = kLanes;
  args.sink[1] = HR_LEVEL >= 3 ? 2 * kLanes : 0;
  args.sink[2] = HR_LEVEL >= 3 ? 4 * kLanes : 2 * kLanes;
  args.sink[3] = 4 * kLanes;
}

// sink[piece] = instructions per nanosecond.
static void probe_start(const hr_probe_args& args, const hr_step&) {
  constexpr int64_t kAtOnce = 128;  // the two of the loop do not count
  hr::parallel(args.pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = hr::now();
      for (int64_t n = args.rounds; n > 0; --n) __asm__ volatile(".rept 128\nnop\n.endr");
      const int64_t took = hr::now() - start;
      args.sink[i] = static_cast<float>(args.rounds * kAtOnce) / static_cast<float>(took + 1);
    }
  });
}

HR_OPERATOR(probe_read, hr_probe_args)
HR_OPERATOR(probe_fma, hr_probe_args)
HR_OPERATOR(probe_bf16, hr_probe_args)
HR_OPERATOR(probe_int8, hr_probe_args)
HR_OPERATOR(probe_int4, hr_probe_args)
HR_OPERATOR(probe_width, hr_probe_args)
HR_OPERATOR(probe_start, hr_probe_args)

}  // namespace HR_NS
