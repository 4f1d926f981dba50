// The team of pool.h: a job is published by a new epoch; members join while it is open.
//
// Each member begins with an equal share of the pieces and takes them in rising order, so that it
// knows what it reads next (kernels fetch it ahead); one that is done takes half of what another has
// left. A range is always in one share or at work, so each piece runs exactly once.
//
// `state` holds epoch << 32 | closed | waiting | members at work, so that joining, closing and
// leaving are single atomic steps. A member that comes too late does not join, so the caller waits
// only for ranges that were really begun.
#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <mutex>

namespace hr {
namespace {

constexpr int kMostThreads = 256;
constexpr int64_t kSpinNanoseconds = 40'000;
constexpr uint64_t kClosed = 1u << 31, kWaiting = 1u << 30, kMembers = kWaiting - 1;

struct Job {
  Task task;
  void* context;
  int64_t count, grain;
  int members;  // that have a share
};

struct alignas(64) Share {
  std::atomic<uint64_t> pieces{0};  // first << 32 | last
};

std::mutex owner;  // held by the thread whose job runs
std::atomic<int> size{1};
int started = 1;  // threads that exist, the caller included; guarded by `owner`
Job job;          // written only while no member is at work
Share shares[kMostThreads];
alignas(64) std::atomic<uint64_t> state{kClosed};
alignas(64) std::atomic<uint32_t> epoch{0};
std::atomic<int> sleepers{0};
thread_local bool inside = false;  // this thread is running a task

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void futex_wait(void* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void futex_wake(void* word, int count) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
}

// True as soon as `done` is; false after the time for spinning.
template <class Done>
bool spin(const Done& done) {
  const int64_t end = now() + kSpinNanoseconds;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (now() < end);
  return done();
}

uint64_t range(uint64_t first, uint64_t last) { return first << 32 | last; }

// Takes the first piece of a share, if there is one.
bool take(Share& share, int64_t* piece) {
  uint64_t seen = share.pieces.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t first = seen >> 32, last = seen & UINT32_MAX;
    if (first >= last) return false;
    *piece = static_cast<int64_t>(first);
    if (share.pieces.compare_exchange_weak(seen, range(first + 1, last))) return true;
  }
}

// Moves the second half of another's share into `own`, which is empty.
bool steal(Share& from, Share& own) {
  uint64_t seen = from.pieces.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t first = seen >> 32, last = seen & UINT32_MAX;
    if (first >= last) return false;
    const uint64_t middle = first + (last - first) / 2;
    if (!from.pieces.compare_exchange_weak(seen, range(first, middle))) continue;
    own.pieces.store(range(middle, last));
    return true;
  }
}

bool steal_any(int index, int members) {
  for (int i = 1; i < members; ++i) {
    if (steal(shares[(index + i) % members], shares[index])) return true;
  }
  return false;
}

void work(const Job& todo, int index) {
  inside = true;
  do {
    int64_t piece;
    while (take(shares[index], &piece)) {
      const int64_t begin = piece * todo.grain, end = begin + todo.grain;
      todo.task(todo.context, begin, end < todo.count ? end : todo.count);
    }
  } while (steal_any(index, todo.members));
  inside = false;
}

bool join(uint32_t wanted) {
  uint64_t seen = state.load(std::memory_order_acquire);
  while ((seen >> 32) == wanted && !(seen & kClosed)) {
    if (state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

uint32_t* low_half(std::atomic<uint64_t>& word) {  // little endian
  return reinterpret_cast<uint32_t*>(&word);
}

void leave() {
  const uint64_t left = state.fetch_sub(1, std::memory_order_acq_rel) - 1;
  if ((left & kWaiting) && !(left & kMembers)) futex_wake(low_half(state), INT_MAX);
}

void pin(int index) {
  cpu_set_t allowed, own;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int place = index % CPU_COUNT(&allowed);
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed) || place-- > 0) continue;
    CPU_ZERO(&own);
    CPU_SET(core, &own);
    sched_setaffinity(0, sizeof own, &own);
    return;
  }
}

