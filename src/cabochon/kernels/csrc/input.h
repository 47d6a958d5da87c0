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

INL int rows_of(const Linear& w) { return w.rows ? w.rows->rows : w.packed->rows; }

// Rows of a matrix that a thread takes at a time, where there are `n` inputs.
INL int rows_at_once(const Linear& w, int n) {
  if (w.rows) return rows_at_once(*w.rows);
  return w.packed->digits ? rows_at_once(*w.packed, n * w.packed->digits) : ROWS;
}

// Inputs `[n, columns]` as floats, and their codes and as `lift` makes them where there are any.
struct Inputs {
  const float* x;
  int columns;
  Quantized codes;
  Lifted lifted{};

  // y [count, stop - start] = inputs `first` on times rows `start` to `stop`.
  void times(const Linear& w, int first, int count, int start, int stop, float* y, int64_t ldy,
             int threads) const {
    const float* from = x + (int64_t)first * columns;
    if (w.rows) {
      const bool ready = w.rows->type == ROW_E4M3 && lifted.x && first == 0;
      const Lifted in = ready ? lifted : lifted_for(*w.rows, from, columns, count);
      return multiply_rows(*w.rows, nullptr, in, count, start, stop, y, ldy, threads);
    }
    const Matrix& m = *w.packed;
    if (m.digits == 0)
      return multiply_exactly(m, from, columns, count, start, stop, y, ldy, threads);
    const Quantized some = some_columns(codes, (int64_t)first * m.digits, m.units);
    multiply(m, some, count * m.digits, start, stop, y, ldy, threads);
  }
};

// A matrix, and where products with it go: `[n, its rows]`.
struct Product {
  const Linear* w;
  float* y;
};

// The inputs of a few matrices, `made` what these want when the first of them asks.
struct Input {
  const float* x;
  int n, columns, threads;
  Inputs made{x, columns, {}};

  void ready(const Linear& w) {
    const int digits = digits_of(w);
    if (w.rows && w.rows->type == ROW_E4M3 && !made.lifted.x)
      made.lifted = lifted_for(*w.rows, x, columns, n);
    if (digits && !made.codes.codes) {
      static thread_local Room room;
      const int count = n * digits, units = units_of(columns);
      made.codes = quantized_in(room.of(quantized_bytes(count, units) / sizeof(float) + 1), count, units);
      quantize(x, columns, n, columns, units, digits, made.codes, threads);
    }
  }

  // Threads share the pieces of all of them: none waits at the end of each.
  template <int N> void times(const Product (&all)[N]) {
    int ends[N], count = 0;
    for (int k = 0; k < N; k++) {
      ready(*all[k].w);
      const int each = rows_at_once(*all[k].w, n);
      ends[k] = count += (rows_of(*all[k].w) + each - 1) / each;
    }
    in_parallel(count, threads, [&](int piece) {
      int k = 0;
      while (piece >= ends[k]) k++;
      const Linear& w = *all[k].w;
      const int rows = rows_of(w), each = rows_at_once(w, n);
      const int from = (k ? piece - ends[k - 1] : piece) * each, to = std::min(from + each, rows);
      made.times(w, 0, n, from, to, all[k].y + from, rows, 1);
    });
  }

  void times(const Linear& w, float* y) { times({{&w, y}}); }
};

// Inputs that are made some columns at a time, in the form that the matrix they are for wants.
struct Next {
  float* x;  // [n, columns], unless there are digits
  int columns, digits;
  Quantized codes;

  static Next of(const Linear& w, int64_t n, int columns) {
    static thread_local Room floats, room;
    const int digits = digits_of(w), units = units_of(columns);
    if (!digits) return {floats.of((size_t)n * columns), columns, 0, {}};
    const size_t size = quantized_bytes(n * digits, units) / sizeof(float) + 1;
    return {nullptr, columns, digits, quantized_in(room.of(size), n * digits, units)};
  }

  // Columns `from` to `to` of a row; `from` begins a unit.
  void put(int64_t row, const float* some, int from, int to) const {
    if (!digits) memcpy(x + row * columns + from, some, (to - from) * sizeof(float));
    else quantize_row(some, from, to, units_of(columns), digits, row, codes);
  }

  Inputs inputs() const { return {x, columns, codes}; }
};

}  // namespace
