// One pool for the process. Pieces are taken in order, so that memory is read in order.
#include "pool.h"

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

// What is to be done. Fields but the atomic ones change only while no piece is left or under way.
struct Job {
  void (*work)(void*, int);
  void* context;
  int count;
  std::atomic<int> left{0};     // pieces that nobody has taken
  std::atomic<int> undone{0};   // pieces that are not finished
  std::atomic<int> helpers{0};  // how many may take some
};

// Kept on the heap and left there: threads may run until the very end of the process.
struct Pool {
  Job job;
  std::atomic<bool> taken{false};  // by one caller at a time
  std::mutex sleep;
  std::condition_variable wake;
  std::atomic<int> sleeping{0};
  int started = 0;

  // A piece of the job, or none. Taking one by compare-and-swap, and no other way, makes sure that
  // the job is whole: its fields stay while a piece that was taken is not finished.
  bool take() {
    int left = job.left.load(std::memory_order_acquire);
    while (left > 0 && !job.left.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
    }
    if (left <= 0) return false;
    job.work(job.context, job.count - left);
    job.undone.fetch_sub(1, std::memory_order_acq_rel);
    return true;
  }

  bool wanted(int number) {
    return job.left.load() > 0 && number < job.helpers.load();
  }

  void help(int number) {
    for (int spins = 0;;) {
      if (wanted(number)) {
        while (take()) {
        }
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
    for (; started < threads - 1 && started < MOST; started++)
      std::thread([this, number = started] { help(number); }).detach();
    job.work = work;
    job.context = context;
    job.count = count;
    job.helpers.store(threads - 1);
    job.undone.store(count);
    job.left.store(count);
    if (sleeping.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep);  // nobody is between looking and sleeping
      wake.notify_all();
    }
    while (take()) {
    }
    for (int spins = 0; job.undone.load(std::memory_order_acquire) > 0; spins++)
      if (spins < IMPATIENCE) pause_briefly();
      else sched_yield();
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
