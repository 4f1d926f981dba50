// Where the positions of a sequence are in a paged cache, and what to read ahead of. Part of the
// kernel files: the same rules as simd.h.
#pragma once
#include "attention_softmax.h"
#include "kv.h"

namespace HR_NS {

constexpr int kBlock = 64;  // positions of a panel; what is read in one go ends at a multiple of it

// Positions [first, last] of the span that begins at `begin`, relative to it, and where they are.
struct Span {
  int64_t begin;
  int64_t first, last;     // last < 0: nothing of it is read
  int64_t offsets[kSpan];  // in bytes; in blocks that are read, positions that are not repeat one
  int64_t heads[kSpan];    // in KV heads
};

// The first position that the query at `position` sees; it never falls from one to the next.
static inline int64_t oldest_seen(const hr_attention_args& args, int64_t position) {
  if (args.window <= 0) return 0;
  if (args.in_chunks) return position / args.window * args.window;
  return position >= args.window ? position - args.window + 1 : 0;
}

// Positions [low, newest] of the span at `begin`. `size` is what a position takes of the cache.
static inline void find(const hr_attention_args& args, const int32_t* pages, int64_t size,
                        int64_t begin, int64_t low, int64_t newest, Span& span) {
  span.begin = begin;
  span.first = low > begin ? low - begin : 0;
  span.last = newest - begin < kSpan ? newest - begin : kSpan - 1;
  if (span.last < 0) return;
  const int32_t page_size = static_cast<int32_t>(args.page_size);
  const int32_t at = static_cast<int32_t>(begin + span.first);
  int64_t page = at / page_size, inside = at % page_size;
  for (int64_t j = span.first; j <= span.last; ++page, inside = 0) {
    int64_t slot = static_cast<int64_t>(pages[page]) * page_size + inside;
    for (int64_t i = inside; i < page_size && j <= span.last; ++i, ++j, ++slot) {
      span.heads[j] = slot * args.kv_heads;
      span.offsets[j] = slot * size;
    }
  }
  const int64_t end = (span.last / kBlock + 1) * kBlock;
  for (int64_t j = span.last + 1; j < end; ++j) span.offsets[j] = span.offsets[span.last];
  for (int64_t j = span.first / kBlock * kBlock; j < span.first; ++j) {
    span.offsets[j] = span.offsets[span.first];
  }
}

// Where some neighboring positions of one head are.
struct Place {
  const char* rows;        // element 0 of the head at offset 0
  const int64_t* offsets;  // in bytes

  template <class T>
  __attribute__((always_inline)) inline const T* at(int64_t position) const {
    return reinterpret_cast<const T*>(rows + offsets[position]);
  }
};

namespace {

// Asks for memory that is read later, in the order of addresses, so that the CPU's own prefetchers
// go along. Whoever reads asks for as much as it reads.
class Ahead {
 public:
  Ahead() = default;
  // `count` rows of `size` bytes at `offsets` from `rows`.
  Ahead(const char* rows, const int64_t* offsets, int64_t count, int64_t size)
      : rows_(rows), offsets_(offsets), left_(count), size_(size) {}

  __attribute__((always_inline)) inline void lines(int64_t count) {
    if (next_ >= end_) {
      if (left_ <= 0) return;
      refill();
    }
    for (int64_t i = 0; i < count; ++i) __builtin_prefetch(next_ + i * 64, 0, 2);
    next_ += count * 64;
  }

 private:
  // The next run of rows without a gap.
  __attribute__((noinline)) void refill() {
    const int64_t from = *offsets_;
    int64_t to = from;
    for (; left_ > 0 && *offsets_ == to; ++offsets_, --left_) to += size_;
    next_ = rows_ + from;
    end_ = rows_ + to;
  }

  const char *next_ = nullptr, *end_ = nullptr;
  const char* rows_ = nullptr;
  const int64_t* offsets_ = nullptr;
  int64_t left_ = 0, size_ = 0;
};

}  // namespace

static constexpr int64_t lines_of(int64_t bytes) { return (bytes + 63) / 64; }

}  // namespace HR_NS