// A member's life. Numbers begin at 1; 0 is whoever calls `run`.
void* member(void* argument) {
  const int index = static_cast<int>(reinterpret_cast<intptr_t>(argument));
  pin(index);
  uint32_t seen = 0;
  for (;;) {
    const auto news = [&] { return epoch.load(std::memory_order_acquire) != seen; };
    if (!spin(news)) {
      sleepers.fetch_add(1, std::memory_order_seq_cst);
      while (!news()) futex_wait(&epoch, seen);
      sleepers.fetch_sub(1, std::memory_order_relaxed);
    }
    seen = epoch.load(std::memory_order_acquire);
    if (index < size.load(std::memory_order_relaxed) && join(seen)) {
      work(job, index);
      leave();
    }
  }
  return nullptr;
}

void start_members() {
  const int wanted = size.load(std::memory_order_relaxed);
  for (; started < wanted; ++started) {
    pthread_t thread;
    void* index = reinterpret_cast<void*>(static_cast<intptr_t>(started));
    if (pthread_create(&thread, nullptr, member, index) != 0) return;  // fewer will do
    pthread_detach(thread);
  }
}

void publish(const Job& todo) {
  job = todo;
  const int64_t pieces = (todo.count + todo.grain - 1) / todo.grain;
  for (int i = 0; i < todo.members; ++i) {
    const int64_t first = i * pieces / todo.members, last = (i + 1) * pieces / todo.members;
    shares[i].pieces.store(range(static_cast<uint64_t>(first), static_cast<uint64_t>(last)),
                           std::memory_order_relaxed);
  }
  const uint32_t fresh = epoch.load(std::memory_order_relaxed) + 1;
  state.store(static_cast<uint64_t>(fresh) << 32, std::memory_order_release);
  epoch.store(fresh, std::memory_order_seq_cst);
  if (sleepers.load(std::memory_order_seq_cst) > 0) futex_wake(&epoch, INT_MAX);
}

void close_and_wait() {
  state.fetch_or(kClosed, std::memory_order_acq_rel);
  const auto done = [] { return !(state.load(std::memory_order_acquire) & kMembers); };
  if (spin(done)) return;
  state.fetch_or(kWaiting, std::memory_order_acq_rel);
  // What is waited on is the very value that had members in it: one who leaves in between has
  // changed it, so its wake cannot be missed.
  for (;;) {
    const uint64_t seen = state.load(std::memory_order_acquire);
    if (!(seen & kMembers)) return;
    futex_wait(low_half(state), static_cast<uint32_t>(seen));
  }
}

// A forked child has none of the parent's threads.
void forget_members() {
  started = 1;
  state.store(kClosed, std::memory_order_relaxed);
  sleepers.store(0, std::memory_order_relaxed);
  new (&owner) std::mutex;
}

const int at_fork = pthread_atfork(nullptr, nullptr, forget_members);

struct Scratch {
  void* data[4] = {};
  size_t bytes[4] = {};
  ~Scratch() {
    for (void* memory : data) free(memory);
  }
};
thread_local Scratch own_scratch;

}  // namespace

void run(int64_t count, int64_t grain, Task task, void* context) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const bool alone = size.load(std::memory_order_relaxed) == 1 || count <= grain || inside;
  if (alone || !owner.try_lock()) {
    task(context, 0, count);
    return;
  }
  start_members();
  publish({task, context, count, grain, threads()});
  work(job, 0);
  close_and_wait();
  owner.unlock();
}

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

int threads() { return size.load(std::memory_order_relaxed); }

void set_threads(int count) {
  size.store(count < 1 ? 1 : count > kMostThreads ? kMostThreads : count);
}

void* scratch(size_t bytes, int slot) {
  Scratch& own = own_scratch;
  if (own.bytes[slot] < bytes) {
    free(own.data[slot]);
    own.bytes[slot] = (bytes + 4095) & ~static_cast<size_t>(4095);
    own.data[slot] = aligned_alloc(4096, own.bytes[slot]);
    if (!own.data[slot]) abort();  // nothing useful can follow
  }
  return own.data[slot];
}

}  // namespace hr
