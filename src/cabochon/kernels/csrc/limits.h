// What the machine can do at most: to compare with what the kernels reach.
#pragma once
#include "integer.h"

namespace {

#if defined(CABOCHON_AVX512) || defined(CABOCHON_AVX2)
#define HIDE(x) asm volatile("" : "+x"(x))
#elif defined(CABOCHON_NEON)
#define HIDE(x) asm volatile("" : "+w"(x))
#else
#define HIDE(x) asm volatile("" : "+m"(x))
#endif

static double peak(int64_t rounds, int threads) {
  constexpr int CHAINS = LANES == 16 ? 12 : 8;
  in_parallel(threads, threads, [&](int) {
    const int8_t one[4] = {1, 1, 1, 1};
    V w = splat8(1), a = quad(one);
    Dot<4> d[CHAINS];
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) d[c].template add<0, 8>(w, a);
    for (int64_t i = 0; i < rounds; i++) {
      HIDE(w);
#pragma GCC unroll 16
      for (int c = 0; c < CHAINS; c++) d[c].template add<1, 8>(w, a);
    }
    F sum = fzero();
    for (int c = 0; c < CHAINS; c++) sum = fadd(sum, d[c].total());
    HIDE(sum);
  });
  return 2.0 * rounds * CHAINS * LANES * 4 * threads;
}

static void read_all(const uint8_t* data, int64_t size, int threads) {
  in_parallel((int)(size / CHUNK), threads, [&](int piece) {
    const uint8_t* from = data + piece * CHUNK;
    V sum = splat8(0);
    for (int64_t i = 0; i < CHUNK; i += LANES * 4) {
      if (i % 64 == 0) __builtin_prefetch(from + i + AHEAD);
      sum = either(sum, load(from + i));
    }
    HIDE(sum);
  });
}

}  // namespace
