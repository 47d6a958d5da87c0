// One pool for the process. A thread takes pieces in a row: where one begins far from the last, nothing
// of it has been fetched, and on two cores that read 60 GB/s every tenth byte was waited for.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <pthread.h>
#include <sched.h>
#include <thread>

namespace {

constexpr int SPINS = 2000;      // before a thread sleeps; a layer's next product comes sooner
constexpr int IMPATIENCE = 200;  // before a caller lets others run, whom it may be waiting for
constexpr int MOST = 255;        // helpers

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Pieces `first` to `last` that nobody has begun; both in one number, to be changed at once.
typedef uint64_t Range;
inline Range range(uint32_t first, uint32_t last) { return (Range)last << 32 | first; }
inline uint32_t first_of(Range r) { return (uint32_t)r; }
inline uint32_t last_of(Range r) { return r >> 32; }
inline uint32_t count(Range r) { return last_of(r) - first_of(r); }

// What a thread has before it. It takes from the front; others who have nothing get the later half.
// Only its thread makes it anything when it is empty, so that no piece is forgotten.
struct alignas(64) Share {
  std::atomic<Range> left{0};

  bool take(int* piece) {
    Range seen = left.load(std::memory_order_acquire);
    while (count(seen)) {
      const Range rest = range(first_of(seen) + 1, last_of(seen));
      if (!left.compare_exchange_weak(seen, rest, std::memory_order_acq_rel)) continue;
      *piece = (int)first_of(seen);
      return true;
    }
    return false;
  }

  bool give_half(Share& to) {
    Range seen = left.load(std::memory_order_acquire);
    while (count(seen)) {
      const uint32_t middle = first_of(seen) + count(seen) / 2;
      const Range rest = range(first_of(seen), middle);
      if (!left.compare_exchange_weak(seen, rest, std::memory_order_acq_rel)) continue;
      to.left.store(range(middle, last_of(seen)), std::memory_order_release);
      return true;
    }
    return false;
  }
};

// What is to be done. Fields but the atomic ones change only while no piece is left or under way.
struct Job {
  void (*work)(void*, int);
  void* context;
  std::atomic<int> undone{0};   // pieces that are not finished
  std::atomic<int> threads{0};  // how many may take some: the caller, and helpers
  Share shares[MOST + 1];
};

// Kept on the heap and left there: threads may run until the very end of the process.
struct Pool {
  Job job;
  std::atomic<bool> taken{false};  // by one caller at a time
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};
  int started = 0;

  // Does a piece of the job, if there is one. Taking by compare-and-swap, and no other way, makes
  // sure that the job is whole: its fields stay while a piece that was taken is not finished. Who
  // was about to rob may find itself in a later job, even one that has fewer threads: what it then
  // got, only it can do.
  bool take(int number) {
    Share& own = job.shares[number];
    int piece;
    while (!own.take(&piece))
      if (!rob(number)) return false;
    job.work(job.context, piece);
    job.undone.fetch_sub(1, std::memory_order_acq_rel);
    return true;
  }

  bool rob(int number) {
    for (;;) {
      Share* richest = nullptr;
      uint32_t most = 0;
      const int threads = job.threads.load();
      for (int i = 0; i < threads && number < threads; i++)
        if (const uint32_t has = count(job.shares[i].left.load()); has > most)
          richest = &job.shares[i], most = has;
      if (!richest) return false;
      if (richest->give_half(job.shares[number])) return true;
    }
  }

  bool wanted(int number) {
    const int threads = job.threads.load();
    for (int i = 0; i < threads && number < threads; i++)
      if (count(job.shares[i].left.load())) return true;
    return false;
  }

  void help(int number) {
    for (int spins = 0;;) {
      if (take(number)) {
        spins = 0;
      } else if (++spins < SPINS) {
        pause_briefly();
      } else {
        std::unique_lock<std::mutex> lock(sleep);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return wanted(number); });
        sleeping.fetch_sub(1);
        spins = 0;
      }
    }
  }

  void run(int count, int threads, void (*work)(void*, int), void* context) {
    threads = std::min({threads, count, MOST + 1});
    for (; started < threads - 1; started++)
      std::thread([this, number = started + 1] { help(number); }).detach();
    job.work = work;
    job.context = context;
    job.threads.store(threads);
    job.undone.store(count);
    job.shares[0].left.store(range(0, count));  // of which the others get theirs
    if (sleeping.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep);  // nobody is between looking and sleeping
      wake.notify_all();
    }
    for (int spins = 0; job.undone.load(std::memory_order_acquire) > 0;) {
      if (take(0)) spins = 0;
      else if (++spins < IMPATIENCE) pause_briefly();
      else sched_yield();
    }
  }
};

Pool* pool() {
  static Pool* made = new Pool;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { made = new Pool; });
  (void)registered;
  return made;
}

}  // namespace

void share_work(int count, int threads, void (*work)(void*, int), void* context) {
  Pool* all = count > 1 && threads > 1 ? pool() : nullptr;
  if (all && !all->taken.exchange(true)) {
    all->run(count, threads, work, context);
    all->taken.store(false);
    return;
  }
  for (int i = 0; i < count; i++) work(context, i);
}
