// Products with packed matrices: integer dot products of codes with quantized activations.
// Written once over the vectors of simd.h.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "api.h"
#include "codes.h"
#include "pool.h"
#include "room.h"
#include "scales.h"
#include "simd.h"

namespace {

constexpr int VECTORS = ROWS / LANES;
#if defined(CABOCHON_AVX512)
constexpr int WIDEST = 8;  // columns at once
#elif defined(CABOCHON_AVX2)
constexpr int WIDEST = 4;
#elif defined(CABOCHON_NEON)
constexpr int WIDEST = 6;
#else
constexpr int WIDEST = 1;
#endif
constexpr int64_t CHUNK = 1 << 17;           // bytes of weights that a thread takes at a time

// Activations of n columns: codes in the order of a unit, a scale a unit, and sums of the codes
// times their scale, of whole units and of halves.
struct Quantized {
  int8_t* codes;   // [n, units * 32]
  float* scales;   // [n, units]
  float* sums;     // [n, units]
  float* halves;   // [n, units, 2]
};

// Where the code of a unit's column is: in the order of quads.
INL int place_in_unit(int column) { return column / 8 * 8 + column % 2 * 4 + column % 8 / 2; }

// The most of them for which there is room, of which a whole number makes VECTORS.
constexpr int part_of_vectors(int room) {
  int part = VECTORS;
  while (part > 1 && part > room) part /= 2;
  return part;
}

template <class C, int MR, bool MINS, bool HALVES> struct Tile {
  static constexpr int N = HALVES ? 4 : 8;  // quads until scales change
  typedef typename C::D D;
  static constexpr int SOME = part_of_vectors(D::HELD / MR);  // vectors of rows at once

  // Steps T to N of one run of quads.
  template <int T, int FIRST>
  INL_MEMBER static void dots(const C& codes, const uint8_t* unit, const int8_t* const* q,
                              int64_t at, D (&d)[MR][SOME]) {
    if constexpr (T < N) {
      decltype(codes.template get<T>(unit)) w[SOME];
#pragma GCC unroll 8
      for (int v = 0; v < SOME; v++) w[v] = codes.template get<FIRST + T>(unit + v * LANES * 4);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        V a = quad(q[m] + at + (FIRST + T) * 4);
#pragma GCC unroll 8
        for (int v = 0; v < SOME; v++) d[m][v].template add<T, N>(w[v], a);
      }
      dots<T + 1, FIRST>(codes, unit, q, at, d);
    }
  }

  template <int FIRST>
  INL_MEMBER static void part(const Matrix& m, const C& codes, const uint8_t* unit,
                              const int8_t* const* q, int u, const float* const* scales,
                              const float* const* sums, int64_t sum_at, const float* S,
                              const float* Z, F (&acc)[MR][VECTORS]) {
    const float constant = (m.zero - D::BIAS) * D::ONE;
#pragma GCC unroll 8
    for (int first = 0; first < VECTORS; first += SOME) {
      D d[MR][SOME];
      dots<0, FIRST>(codes, unit + first * LANES * 4, q, (int64_t)u * UNIT, d);
#pragma GCC unroll 8
      for (int c = 0; c < MR; c++) {
        const F scale = fsplat(scales[c][u]);
        const F sum = fsplat(MINS ? sums[c][sum_at] : constant * sums[c][sum_at]);
#pragma GCC unroll 8
        for (int i = 0; i < SOME; i++) {
          const int v = first + i;
          const F dot = d[c][i].total(), s = fload(S + v * LANES);
          if (MINS) {
            acc[c][v] = fma(fmul(dot, scale), s, acc[c][v]);
            acc[c][v] = fnma(fload(Z + v * LANES), sum, acc[c][v]);
          } else {
            acc[c][v] = fma(fms(dot, scale, sum), s, acc[c][v]);
          }
        }
      }
    }
  }

  // The last of fewer than MR columns is computed several times.
  static void run(const Matrix& m, const uint8_t* p, const float* S, const float* Z,
                  const Quantized& x, int column, int count, float* out) {
    const C codes(m);
    const int8_t* q[MR];
    const float *scales[MR], *sums[MR];
    for (int c = 0; c < MR; c++) {
      const int64_t at = (int64_t)(column + std::min(c, count - 1)) * m.units;
      q[c] = x.codes + at * UNIT;
      scales[c] = x.scales + at;
      sums[c] = HALVES ? x.halves + at * 2 : x.sums + at;
    }
    F acc[MR][VECTORS];
    for (int c = 0; c < MR; c++)
      for (int v = 0; v < VECTORS; v++) acc[c][v] = fzero();
    const int each = m.halves / 2;  // units of a group
    int left = each;
    for (int u = 0; u < m.units; u++, p += C::BYTES) {
      if (column == 0)
        for (int i = 0; i < C::BYTES; i += 64) __builtin_prefetch(p + AHEAD + i);
      if (HALVES) {
        part<0>(m, codes, p, q, u, scales, sums, 2 * u, S, Z, acc);
        part<4>(m, codes, p, q, u, scales, sums, 2 * u + 1, S + ROWS, Z + ROWS, acc);
        S += 2 * ROWS;
        Z += 2 * ROWS;
      } else {
        part<0>(m, codes, p, q, u, scales, sums, u, S, Z, acc);
        if (--left == 0) {
          left = each;
          S += ROWS;
          Z += ROWS;
        }
      }
    }
    for (int c = 0; c < MR; c++)
      for (int v = 0; v < VECTORS; v++) fstore(out + c * ROWS + v * LANES, acc[c][v]);
  }
};

