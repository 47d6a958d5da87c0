// How far each pair of a head turns at a token's position.
#include <cmath>
#include <cstdint>

#include "pool.h"

extern "C" {
// Cosines and sines `[n, pairs]` of `positions` times `frequencies`, in float32 as nn/rotary.py has it.
void cabochon_turn(const float* frequencies, const int64_t* positions, int n, int pairs, float* cos,
                   float* sin, int threads) {
  each_row(n, threads, [&](int i) {
    for (int64_t k = 0, at = (int64_t)i * pairs; k < pairs; k++, at++) {
      const float angle = (float)positions[i] * frequencies[k];
      cos[at] = std::cos(angle);
      sin[at] = std::sin(angle);
    }
  });
}
}
