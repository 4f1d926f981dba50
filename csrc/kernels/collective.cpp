// Collectives of ranks that share memory: all_reduce, all_gather, and send and receive between the
// stages of a pipeline. Ranks are processes or threads; each makes the same calls in the same order.
//
// A board has a line for each rank, which counts the meetings the rank has come to, and two sets of
// slots. A rank writes its part into the set of this meeting, says that it is there, waits for the
// others, and reads. It comes back to the same set two meetings later, and by then has seen everybody
// at the meeting between, so nobody still reads what it overwrites: one wait per meeting suffices.
//
// Sums are in fp32 in a binary tree over ranks: the sum of 4 ranks is that of 2 ranks with the sum of
// 2 each. Waiting spins for some tens of microseconds, then sleeps; a rank that waits for one that has
// died sleeps until its process is ended, which is the supervisor's business.
#include "types.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>

namespace HR_NS {

constexpr int64_t kSpin = 50'000;  // nanoseconds
constexpr int64_t kGrainBytes = 1 << 15;

// One counter that others wait for.
struct alignas(HR_BOARD_LINE) Line {
  std::atomic<uint32_t> count;
  std::atomic<uint32_t> sleepers;
};
static_assert(sizeof(Line) == HR_BOARD_LINE, "lines lie side by side");

static int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

static void announce(Line& line, uint32_t count) {
  line.count.store(count, std::memory_order_seq_cst);
  if (line.sleepers.load(std::memory_order_seq_cst) > 0) {
    syscall(SYS_futex, &line.count, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }
}

// Until the line counts at least `wanted`; counts may wrap around.
static void await(Line& line, uint32_t wanted) {
  const auto there = [&](uint32_t seen) { return static_cast<int32_t>(seen - wanted) >= 0; };
  const auto load = [&] { return line.count.load(std::memory_order_seq_cst); };
  if (there(load())) return;
  const int64_t end = now() + kSpin;
  do {
    for (int i = 0; i < 32; ++i) {
      if (there(load())) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    sched_yield();  // the other one may want this core
  } while (now() < end);
  line.sleepers.fetch_add(1, std::memory_order_seq_cst);
  const timespec second{1, 0};
  for (uint32_t seen = load(); !there(seen); seen = load()) {
    syscall(SYS_futex, &line.count, FUTEX_WAIT, seen, &second, nullptr, 0);
  }
  line.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

static int64_t size_of(int32_t dtype) { return dtype == HR_F32 ? 4 : 2; }

// ---- meetings -----------------------------------------------------------------------------------

struct Meeting {
  const hr_team& team;
  uint32_t number;

  explicit Meeting(const hr_team& team) : team(team), number(line(team.rank).count + 1) {}
  Line& line(int rank) const { return static_cast<Line*>(team.board)[rank]; }
  char* slots() const {
    return static_cast<char*>(team.board) + team.size * HR_BOARD_LINE +
           (number & 1) * team.size * team.slot;
  }
  char* slot(int rank) const { return slots() + rank * team.slot; }
  void meet() const {
    announce(line(team.rank), number);
    for (int rank = 0; rank < team.size; ++rank) await(line(rank), number);
  }
};

// body(first, last) for parts of `rows` rows of `bytes` bytes that fit into `room`.
template <class Body>
static void by_room(int64_t rows, int64_t bytes, int64_t room, const Body& body) {
  const int64_t most = room / bytes;
  for (int64_t first = 0; first < rows; first += most) {
    body(first, first + most < rows ? first + most : rows);
  }
}

// ---- all_reduce ---------------------------------------------------------------------------------

// Where rank `first` has its row; the next rank's is `step` bytes further.
template <class T>
static vf tree(const char* first, int64_t step, int ranks, int64_t column, int64_t n) {
  if (ranks == 1) return take(reinterpret_cast<const T*>(first) + column, n);
  const int half = ranks / 2;
  return tree<T>(first, step, half, column, n) +
         tree<T>(first + half * step, step, ranks - half, column, n);
}

template <class X, class Y>
static void sum_rows(const hr_all_reduce_args& args, const char* from, int64_t stride,
                     int64_t first, int64_t last) {
  const int64_t columns = args.x.columns, ranks = args.team.size;
  hr::parallel(last - first, 1 + kGrainBytes / (columns * ranks * 4), [=](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) {
      Y* y = row_of<Y>(args.y, first + i);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const int64_t n = columns - c < kLanes ? columns - c : kLanes;
        put(y + c, tree<X>(from + i * stride, args.team.slot, static_cast<int>(ranks), c, n), n);
      }
    }
  });
}

static void sum_rows(const hr_all_reduce_args& args, const char* from, int64_t stride,
                     int64_t first, int64_t last) {
  with_type(args.x.dtype, [&](auto x) {
    with_type(args.y.dtype, [&](auto y) {
      sum_rows<decltype(x), decltype(y)>(args, from, stride, first, last);
    });
  });
}

static void all_reduce(const hr_all_reduce_args& args, const hr_step& step) {
  const int64_t size = size_of(args.x.dtype), bytes = args.x.columns * size;
  const char* x = static_cast<const char*>(args.x.data);
  if (args.team.size == 1) {
    sum_rows(args, x, args.x.stride * size, 0, step.tokens);
    return;
  }
  by_room(step.tokens, bytes, args.team.slot, [&](int64_t first, int64_t last) {
    const Meeting meeting(args.team);
    char* own = meeting.slot(args.team.rank);
    hr::parallel(last - first, 1 + kGrainBytes / bytes, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        memcpy(own + i * bytes, x + (first + i) * args.x.stride * size, static_cast<size_t>(bytes));
      }
    });
    meeting.meet();
    sum_rows(args, meeting.slots(), bytes, first, last);
  });
}

