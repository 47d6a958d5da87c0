// For every instruction set alike: sines are the C library's.
#include "rotary.h"

#include <cmath>

#include "pool.h"

void turn(const float* frequencies, const int64_t* positions, int64_t n, int pairs, float* cos,
          float* sin, int threads) {
  each_row((int)n, threads, [&](int i) {
    for (int64_t k = 0, at = (int64_t)i * pairs; k < pairs; k++, at++) {
      const float angle = (float)positions[i] * frequencies[k];
      cos[at] = std::cos(angle);
      sin[at] = std::sin(angle);
    }
  });
}
