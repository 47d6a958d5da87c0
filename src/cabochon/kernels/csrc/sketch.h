// A matrix of floats told again in six bits an entry, and how far off that can be: enough to know
// which of its products are the largest.
#pragma once
#include "backlog.h"
#include "pack.h"
#include "rows.h"

namespace {

constexpr int SKETCH_GROUP = 64;  // columns that share a scale
constexpr int SKETCH_TOP = 31;    // the largest code; the one for zero is 32

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

// What rows are packed from: codes, a byte each, in their order, and a bfloat16 for each group.
inline Stored sketched(const uint8_t* codes, const uint16_t* scales, int columns) {
  const int groups = columns / SKETCH_GROUP;
  Stored s = {codes, columns, columns, {UNIT, UNIT, 0, 0, 1, {{0, 8, 0, 0}}}, {}};
  s.grouped[0] = {(const uint8_t*)scales, 0, groups * 2, 2, groups, 2};
  return s;
}

// The block `b` of `to`, of as many rows of `m` with a multiple of SKETCH_GROUP columns; and how far
// off products with it are, by the norms of what the codes leave and of the row.
template <int TYPE>
static void sketch_block(const Rows& m, const Matrix& to, const Margin& margin, int64_t b) {
  const int groups = m.columns / SKETCH_GROUP, count = std::min<int64_t>(ROWS, m.rows - b * ROWS);
  static thread_local Room room;
  uint16_t* scales = (uint16_t*)room.of((ROWS * (m.columns + groups * 2) + 3) / 4);
  uint8_t* codes = (uint8_t*)(scales + ROWS * groups);
  for (int i = 0; i < count; i++) {
    const int64_t r = b * ROWS + i;
    const uint8_t* row = m.data + r * m.columns * SIZE<TYPE>;
    Squares sums{fzero(), fzero()};
    for (int g = 0; g < groups; g++)
      sketch_group<TYPE>(row, g * SKETCH_GROUP, codes + (i * groups + g) * SKETCH_GROUP,
                         scales + i * groups + g, &sums);
    margin.of[r] = std::sqrt(fsum(sums.left)) * margin.left + std::sqrt(fsum(sums.all)) * margin.all +
                   margin.least;
  }
  pack(to, sketched(codes, scales, m.columns), b);
}

static int64_t sketch_rows(Backlog* backlog, const Rows& m, const Matrix& to, const Margin& margin) {
  const auto block = m.type == ROW_BF16  ? sketch_block<ROW_BF16>
                     : m.type == ROW_F16 ? sketch_block<ROW_F16>
                                         : sketch_block<ROW_F32>;
  return backlog->add((m.rows + ROWS - 1) / ROWS, [=](int b) { block(m, to, margin, b); });
}

}  // namespace
