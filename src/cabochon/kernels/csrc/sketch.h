// A matrix of floats told again in eight bits an entry, and how far off that can be: enough to know
// which of its products are the largest.
#pragma once
#include "rows.h"

namespace {

constexpr int SKETCH_GROUP = 64;  // columns that share a scale
constexpr int SKETCH_TOP = 127;   // the largest code; the one for zero is 128

struct Squares {
  F left, all;  // of what the codes leave, and of the entries
};

template <int TYPE>
INL void sketch_group(const uint8_t* row, int k, uint8_t* codes, uint16_t* scale, Squares* sums) {
  constexpr int PARTS = SKETCH_GROUP / LANES;
  F v[PARTS], q[PARTS], largest = fzero();
  for (int i = 0; i < PARTS; i++) {
    v[i] = entry<TYPE>(row, k + i * LANES);
    largest = fmax2(largest, fabs1(v[i]));
  }
  *scale = float_to_bf16(fmaximum(largest) / SKETCH_TOP);
  const float step = bf16_to_float(*scale);
  const F by = fsplat(step > 0x1p-120f ? 1 / step : 0.0f), steps = fsplat(step);
  for (int i = 0; i < PARTS; i++) {
    q[i] = fmin2(fround(fmul(v[i], by)), fsplat(SKETCH_TOP));
    q[i] = fmax2(q[i], fsplat(-SKETCH_TOP));
    const F left = fnma(q[i], steps, v[i]);
    sums->left = fma(left, left, sums->left);
    sums->all = fma(v[i], v[i], sums->all);
  }
  float whole[SKETCH_GROUP];
  for (int i = 0; i < PARTS; i++) fstore(whole + i * LANES, q[i]);
  for (int i = 0; i < SKETCH_GROUP; i++) codes[i] = (uint8_t)((int)whole[i] + SKETCH_TOP + 1);
}

// Every row of `m`, whose columns are a multiple of SKETCH_GROUP: its codes, its scales, and the norms
// of what the codes leave and of the row.
template <int TYPE>
static void sketch_as(const Rows& m, uint8_t* codes, uint16_t* scales, float* left, float* norms,
                      int threads) {
  const int groups = m.columns / SKETCH_GROUP;
  constexpr int EACH = 256;
  in_parallel((m.rows + EACH - 1) / EACH, threads, [&](int piece) {
    for (int64_t r = piece * EACH; r < std::min<int64_t>(m.rows, (piece + 1) * EACH); r++) {
      const uint8_t* row = m.data + r * m.columns * SIZE<TYPE>;
      Squares sums{fzero(), fzero()};
      for (int g = 0; g < groups; g++)
        sketch_group<TYPE>(row, g * SKETCH_GROUP, codes + (r * groups + g) * SKETCH_GROUP,
                           scales + r * groups + g, &sums);
      left[r] = std::sqrt(fsum(sums.left));
      norms[r] = std::sqrt(fsum(sums.all));
    }
  });
}

static void sketch_rows(const Rows& m, uint8_t* codes, uint16_t* scales, float* left, float* norms,
                        int threads) {
  switch (m.type) {
    case ROW_BF16: return sketch_as<ROW_BF16>(m, codes, scales, left, norms, threads);
    case ROW_F16: return sketch_as<ROW_F16>(m, codes, scales, left, norms, threads);
    default: return sketch_as<ROW_F32>(m, codes, scales, left, norms, threads);
  }
}

}  // namespace
