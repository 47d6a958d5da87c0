// What several matrices are multiplied with, in the form that each of them wants.
#pragma once
#include "exact.h"
#include "quantize.h"
#include "rows.h"

namespace {

// The first digits of `count` columns from `first` on; `digits` of them stand for one input.
INL Quantized some_columns(const Quantized& q, int64_t first, int units) {
  return {q.codes + first * units * UNIT, q.scales + first * units, q.sums + first * units,
          q.halves + first * units * 2};
}

INL int digits_of(const Linear& w) { return w.packed ? w.packed->digits : 0; }

INL int units_of(int columns) { return (columns + UNIT - 1) / UNIT; }

// Inputs `[n, columns]` as floats, and their codes where there are any.
struct Inputs {
  const float* x;
  int columns;
  Quantized codes;

  // y [count, stop - start] = inputs `first` on times rows `start` to `stop`.
  void times(const Linear& w, int first, int count, int start, int stop, float* y, int64_t ldy,
             int threads) const {
    const float* from = x + (int64_t)first * columns;
    if (w.rows)
      return multiply_rows(*w.rows, nullptr, from, columns, count, start, stop, y, ldy, threads);
    const Matrix& m = *w.packed;
    if (m.digits == 0)
      return multiply_exactly(m, from, columns, count, start, stop, y, ldy, threads);
    const Quantized some = some_columns(codes, (int64_t)first * m.digits, m.units);
    multiply(m, some, count * m.digits, start, stop, y, ldy, threads);
  }
};

// The inputs of a few matrices; quantized once, when the first of them asks.
struct Input {
  const float* x;
  int n, columns, threads;
  bool done = false;
  Quantized codes{};

  void times(const Linear& w, float* y) {
    const int rows = w.rows ? w.rows->rows : w.packed->rows, digits = digits_of(w);
    if (digits && !done) {
      static thread_local Room room;
      const int count = n * digits, units = units_of(columns);
      codes = quantized_in(room.of(quantized_bytes(count, units) / sizeof(float) + 1), count, units);
      quantize(x, columns, n, columns, units, digits, codes, threads);
      done = true;
    }
    Inputs{x, columns, codes}.times(w, 0, n, 0, rows, y, rows, threads);
  }
};

}  // namespace
