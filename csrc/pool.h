// One team of threads for all operators; the calling thread is a member.
//
// Work is `count` items, taken `grain` at a time. Every member begins with an equal part and works it
// off front to back; whoever is done helps the others, so a thread that lost its core costs at most
// one grain. Members spin for some tens of microseconds, then sleep.
// A value must never depend on which thread computed it or on where a range was cut.
//
// Everything here has internal linkage or lives in pool.cpp: this header is compiled at every
// instruction-set level, and the linker must not merge code of different levels.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace hr {

using Task = void (*)(void* context, int64_t begin, int64_t end);

// Calls task(context, begin, end) on ranges that cover [0, count) exactly once; returns when all
// are done. A call from inside a task, or while another thread owns the team, runs on the caller.
void run(int64_t count, int64_t grain, Task task, void* context);

// Threads that `run` may use, the caller included.
int threads();

// Changes it; 1 leaves the caller alone. At most 256.
void set_threads(int count);

// Memory of the calling thread, aligned to 64 bytes, at least `bytes` long, contents undefined.
// The next call on the same thread with the same `slot` (0..3) returns the same memory or frees it.
void* scratch(size_t bytes, int slot = 0);

// Nanoseconds of a clock that is never set.
int64_t now();

// body(begin, end), see `run`. `grain`: items per piece; make a piece 5 microseconds or more.
template <class Body>
static inline void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= grain) {
    if (count > 0) body(static_cast<int64_t>(0), count);
    return;
  }
  struct Call {
    static void range(void* context, int64_t begin, int64_t end) {
      (*static_cast<const Body*>(context))(begin, end);
    }
  };
  run(count, grain, &Call::range, const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace hr
