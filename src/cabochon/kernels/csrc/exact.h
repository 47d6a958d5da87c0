// Entries in float32, as `dense` defines them, and products with them: the exact path.
#pragma once
#include "integer.h"

namespace {

INL F rounded(int to, F x) { return to == 1 ? fto_bf16(x) : to == 2 ? fto_f16(x) : x; }

template <class C, int T, int J>
INL void byte_of_quads(const Matrix& m, const C& codes, const uint8_t* unit, const float* S,
                       const float* Z, float* out) {
  constexpr int k = T / 2 * 8 + 2 * J + T % 2;
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v++) {
    const F s = fload(S + v * LANES), z = fload(Z + v * LANES);
    const V code = codes.template raw<T>(unit + v * LANES * 4);
    F x;
    if (C::TABLED) x = fmul(fvalue<J>(m.values, code), s);
    else if (m.minima <= ZERO_POINT) x = fmul(fsub(fbyte<J>(code), z), s);
    else x = fsub(fmul(fbyte<J>(code), s), z);
    fstore(out + k * ROWS + v * LANES, rounded(m.round, x));
  }
}

template <class C, int T>
INL void quads(const Matrix& m, const C& codes, const uint8_t* unit, const float* S, const float* Z,
               int step, float* out) {
  if constexpr (T < 8) {
    const int at = T < 4 ? 0 : step;
    byte_of_quads<C, T, 0>(m, codes, unit, S + at, Z + at, out);
    byte_of_quads<C, T, 1>(m, codes, unit, S + at, Z + at, out);
    byte_of_quads<C, T, 2>(m, codes, unit, S + at, Z + at, out);
    byte_of_quads<C, T, 3>(m, codes, unit, S + at, Z + at, out);
    quads<C, T + 1>(m, codes, unit, S, Z, step, out);
  }
}

// Unit `u` of a block: `out [32 columns, 32 rows]`.
template <class C>
static void unit_as(const Matrix& m, const uint8_t* codes, int u, const float* S, const float* Z,
                    float* out) {
  const int half = 2 * u / m.halves;
  quads<C, 0>(m, C(m), codes + (int64_t)u * C::BYTES, S + (int64_t)half * ROWS,
              Z + (int64_t)half * ROWS, m.halves == 1 ? ROWS : 0, out);
}

static void unit_of(const Matrix& m, const uint8_t* codes, int u, const float* S, const float* Z,
                    float* out) {
  switch (m.codes) {
    case U4: return unit_as<CodesU4>(m, codes, u, S, Z, out);
    case U8: return unit_as<CodesU8>(m, codes, u, S, Z, out);
    case TABLE: return unit_as<CodesTable>(m, codes, u, S, Z, out);
    case TABLE2: return unit_as<CodesTable2>(m, codes, u, S, Z, out);
    case U2: return unit_as<CodesU2>(m, codes, u, S, Z, out);
    case U3: return unit_as<CodesU3>(m, codes, u, S, Z, out);
    case U5: return unit_as<CodesU5>(m, codes, u, S, Z, out);
    case U6: return unit_as<CodesU6>(m, codes, u, S, Z, out);
  }
}

// Row `rows[i]` of the matrix, or row `start + i` without `rows`, to `out [n, columns]`.
static void dense(const Matrix& m, const int64_t* rows, int64_t start, int n, float* out,
                  int threads) {
  // Without `rows`, a block is expanded once for all its rows.
  const int pieces = rows ? n : (int)((start + n + ROWS - 1) / ROWS - start / ROWS);
  in_parallel(pieces, threads, [&](int i) {
    thread_local Room room;
    float* S = room.of((size_t)m.groups * ROWS * 2);
    float* Z = S + (size_t)m.groups * ROWS;
    alignas(64) float unit[UNIT * ROWS];
    const int64_t block = rows ? rows[i] / ROWS : start / ROWS + i;
    const int64_t first = rows ? rows[i] : std::max(start, block * ROWS);
    const int64_t last = rows ? rows[i] + 1 : std::min(start + n, (block + 1) * ROWS);
    const uint8_t* p = m.data + block * m.stride;
    expand(m, p, S, Z, 0, true, true);
    for (int u = 0; u < m.units; u++) {
      unit_of(m, p + m.codes_at, u, S, Z, unit);
      const int width = std::min(UNIT, m.columns - u * UNIT);
      for (int64_t r = first; r < last; r++) {
        float* to = out + (rows ? i : r - start) * m.columns + u * UNIT;
        for (int k = 0; k < width; k++) to[k] = unit[k * ROWS + r % ROWS];
      }
    }
  });
}

template <int MR>
INL void exact_columns(const float* unit, int width, const float* const* x, float (*acc)[ROWS]) {
  F a[MR][VECTORS];
  for (int c = 0; c < MR; c++)
    for (int v = 0; v < VECTORS; v++) a[c][v] = fload(acc[c] + v * LANES);
  for (int k = 0; k < width; k++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      const F w = fload(unit + k * ROWS + v * LANES);
#pragma GCC unroll 8
      for (int c = 0; c < MR; c++) a[c][v] = fma(w, fsplat(x[c][k]), a[c][v]);
    }
  for (int c = 0; c < MR; c++)
    for (int v = 0; v < VECTORS; v++) fstore(acc[c] + v * LANES, a[c][v]);
}

// y [n, stop - start] = x [n, columns] times rows `start` to `stop`, summed in float32.
static void multiply_exactly(const Matrix& m, const float* x, int64_t ldx, int n, int start, int stop,
                             float* y, int64_t ldy, int threads) {
  const int before = start / ROWS;
  in_parallel((stop + ROWS - 1) / ROWS - before, threads, [&](int piece) {
    thread_local Room room, sums;
    float* S = room.of((size_t)m.groups * ROWS * 2);
    float* Z = S + (size_t)m.groups * ROWS;
    const int padded = (n + 3) / 4 * 4;
    float(*acc)[ROWS] = (float(*)[ROWS])sums.of((size_t)padded * ROWS);
    alignas(64) float unit[UNIT * ROWS];
    const int block = before + piece;
    const uint8_t* p = m.data + block * m.stride;
    expand(m, p, S, Z, 0, true, true);
    memset(acc, 0, (size_t)padded * ROWS * sizeof(float));
    for (int u = 0; u < m.units; u++) {
      unit_of(m, p + m.codes_at, u, S, Z, unit);
      const int width = std::min(UNIT, m.columns - u * UNIT);
      for (int c = 0; c < n; c += 4) {
        const float* in[4];
        for (int i = 0; i < 4; i++) in[i] = x + std::min(c + i, n - 1) * ldx + u * UNIT;
        if (n == 1) exact_columns<1>(unit, width, in, acc);
        else exact_columns<4>(unit, width, in, acc + c);
      }
    }
    const int first = std::max(start, block * ROWS), last = std::min(stop, (block + 1) * ROWS);
    for (int c = 0; c < n; c++)
      memcpy(y + c * ldy + first - start, acc[c] + first - block * ROWS,
             (last - first) * sizeof(float));
  });
}

}  // namespace