// ---- all_gather ---------------------------------------------------------------------------------

static void move_spans(const char* from, char* to, const hr_span* spans, int64_t count,
                       int64_t size) {
  for (int64_t s = 0; s < count; ++s) {
    memcpy(to + spans[s].whole * size, from + spans[s].part * size,
           static_cast<size_t>(spans[s].count * size));
  }
}

static void all_gather(const hr_all_gather_args& args, const hr_step& step) {
  const int64_t size = size_of(args.x.dtype), bytes = args.y.columns * size;
  const int64_t from = args.x.stride * size, to = args.y.stride * size;
  const char* x = static_cast<const char*>(args.x.data);
  char* y = static_cast<char*>(args.y.data);
  if (args.team.size == 1) {
    for (int64_t i = 0; i < step.tokens; ++i) {
      move_spans(x + i * from, y + i * to, args.spans, args.count, size);
    }
    return;
  }
  by_room(step.tokens, bytes, args.team.slot * args.team.size, [&](int64_t first, int64_t last) {
    const Meeting meeting(args.team);
    char* rows = meeting.slots();
    const int64_t grain = 1 + kGrainBytes / bytes;
    hr::parallel(last - first, grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        move_spans(x + (first + i) * from, rows + i * bytes, args.spans, args.count, size);
      }
    });
    meeting.meet();
    hr::parallel(last - first, grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        memcpy(y + (first + i) * to, rows + i * bytes, static_cast<size_t>(bytes));
      }
    });
  });
}

// The other way, without ranks: this rank's part of whole rows, zero where no span is.
static void take_part(const hr_take_part_args& args, const hr_step& step) {
  const int64_t size = size_of(args.x.dtype), bytes = args.y.columns * size;
  hr::parallel(step.tokens, 1 + kGrainBytes / bytes, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const char* x = static_cast<const char*>(args.x.data) + i * args.x.stride * size;
      char* y = static_cast<char*>(args.y.data) + i * args.y.stride * size;
      memset(y, 0, static_cast<size_t>(bytes));
      for (int64_t s = 0; s < args.count; ++s) {
        const hr_span& span = args.spans[s];
        memcpy(y + span.part * size, x + span.whole * size, static_cast<size_t>(span.count * size));
      }
    }
  });
}

// ---- send, receive ------------------------------------------------------------------------------

// The two counters of a pipe, blocks sent and blocks taken, then its blocks.
struct Pipe {
  Line *sent, *taken;
  char* blocks;

  explicit Pipe(void* memory)
      : sent(static_cast<Line*>(memory)), taken(sent + 1), blocks(reinterpret_cast<char*>(sent + 2)) {}
  char* block(uint32_t number, int64_t bytes) const {
    return blocks + number % HR_PIPE_BLOCKS * bytes;
  }
};

static void send(const hr_pass_args& args, const hr_step& step) {
  const Pipe pipe(args.pipe);
  const int64_t size = size_of(args.x.dtype), bytes = args.x.columns * size;
  by_room(step.tokens, bytes, args.block, [&](int64_t first, int64_t last) {
    const uint32_t number = pipe.sent->count.load(std::memory_order_relaxed);
    await(*pipe.taken, number - HR_PIPE_BLOCKS + 1);
    char* to = pipe.block(number, args.block);
    for (int64_t i = first; i < last; ++i) {
      memcpy(to + (i - first) * bytes,
             static_cast<const char*>(args.x.data) + i * args.x.stride * size,
             static_cast<size_t>(bytes));
    }
    announce(*pipe.sent, number + 1);
  });
}

static void receive(const hr_pass_args& args, const hr_step& step) {
  const Pipe pipe(args.pipe);
  const int64_t size = size_of(args.x.dtype), bytes = args.x.columns * size;
  by_room(step.tokens, bytes, args.block, [&](int64_t first, int64_t last) {
    const uint32_t number = pipe.taken->count.load(std::memory_order_relaxed);
    await(*pipe.sent, number + 1);
    const char* from = pipe.block(number, args.block);
    for (int64_t i = first; i < last; ++i) {
      memcpy(static_cast<char*>(args.x.data) + i * args.x.stride * size,
             from + (i - first) * bytes, static_cast<size_t>(bytes));
    }
    announce(*pipe.taken, number + 1);
  });
}

HR_OPERATOR(all_reduce, hr_all_reduce_args)
HR_OPERATOR(all_gather, hr_all_gather_args)
HR_OPERATOR(take_part, hr_take_part_args)
HR_OPERATOR(send, hr_pass_args)
HR_OPERATOR(receive, hr_pass_args)

}  // namespace HR_NS
