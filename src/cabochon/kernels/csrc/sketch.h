// A matrix told again in four bits an entry, and how far off products with that may be: enough to
// know which of them are the largest.
//
// Codes are dithered: an entry is told as scale * (code - 8 + the dither of its column), with the
// nearest code. If the dither was drawn evenly from 0 to 1, what this leaves of an entry is spread
// evenly over half a scale to either side, whatever the entry was, and independent of what is left
// of others in its row (Schuchman 1964). So a product is off by a sum of independent numbers, whose
// tail is no heavier than a normal distribution's (each is strictly sub-Gaussian): more than t
// standard deviations below have a chance of exp(-t * t / 2). A row that is among the largest is
// missed only if its own product is so far off. Without a dither only Cauchy's and Schwarz's bound
// is sure, four times as wide for 1,536 columns: two bits more.
#pragma once
#include "backlog.h"
#include "picked.h"
#include "quantize.h"

namespace {

constexpr int SKETCH_GROUP = 64;     // columns that share a scale
constexpr int SKETCH_ZERO = 8;       // the code
constexpr float SKETCH_TOP = 7.5f;   // times the scale: what can be told, whatever the dither
constexpr double DEVIATIONS = 9.2;   // one product of 2.4e18 is further below
constexpr double UNEVEN = 1e-4;      // of both norms: inputs rounded twice, by sqrt(32) / 254^2; sums
constexpr double LOST = 1e-16;       // norms of rows whose squares are too small for float32

// Sums over a row: of squared scales and entries; and the largest scale.
struct Margins {
  double scales = 0, entries = 0, largest = 0;

  // How far off products are, by the norm of the input, and by the largest of those of its groups:
  // neither is less than the truth.
  void tell(int groups, float* to) const {
    const double step = DEVIATIONS / std::sqrt(12.0), least = UNEVEN * std::sqrt(entries) + LOST;
    to[0] = (float)(step * largest + least);
    to[1] = (float)(step * std::sqrt(scales) + least * std::sqrt((double)groups));
  }
};

// The least bfloat16 that is no less than a number above 0.
INL uint16_t bf16_above(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return (uint16_t)((bits + 0xffff) >> 16);
}

static void sketch_group(const float* entries, const float* dither, uint8_t* codes, uint16_t* scale,
                         Margins* margins) {
  F largest = fzero(), squares = fzero();
  for (int i = 0; i < SKETCH_GROUP; i += LANES) {
    const F v = fload(entries + i);
    largest = fmax2(largest, fabs1(v));
    squares = fma(v, v, squares);
  }
  *scale = bf16_above(fmaximum(largest) / SKETCH_TOP);
  const float step = bf16_to_float(*scale);
  const F by = fsplat(step > 0x1p-120f ? 1 / step : 0.0f);
  float whole[SKETCH_GROUP];
  for (int i = 0; i < SKETCH_GROUP; i += LANES) {
    const F q = fround(fma(fload(entries + i), by, fsub(fsplat(SKETCH_ZERO), fload(dither + i))));
    fstore(whole + i, fmax2(fmin2(q, fsplat(15)), fzero()));
  }
  for (int i = 0; i < SKETCH_GROUP / 2; i++)
    codes[i] = (uint8_t)((int)whole[2 * i] | (int)whole[2 * i + 1] << 4);
  margins->scales += (double)step * step;
  margins->entries += fsum(squares);
  margins->largest = std::max<double>(margins->largest, step);
}

// What rows are packed from: codes, two a byte, in their order, and a bfloat16 for each group.
inline Stored sketched(const uint8_t* codes, const uint16_t* scales, int columns) {
  const int groups = columns / SKETCH_GROUP, bytes = columns / 2;
  Stored s = {codes, bytes, bytes, {UNIT, UNIT / 2, 0, 0, 1, {{0, 4, 0, 0}}}, {}, nullptr};
  s.grouped[0] = {(const uint8_t*)scales, 0, groups * 2, 2, groups, 2};
  return s;
}

template <int TYPE> static void to_floats(const uint8_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) fstore(to + i, entry<TYPE>(from, (int)i));
  for (; i < count; i++) to[i] = entry_alone<TYPE>(from, (int)i);
}

// Entries of a block's `count` rows, as products have them.
static void entries_of(const Linear& w, const Stored& stored, int64_t block, int count, float* to) {
  if (w.packed) {
    Matrix some = packed_again(*w.packed, from_block(stored, block), count);
    some.round = 0;  // as when inputs are rounded
    return dense(some, nullptr, 0, count, to, 1);
  }
  const Rows& m = *w.rows;
  const uint8_t* from = m.data + block * ROWS * m.columns * size_of(m);
  const int64_t all = (int64_t)count * m.columns;
  if (m.type == ROW_BF16) to_floats<ROW_BF16>(from, all, to);
  else if (m.type == ROW_F16) to_floats<ROW_F16>(from, all, to);
  else to_floats<ROW_F32>(from, all, to);
}

static void sketch_block(const Sketch& s, const Linear& whole, const Stored& stored, int64_t block) {
  const int columns = s.near.columns, groups = columns / SKETCH_GROUP;
  const int count = std::min<int64_t>(ROWS, s.near.rows - block * ROWS);
  static thread_local Room floats, room;
  float* entries = floats.of((size_t)ROWS * columns);
  uint16_t* scales = (uint16_t*)room.of((ROWS * (columns / 2 + groups * 2) + 3) / 4);
  uint8_t* codes = (uint8_t*)(scales + ROWS * groups);
  entries_of(whole, stored, block, count, entries);
  for (int i = 0; i < count; i++) {
    Margins margins;
    for (int g = 0; g < groups; g++) {
      const int64_t at = (int64_t)(i * groups + g) * SKETCH_GROUP;
      sketch_group(entries + at, s.dither + g * SKETCH_GROUP, codes + at / 2,
                   scales + i * groups + g, &margins);
    }
    margins.tell(groups, s.margins + (block * ROWS + i) * 2);
  }
  pack(s.near, sketched(codes, scales, columns), block);
}

// Fills what is near, and the margins.
static int64_t make_sketch(Backlog* backlog, const Sketch& s) {
  const Rows rows = s.whole.rows ? *s.whole.rows : Rows{};
  const Matrix packed = s.whole.packed ? *s.whole.packed : Matrix{};
  const Stored stored = s.stored ? *s.stored : Stored{};
  const int blocks = (s.near.rows + ROWS - 1) / ROWS;
  return backlog->add(blocks, [=](int block) {
    const Linear whole{s.whole.packed ? &packed : nullptr, s.whole.rows ? &rows : nullptr};
    sketch_block(s, whole, stored, block);
  });
}

// y [n, rows], near the products of x [n, columns].
static void multiply_near(const Sketch& s, const float* x, int64_t ldx, int n, float* y, int64_t ldy,
                          int threads) {
  const Matrix& m = s.near;
  const Quantized q = quantized_for(m, x, ldx, n, threads);
  const int columns = n * m.digits;
  // What is taken away, SKETCH_ZERO times the sum of a unit's inputs, is less by these times dithers.
  for (int64_t i = 0; i < (int64_t)columns * m.units; i++) {
    const int8_t* codes = q.codes + i * UNIT;
    const float* dither = s.dither + i % m.units * UNIT;
    float sum = 0;
    for (int k = 0; k < UNIT; k++) sum += codes[place_in_unit(k)] * (1 - dither[k] / SKETCH_ZERO);
    q.sums[i] = sum * q.scales[i];
  }
  multiply(m, q, columns, 0, m.rows, y, ldy, threads);
}

}  // namespace
