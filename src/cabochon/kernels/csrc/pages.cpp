// Large pages, which are worth 10 % in decoding.
//
// The system clears a large page before it gives it away, and a virtual machine may have to ask its
// host for each piece of it: up to 10 ms a page were measured, where it is 0.5 else, and seconds for
// a model, in which both threads of a step wait for each other half of the time. Small pages come
// from what other processes left. So memory is filled in small pages, and made of large ones when
// nobody waits for it, a little at a time.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <thread>

#include "backlog.h"

namespace {

constexpr uintptr_t SMALL = 4096, LARGE = 2 << 20;
constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1

uintptr_t above(const void* data, uintptr_t unit) {
  return ((uintptr_t)data + unit - 1) / unit * unit;
}

}  // namespace

extern "C" {
// Of memory that is to be filled: ask for large pages if they cannot be had later.
void cabochon_advise(void* data, int64_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = above(data, SMALL);
  if (madvise((void*)first, 0, COLLAPSE) != 0)
    madvise((void*)first, (uintptr_t)data + size - first, MADV_HUGEPAGE);
#endif
}

// Fills memory with what lies elsewhere.
int64_t cabochon_copy(Backlog* backlog, uint8_t* to, const uint8_t* from, int64_t size) {
  constexpr int64_t PIECE = 1 << 18;
  return backlog->add((int)((size + PIECE - 1) / PIECE), [=](int i) {
    memcpy(to + i * PIECE, from + i * PIECE, std::min(PIECE, size - i * PIECE));
  });
}

// Of memory that is filled, and may be read and written meanwhile: have large pages, one by one, so
// that others who change what is mapped need not wait for all; after each, rest `rest` times as long
// as that took.
void cabochon_enlarge(void* data, int64_t size, int rest) {
#ifdef MADV_HUGEPAGE
  typedef std::chrono::steady_clock Clock;
  const uintptr_t end = (uintptr_t)data + size;
  for (uintptr_t at = above(data, LARGE); at + LARGE <= end; at += LARGE) {
    const Clock::time_point begun = Clock::now();
    // Where nothing was written yet there is nothing to be moved, and what is in use now is left.
    if (madvise((void*)at, LARGE, COLLAPSE) != 0 && errno == ENOMEM) return;
    if (rest) std::this_thread::sleep_for((Clock::now() - begun) * rest);
  }
#endif
}
}
