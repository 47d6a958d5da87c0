// Shares many short jobs among as many threads as its argument says at most, and tells of the first
// of which not every piece was done once.
#include "pool.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

constexpr int JOBS = 100000, MANY = 3000, FEW = 40;  // pieces of every seventh job, and of others

static void piece(void* times, int i) {
  for (volatile int work = i % 5 * 20; work > 0;) work = work - 1;
  ((int*)times)[i]++;
}

int main(int, char** arguments) {
  const int most = std::atoi(arguments[1]);
  std::mt19937 random;
  std::vector<int> times(MANY);
  for (int job = 0; job < JOBS; job++) {
    const int count = 1 + random() % (job % 7 ? FEW : MANY), threads = 1 + random() % most;
    std::fill_n(times.begin(), count, 0);
    share_work(count, threads, piece, times.data());
    for (int i = 0; i < count; i++)
      if (times[i] != 1) {
        std::printf("job %d of %d threads: piece %d of %d was done %d times\n", job, threads, i, count,
                    times[i]);
        return 1;
      }
  }
}
