// Attention of many queries of a sequence at once: keys and values are made float32 a tile at a
// time, and every tile serves all queries of a block. "Lines" are pairs of a query and a head.
#pragma once
#include "attention.h"

namespace {

#if defined(CABOCHON_AVX512) || defined(CABOCHON_NEON)
constexpr int TALL = 6, BROAD = 4;  // of a product that the registers hold: rows, and vectors
#elif defined(CABOCHON_AVX2)
constexpr int TALL = 6, BROAD = 2;
#else
constexpr int TALL = 2, BROAD = 1;
#endif
constexpr int SPAN = BROAD * LANES;
constexpr int TILE = 48;    // positions
constexpr int LINES = 128;  // at most
constexpr int MANY = 32;    // queries of a sequence, to be looked at together
constexpr float NOTHING = -1e30f;

// to [TALL, SPAN] = or += a [TALL, k] b [k, SPAN]. Entries of `a` lie `row` and `column` apart.
template <bool ADD>
INL void tile_product(const float* a, const int64_t (&row)[TALL], int64_t column, const float* b,
                      int64_t ldb, int k, float* const (&to)[TALL]) {
  F sums[TALL][BROAD];
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++)
#pragma GCC unroll 4
    for (int v = 0; v < BROAD; v++) sums[r][v] = ADD ? fload(to[r] + v * LANES) : fzero();
  for (int i = 0; i < k; i++, a += column, b += ldb) {
    F in[BROAD];
#pragma GCC unroll 4
    for (int v = 0; v < BROAD; v++) in[v] = fload(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++) {
      const F by = fsplat(a[row[r]]);
#pragma GCC unroll 4
      for (int v = 0; v < BROAD; v++) sums[r][v] = fma(in[v], by, sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TALL; r++)
#pragma GCC unroll 4
    for (int v = 0; v < BROAD; v++) fstore(to[r] + v * LANES, sums[r][v]);
}

// Positions `from` to `to` of keys or values as float32 `out [to - from, dim]`.
template <int KIND>
static void widen(const void* data, const float* scales, const Place& place, int from, int to,
                  int dim, float* out) {
  for (int i = from; i < to; i++, out += dim) {
    const int64_t at = place(i);
    const F scale = fsplat(KIND == KEPT_I8 ? scales[at] : 1.0f);
    for (int d = 0; d < dim; d += LANES) {
      const F x = kept<KIND>(data, at * dim + d);
      fstore(out + d, KIND == KEPT_I8 ? fmul(x, scale) : x);
    }
  }
}

static void widen(const View& cache, bool keys, const Place& place, int from, int to, int dim,
                  float* out) {
  const void* data = keys ? cache.keys : cache.values;
  const float* scales = keys ? cache.key_scales : cache.value_scales;
  if (cache.kind == KEPT_F32) return widen<KEPT_F32>(data, scales, place, from, to, dim, out);
  if (cache.kind == KEPT_F16) return widen<KEPT_F16>(data, scales, place, from, to, dim, out);
  widen<KEPT_I8>(data, scales, place, from, to, dim, out);
}

// Some queries of one sequence with one key head, and what is known of their lines so far.
struct Block {
  const View& cache;
  Heads of;
  int first, count, kv;  // rows
  int lines, padded;     // padded to whole spans
  float *queries;        // [dim, padded]
  float *scores;         // [TILE, padded]
  float *keys, *values;  // [TILE, dim]
  float *most, *total;   // [padded]
  int32_t *low, *high;   // [padded]
  float* out;            // [rows, heads * dim]

  int64_t line(int i) const {
    const int sharing = of.sharing(), row = first + i / sharing;
    return ((int64_t)row * of.heads + kv * sharing + i % sharing) * of.dim;
  }

  static size_t floats(int dim, int padded) {
    return (size_t)dim * (padded + 2 * TILE) + (size_t)TILE * padded + 4 * padded;
  }

  void begin(const float* from, float* room) {
    const int dim = of.dim;
    queries = room;
    scores = queries + (size_t)dim * padded;
    keys = scores + (size_t)TILE * padded;
    values = keys + (size_t)TILE * dim;
    most = values + (size_t)TILE * dim;
    total = most + padded;
    low = (int32_t*)(total + padded);
    high = low + padded;
    for (int i = 0; i < padded; i++) {
      const int row = first + std::min(i, lines - 1) / of.sharing();
      most[i] = NOTHING, total[i] = 0;
      low[i] = cache.low[row], high[i] = cache.high[row];
      const float* q = from + line(std::min(i, lines - 1));
      for (int d = 0; d < dim; d++) queries[(int64_t)d * padded + i] = q[d];
    }
    for (int i = 0; i < lines; i++) memset(out + line(i), 0, dim * sizeof(float));
  }

  // scores [n, padded] of the keys of a tile.
  void multiply_keys(int n) {
    for (int span = 0; span < padded; span += SPAN)
      for (int i = 0; i < n; i += TALL) {
        int64_t row[TALL];
        float* to[TALL];
        for (int r = 0; r < TALL; r++) {
          const int key = std::min(i + r, n - 1);
          row[r] = (int64_t)key * of.dim;
          to[r] = scores + (int64_t)key * padded + span;
        }
        tile_product<false>(keys, row, 1, queries + span, padded, of.dim, to);
      }
  }

  void hide(int from, int n) {
    for (int i = 0; i < n; i++) {
      float* row = scores + (int64_t)i * padded;
      for (int l = 0; l < padded; l++)
        row[l] = from + i < low[l] || from + i >= high[l] ? -INFINITY : row[l];
    }
  }

  // Scores become weights; what was summed before is made to fit them.
  void weigh(int n) {
    for (int l = 0; l < padded; l += LANES) {
      const F before = fload(most + l);
      F now = before, sum = fzero();
      for (int i = 0; i < n; i++) now = fmax2(fload(scores + (int64_t)i * padded + l), now);
      for (int i = 0; i < n; i++) {
        float* at = scores + (int64_t)i * padded + l;
        const F p = fexp(fsub(fload(at), now));
        sum = fadd(sum, p);
        fstore(at, p);
      }
      alignas(64) float by[LANES];
      fstore(by, fexp(fsub(before, now)));
      fstore(total + l, fma(fload(total + l), fload(by), sum));
      fstore(most + l, now);
      for (int i = l; i < std::min(l + LANES, lines); i++)
        if (by[i - l] != 1) scale_line(i, by[i - l]);
    }
  }

  void scale_line(int i, float by) {
    float* to = out + line(i);
    for (int d = 0; d < of.dim; d += LANES) fstore(to + d, fmul(fload(to + d), fsplat(by)));
  }

  void add_values(int n) {
    int d = 0;
    for (; d + SPAN <= of.dim; d += SPAN)
      for (int i = 0; i < lines; i += TALL) {
        int64_t row[TALL];
        float* to[TALL];
        for (int r = 0; r < TALL; r++) {
          row[r] = std::min(i + r, lines - 1);
          to[r] = out + line((int)row[r]) + d;
        }
        tile_product<true>(scores, row, padded, values + d, of.dim, n, to);
      }
    for (; d < of.dim; d += LANES)  // heads of other sizes
      for (int i = 0; i < lines; i++) {
        F sum = fload(out + line(i) + d);
        for (int k = 0; k < n; k++)
          sum = fma(fload(values + (int64_t)k * of.dim + d),
                    fsplat(scores[(int64_t)k * padded + i]), sum);
        fstore(out + line(i) + d, sum);
      }
  }

  void run(const float* from_queries, float* room) {
    begin(from_queries, room);
    const Place place{cache.pages + cache.page_at[first], of.kv_heads, kv};
    const int start = *std::min_element(low, low + lines), all_from = *std::max_element(low, low + lines);
    const int stop = *std::max_element(high, high + lines), all_to = *std::min_element(high, high + lines);
    for (int at = start; at < stop; at += TILE) {
      const int n = std::min(TILE, stop - at);
      widen(cache, true, place, at, at + n, of.dim, keys);
      widen(cache, false, place, at, at + n, of.dim, values);
      multiply_keys(n);
      if (at < all_from || at + n > all_to) hide(at, n);
      weigh(n);
      add_values(n);
    }
    for (int i = 0; i < lines; i++) scale_line(i, 1 / total[i]);
  }
};

// Rows `first` to `first + n` of the step, which belong to one sequence.
static void attend_together(const View& cache, int first, int n, const Heads& of,
                            const float* queries, float* out, int threads) {
  const int most = std::max(1, std::min(LINES, 32768 / of.dim) / of.sharing());
  const int fair = std::max(1, n * of.kv_heads / (4 * threads));  // for every thread a few
  const int each = std::min(most, fair), blocks = (n + each - 1) / each;
  in_parallel(blocks * of.kv_heads, threads, [&](int job) {
    static thread_local Room room;
    // The last blocks have most to look at: they come first, and the small ones fill up.
    const int at = (blocks - 1 - job / of.kv_heads) * each, count = std::min(each, n - at);
    const int lines = count * of.sharing(), padded = (lines + SPAN - 1) / SPAN * SPAN;
    Block block{cache, of, first + at, count, job % of.kv_heads, lines, padded};
    block.out = out;
    block.run(queries, room.of(Block::floats(of.dim, padded)));
  });
}

// queries and out [n, heads * dim]. Rows of a sequence follow each other.
static void attend(const View& cache, int n, const Heads& of, const float* queries, float* out,
                   int threads) {
  static thread_local Room room;
  int32_t* alone = (int32_t*)room.of(n);
  int count = 0;
  for (int first = 0, last; first < n; first = last) {
    for (last = first + 1; last < n && cache.page_at[last] == cache.page_at[first];) last++;
    if (last - first >= MANY)
      attend_together(cache, first, last - first, of, queries, out, threads);
    else
      while (first < last) alone[count++] = first++;
  }
  if (count) attend_alone(cache, alone, count, of, queries, out, threads);
}

}  // namespace