// Rows `start` to `stop` of the output of `count` columns; digits of the same column are added.
static void put(const Matrix& m, const float* made, int count, int column, int block, int start,
                int stop, float* y, int64_t ldy) {
  const int first = std::max(start, block * ROWS), last = std::min(stop, (block + 1) * ROWS);
  for (int c = 0; c < count; c++, column++) {
    const float* from = made + c * ROWS + first - block * ROWS;
    float* to = y + (column / m.digits) * ldy + first - start;
    if (column % m.digits == 0)
      memcpy(to, from, (last - first) * sizeof(float));
    else
      for (int i = 0; i < last - first; i++) to[i] += from[i];
  }
}

template <class C, bool MINS, bool HALVES>
static void block_of(const Matrix& m, int block, const Quantized& x, int columns, int start,
                     int stop, float* y, int64_t ldy) {
  thread_local Room room;
  float* S = room.of((size_t)m.groups * ROWS * 2);
  float* Z = S + (size_t)m.groups * ROWS;
  const uint8_t* p = m.data + block * m.stride;
  expand(m, p, S, Z, C::D::BIAS, MINS, false);
  p += m.codes_at;
  alignas(64) float made[WIDEST * ROWS];
  for (int column = 0; column < columns;) {
    const int count = std::min(columns - column, WIDEST);
    const auto run = [&](auto tile) { tile.run(m, p, S, Z, x, column, count, made); };
    if (count == 1) run(Tile<C, 1, MINS, HALVES>());
    else if (count == 2) run(Tile<C, std::min(2, WIDEST), MINS, HALVES>());
    else if (count <= 4) run(Tile<C, std::min(4, WIDEST), MINS, HALVES>());
    else if (count <= 6) run(Tile<C, std::min(6, WIDEST), MINS, HALVES>());
    else run(Tile<C, WIDEST, MINS, HALVES>());
    put(m, made, count, column, block, start, stop, y, ldy);
    column += count;
  }
}

// Rows that a thread takes at a time.
INL int rows_at_once(const Matrix& m, int columns) {
  return (columns > WIDEST ? 1 : std::max<int>(1, (int)(CHUNK / m.stride))) * ROWS;
}

// y [n, stop - start] = x [n, columns] times rows `start` to `stop`.
template <class C, bool MINS, bool HALVES>
static void multiply_as(const Matrix& m, const Quantized& x, int columns, int start, int stop,
                        float* y, int64_t ldy, int threads) {
  const int first = start / ROWS, last = (stop + ROWS - 1) / ROWS;
  const int each = rows_at_once(m, columns) / ROWS;
  in_parallel((last - first + each - 1) / each, threads, [&](int piece) {
    const int from = first + piece * each, to = std::min(from + each, last);
    for (int b = from; b < to; b++) block_of<C, MINS, HALVES>(m, b, x, columns, start, stop, y, ldy);
  });
}

static void multiply(const Matrix& m, const Quantized& x, int columns, int start, int stop, float* y,
                     int64_t ldy, int threads) {
  const bool halves = m.halves == 1, minus = m.minima != CONSTANT;
#define AS(codes, MINS, HALVES)                                                                \
  return multiply_as<codes, MINS, HALVES>(m, x, columns, start, stop, y, ldy, threads)
  switch (m.codes) {
    case U4:
      if (halves) AS(CodesU4, true, true);
      if (minus) AS(CodesU4, true, false);
      AS(CodesU4, false, false);
    case U8:
      if (halves) AS(CodesU8, true, true);
      if (minus) AS(CodesU8, true, false);
      AS(CodesU8, false, false);
    case TABLE:
      if (halves) AS(CodesTable, false, true);
      AS(CodesTable, false, false);
    case TABLE2:
      if (halves) AS(CodesTable2, false, true);
      AS(CodesTable2, false, false);
    case U2:
      if (halves) AS(CodesU2, true, true);
      AS(CodesU2, true, false);
    case U3:
      if (halves) AS(CodesU3, true, true);
      AS(CodesU3, true, false);
    case U5:
      if (halves) AS(CodesU5, true, true);
      AS(CodesU5, true, false);
    case U6:
      if (halves && minus) AS(CodesU6, true, true);
      if (halves) AS(CodesU6, false, true);
      if (minus) AS(CodesU6, true, false);
      AS(CodesU6, false, false);
  }
#undef AS
}

}  // namespace
