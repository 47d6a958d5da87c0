// Products with matrices that stay as a checkpoint stores them, row by row, in 8-, 16- or 32-bit
// floats: what is memory-mapped, and what few columns are multiplied with.
#pragma once
#include "integer.h"

namespace {

constexpr int TOGETHER = 4;  // rows

template <int TYPE> INL F entry(const uint8_t* row, int k) {
  if (TYPE == ROW_BF16) return fload_bf16((const uint16_t*)row + k);
  if (TYPE == ROW_F16) return fload_f16((const uint16_t*)row + k);
  if (TYPE == ROW_E4M3) return fload_e4m3(row + k);
  return fload((const float*)row + k);
}

template <int TYPE> INL float entry_alone(const uint8_t* row, int k) {
  if (TYPE == ROW_BF16) return bf16_to_float(((const uint16_t*)row)[k]);
  if (TYPE == ROW_F16) return half_to_float(((const uint16_t*)row)[k]);
  if (TYPE == ROW_E4M3) return e4m3_tiny(row[k]);
  return ((const float*)row)[k];
}

template <int TYPE> constexpr int SIZE = TYPE == ROW_E4M3 ? 1 : TYPE == ROW_F32 ? 4 : 2;  // bytes

// LANES columns from `k` on of every row, for each of the inputs.
template <int TYPE, int MR>
INL void add_products(const uint8_t* const* rows, const float* const* x, int k,
                      F (&a)[TOGETHER][MR]) {
  F in[MR];
#pragma GCC unroll 8
  for (int c = 0; c < MR; c++) in[c] = fload(x[c] + k);
#pragma GCC unroll 4
  for (int r = 0; r < TOGETHER; r++) {
    const F w = entry<TYPE>(rows[r], k);
#pragma GCC unroll 8
    for (int c = 0; c < MR; c++) a[r][c] = fma(w, in[c], a[r][c]);
  }
}

// Products of columns `from` to `to` only: those that share a scale. `ahead` is what is fetched.
// Loops over the sums are unrolled, all of them, or gcc keeps these in memory.
template <int TYPE, int MR>
INL void dot_rows(const uint8_t* const* rows, const float* const* x, int from, int to, int64_t ahead,
                  float (*out)[MR]) {
  constexpr int LINE = 64 / SIZE<TYPE>;  // entries that are fetched together
  F a[TOGETHER][MR];
#pragma GCC unroll 4
  for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 8
    for (int c = 0; c < MR; c++) a[r][c] = fzero();
  int k = from;
  for (; k + LINE <= to; k += LINE) {
#pragma GCC unroll 4
    for (int r = 0; r < TOGETHER; r++)
      __builtin_prefetch(rows[r] + (int64_t)k * SIZE<TYPE> + ahead);
#pragma GCC unroll 16
    for (int i = 0; i < LINE; i += LANES) add_products<TYPE, MR>(rows, x, k + i, a);
  }
  for (; k + LANES <= to; k += LANES) add_products<TYPE, MR>(rows, x, k, a);
#pragma GCC unroll 4
  for (int r = 0; r < TOGETHER; r++)
#pragma GCC unroll 8
    for (int c = 0; c < MR; c++) {
      float sum = fsum(a[r][c]);
      for (int i = k; i < to; i++) sum += entry_alone<TYPE>(rows[r], i) * x[c][i];
      out[r][c] = sum;
    }
}

INL void fetch(const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

template <int TYPE, int MR>
static void some_rows(const Rows& m, const int64_t* ids, int first, int last, const float* const* x,
                      float* const* y) {
  const int across = (m.columns + m.scale_columns - 1) / m.scale_columns;
  // Short rows end before what is fetched in them arrives: there, the next rows are.
  const int64_t width = m.columns * SIZE<TYPE>, ahead = width < AHEAD ? TOGETHER * width : 2048;
  for (int n = first; n < last; n += TOGETHER) {
    const uint8_t* rows[TOGETHER];
    for (int r = 0; r < TOGETHER; r++) {
      const int64_t row = std::min(n + r, last - 1);
      rows[r] = m.data + (ids ? ids[row] : row) * width;
      if (ids) fetch(m.data + ids[std::min<int64_t>(row + TOGETHER, last - 1)] * width, width);
    }
    float sums[TOGETHER][MR] = {};
    for (int part = 0; part < across; part++) {
      const int from = part * m.scale_columns;
      float made[TOGETHER][MR];
      dot_rows<TYPE, MR>(rows, x, from, std::min(from + m.scale_columns, m.columns), ahead, made);
      for (int r = 0; r < TOGETHER; r++) {
        const int64_t row = std::min(n + r, last - 1);
        const int64_t at = (ids ? ids[row] : row) / m.scale_rows * across + part;
        const float scale = m.scales ? m.scales[at] : 1.0f;
        for (int c = 0; c < MR; c++) sums[r][c] += made[r][c] * scale;
      }
    }
    for (int r = 0; r < TOGETHER && n + r < last; r++)
      for (int c = 0; c < MR; c++) y[c][n + r] = sums[r][c];
  }
}

// Entries of E4M3 come as tiny numbers. Inputs are lifted towards 2^60, by powers of two, so that
// products are neither subnormal nor too large; 2^60 and `lower` take back what is left of both.
struct Lifted {
  const float* x;
  int64_t ldx;
  float* lower;  // [n]
};

static Lifted lift(const float* x, int64_t ldx, int n, int columns) {
  static thread_local Room room;
  const int64_t ld = (columns + LANES - 1) / LANES * LANES;
  float* made = room.of((size_t)n * (ld + 1));
  float* lower = made + n * ld;
  for (int i = 0; i < n; i++) {
    float most = 0;
    for (int k = 0; k < columns; k++) most = std::max(most, std::fabs(x[i * ldx + k]));
    const bool ordinary = most > 0 && most < INFINITY;
    const int up = ordinary ? std::min(60 - std::ilogb(most), 127) : 0;
    const float by = std::ldexp(1.0f, up);
    for (int k = 0; k < columns; k++) made[i * ld + k] = x[i * ldx + k] * by;
    lower[i] = std::ldexp(1.0f, 60 - up);
  }
  return {made, ld, lower};
}

// Inputs as products with `m` want them.
static Lifted lifted_for(const Rows& m, const float* x, int64_t ldx, int n) {
  return m.type == ROW_E4M3 ? lift(x, ldx, n, m.columns) : Lifted{x, ldx, nullptr};
}

INL int size_of(const Rows& m) { return m.type == ROW_E4M3 ? 1 : m.type == ROW_F32 ? 4 : 2; }

// Rows that a thread takes at a time.
INL int rows_at_once(const Rows& m) {
  const int64_t fit = CHUNK / ((int64_t)m.columns * size_of(m));
  return (int)std::max<int64_t>(TOGETHER, fit / TOGETHER * TOGETHER);
}

// Products with rows `start` to `stop`, or with those of these numbers that `ids` lists.
template <int TYPE>
static void multiply_rows_as(const Rows& m, const int64_t* ids, const Lifted& lifted, int n,
                             int start, int stop, float* y, int64_t ldy, int threads) {
  const int each = rows_at_once(m);
  in_parallel((stop - start + each - 1) / each, threads, [&](int piece) {
    const int first = start + piece * each, last = std::min(first + each, stop);
    for (int c = 0; c < n; c += 4) {
      const float* in[4];
      float* out[4];
      for (int i = 0; i < 4; i++) {
        in[i] = lifted.x + std::min(c + i, n - 1) * lifted.ldx;
        out[i] = y + std::min(c + i, n - 1) * ldy - start;
      }
      if (n - c == 1) some_rows<TYPE, 1>(m, ids, first, last, in, out);
      else if (n - c == 2) some_rows<TYPE, 2>(m, ids, first, last, in, out);
      else some_rows<TYPE, 4>(m, ids, first, last, in, out);
    }
    if (TYPE == ROW_E4M3)
      for (int c = 0; c < n; c++)
        for (int r = first; r < last; r++) {
          float& made = y[c * ldy + r - start];
          made = made * 0x1p60f * lifted.lower[c];
        }
  });
}

static void multiply_rows(const Rows& m, const int64_t* ids, const Lifted& x, int n, int start,
                          int stop, float* y, int64_t ldy, int threads) {
#define AS(TYPE) return multiply_rows_as<TYPE>(m, ids, x, n, start, stop, y, ldy, threads)
  switch (m.type) {
    case ROW_BF16: AS(ROW_BF16);
    case ROW_F16: AS(ROW_F16);
    case ROW_F32: AS(ROW_F32);
    default: AS(ROW_E4M3);
  }
#undef AS
}

}  // namespace
