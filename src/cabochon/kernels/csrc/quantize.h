// Activations to codes of eight bits, 32 at a time, with a scale each; and a second digit of what
// the first leaves, where that is asked for.
#pragma once
#include "integer.h"

namespace {

// 32 numbers. What is left after rounding replaces `x`.
INL void quantize_unit(float* x, int8_t* codes, float* scale, float* sum, float* halves) {
  constexpr int PARTS = UNIT / LANES;
  F v[PARTS], largest = fzero(), poison = fzero();
  for (int i = 0; i < PARTS; i++) {
    v[i] = fload(x + i * LANES);
    largest = fmax2(largest, fabs1(v[i]));
    poison = fma(v[i], fzero(), poison);  // infinities and NaN must not become numbers
  }
  const float most = fmaximum(largest), lift = most < 1e-30f ? 0x1p64f : 1.0f;
  const float by = most > 0 ? 127.0f / (most * lift) : 0.0f;
  *scale = most / 127.0f + fsum(poison);
  const F up = fsplat(lift), times = fsplat(by), step = fsplat(*scale);
  F q[PARTS], total[2] = {fzero(), fzero()};
  for (int i = 0; i < PARTS; i++) {
    q[i] = fround(fmul(fmul(v[i], up), times));
    total[2 * i / PARTS] = fadd(total[2 * i / PARTS], q[i]);
    fstore(x + i * LANES, fnma(q[i], step, v[i]));
  }
  store_codes(codes, q);
  halves[0] = fsum(total[0]) * *scale;
  halves[1] = fsum(total[1]) * *scale;
  *sum = halves[0] + halves[1];
}

// Columns `from` to `to` of a row, of which the first begins a unit; they lie at `x`.
static void quantize_row(const float* x, int from, int to, int units, int digits, int64_t row,
                         const Quantized& out) {
  alignas(64) float some[UNIT];
  for (int k = from; k < to; k += UNIT, x += UNIT) {
    const int width = std::min(UNIT, to - k);
    memcpy(some, x, width * sizeof(float));
    if (width < UNIT) memset(some + width, 0, (UNIT - width) * sizeof(float));
    for (int d = 0; d < digits; d++) {
      const int64_t at = (row * digits + d) * units + k / UNIT;
      quantize_unit(some, out.codes + at * UNIT, out.scales + at, out.sums + at,
                    out.halves + at * 2);
    }
  }
}

INL size_t quantized_bytes(int64_t n, int units) {
  return (size_t)n * units * (UNIT + 4 * sizeof(float)) + 256;
}

INL Quantized quantized_in(void* room, int64_t n, int units) {
  int8_t* codes = (int8_t*)room;
  float* scales = (float*)(codes + n * units * UNIT);
  return {codes, scales, scales + n * units, scales + 2 * n * units};
}

// `x [n, columns]` to `n * digits` columns.
static void quantize(const float* x, int64_t ldx, int n, int columns, int units, int digits,
                     const Quantized& out, int threads) {
  each_part(n, units * UNIT, threads, [&](int i, int from, int to) {
    quantize_row(x + i * ldx + from, from, std::min(to, columns), units, digits, i, out);
  });
}

// The same, as products with `m` want them, in memory of this thread.
static Quantized quantized_for(const Matrix& m, const float* x, int64_t ldx, int n, int threads) {
  static thread_local Room room;
  const int columns = n * m.digits;
  const size_t size = quantized_bytes(columns, m.units) / sizeof(float) + 1;
  const Quantized made = quantized_in(room.of(size), columns, m.units);
  quantize(x, ldx, n, m.columns, m.units, m.digits, made, threads);
  return made;
}

}  // namespace
