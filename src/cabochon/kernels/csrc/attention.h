// Attention of single queries over the paged cache, where it lies: what decoding does.
#pragma once
#include <algorithm>

#include "kept.h"
#include "pointwise.h"
#include "room.h"

namespace {

constexpr int SPLIT = 256;  // positions that a thread takes at a time
constexpr int SHARING = 8;  // query heads at once that share a key head
constexpr int ALONE = 8192; // numbers of keys that are too little work to be shared out
#if defined(CABOCHON_AVX512) || defined(CABOCHON_NEON)
constexpr int SUMS = 24;    // what the registers hold
#elif defined(CABOCHON_AVX2)
constexpr int SUMS = 8;
#else
constexpr int SUMS = 4;
#endif

template <int KIND> INL void fetch(const void* data, int64_t at, int dim) {
  const char* p = (const char*)data + at * dim * KEPT_BYTES<KIND>;
  for (int i = 0; i < dim * KEPT_BYTES<KIND>; i += 64) __builtin_prefetch(p + i);
}

// Products of HEADS queries with the keys of `count` positions from `i` on, of those in `[0, n)`.
template <int KIND, int HEADS, int AT>
INL void look_at_keys(const View& cache, const Place& place, int dim, int from, int i, int n,
                      const float* queries, float (*scores)[SPLIT]) {
  const void* keys = cache.keys;
  int64_t at[AT];
  for (int j = 0; j < AT; j++) at[j] = place(from + std::min(i + j, n - 1));
#pragma GCC unroll 8
  for (int j = 0; j < AT; j++) fetch<KIND>(keys, place(from + std::min(i + PAGE + j, n - 1)), dim);
  F sums[AT * HEADS];
#pragma GCC unroll 32
  for (int j = 0; j < AT * HEADS; j++) sums[j] = fzero();
  for (int d = 0; d < dim; d += LANES) {
    F key[AT];
#pragma GCC unroll 8
    for (int j = 0; j < AT; j++) key[j] = kept<KIND>(keys, at[j] * dim + d);
#pragma GCC unroll 8
    for (int h = 0; h < HEADS; h++) {
      const F query = fload(queries + h * dim + d);
#pragma GCC unroll 8
      for (int j = 0; j < AT; j++) sums[h * AT + j] = fma(key[j], query, sums[h * AT + j]);
    }
  }
  float made[AT * HEADS];
#pragma GCC unroll 8
  for (int j = 0; j < AT * HEADS; j += 4) fsum4(sums + j, made + j);
  for (int j = 0; j < AT && i + j < n; j++) {
    const float scale = KIND == KEPT_I8 ? cache.key_scales[at[j]] : 1.0f;
    for (int h = 0; h < HEADS; h++) scores[h][i + j] = made[h * AT + j] * scale;
  }
}

// scores [n] become weights exp(score - largest), those of int8 with the scale of their values.
template <int KIND>
INL void weigh(const View& cache, const Place& place, int from, int n, float* scores,
               float* largest, float* total) {
  const int whole = (n + LANES - 1) / LANES * LANES;
  for (int i = n; i < whole; i++) scores[i] = -INFINITY;
  F most = fload(scores), sum = fzero();
  for (int i = LANES; i < whole; i += LANES) most = fmax2(most, fload(scores + i));
  *largest = fmaximum(most);
  for (int i = 0; i < whole; i += LANES) {
    const F p = fexp(fsub(fload(scores + i), fsplat(*largest)));
    sum = fadd(sum, p);
    fstore(scores + i, p);
  }
  *total = fsum(sum);
  if (KIND == KEPT_I8)
    for (int i = 0; i < n; i++) scores[i] *= cache.value_scales[place(from + i)];
}

// Adds the values of positions `i` to `to`, weighted, to `out [HEADS, dim]`.
template <int KIND, int HEADS>
INL void add_values(const View& cache, const Place& place, int dim, int from, int i, int to, int n,
                    float (*scores)[SPLIT], float* out) {
  constexpr int WIDE = std::max(1, std::min(4, SUMS / HEADS));  // vectors
  constexpr int LINE = std::max(1, 64 / (LANES * KEPT_BYTES<KIND>));  // that are fetched together
  int64_t at[PAGE], next[PAGE];
  for (int j = 0; j < PAGE; j++) {
    at[j] = place(from + std::min(i + j, to - 1)) * dim;
    next[j] = place(from + std::min(i + PAGE + j, n - 1)) * dim;
  }
  const auto some = [&](auto wide, int d) {
    constexpr int W = decltype(wide)::value;
    F sums[HEADS * W];
#pragma GCC unroll 32
    for (int k = 0; k < HEADS * W; k++)
      sums[k] = fload(out + k / W * dim + d + k % W * LANES);
    for (int j = 0; j < to - i; j++) {
      F value[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; w += LINE)
        __builtin_prefetch((const char*)cache.values + (next[j] + d + w * LANES) * KEPT_BYTES<KIND>);
#pragma GCC unroll 4
      for (int w = 0; w < W; w++) value[w] = kept<KIND>(cache.values, at[j] + d + w * LANES);
#pragma GCC unroll 8
      for (int h = 0; h < HEADS; h++) {
        const F weight = fsplat(scores[h][i + j]);
#pragma GCC unroll 4
        for (int w = 0; w < W; w++) sums[h * W + w] = fma(value[w], weight, sums[h * W + w]);
      }
    }
#pragma GCC unroll 32
    for (int k = 0; k < HEADS * W; k++)
      fstore(out + k / W * dim + d + k % W * LANES, sums[k]);
  };
  int d = 0;
  for (; d + WIDE * LANES <= dim; d += WIDE * LANES) some(std::integral_constant<int, WIDE>(), d);
  for (; d < dim; d += LANES) some(std::integral_constant<int, 1>(), d);
}

// HEADS query heads over positions `from` to `to`, at most SPLIT. The sums of the values, weighted
// by exp(score - largest), go to `out [HEADS, dim]`, their weights to `total`.
template <int KIND, int HEADS>
static void look_at(const View& cache, const Place& place, int dim, const float* queries, int from,
                    int to, float* out, float* largest, float* total) {
  constexpr int AT = std::max({1, 4 / HEADS, std::min(4, SUMS / HEADS)});
  alignas(64) float scores[HEADS][SPLIT];
  const int n = to - from;
  for (int i = 0; i < n; i += AT)
    look_at_keys<KIND, HEADS, AT>(cache, place, dim, from, i, n, queries, scores);
  for (int h = 0; h < HEADS; h++)
    weigh<KIND>(cache, place, from, n, scores[h], largest + h, total + h);
  memset(out, 0, (size_t)HEADS * dim * sizeof(float));
  for (int i = 0; i < n; i += PAGE)
    add_values<KIND, HEADS>(cache, place, dim, from, i, std::min(i + PAGE, n), n, scores, out);
}

template <int KIND>
static void look_at_any(const View& cache, const Place& place, int dim, int count,
                        const float* queries, int from, int to, float* out, float* largest,
                        float* total) {
  const auto run = [&](auto heads) {
    constexpr int HEADS = decltype(heads)::value;
    look_at<KIND, HEADS>(cache, place, dim, queries, from, to, out, largest, total);
    queries += (int64_t)HEADS * dim, out += (int64_t)HEADS * dim;
    largest += HEADS, total += HEADS, count -= HEADS;
  };
  while (count >= 8) run(std::integral_constant<int, 8>());
  while (count >= 4) run(std::integral_constant<int, 4>());
  while (count >= 2) run(std::integral_constant<int, 2>());
  while (count >= 1) run(std::integral_constant<int, 1>());
}

static void look_at(const View& cache, const Place& place, int dim, int count,
                    const float* queries, int from, int to, float* out, float* largest,
                    float* total) {
  switch (cache.kind) {
#define AS(kind)                                                                                \
  case kind:                                                                                    \
    return look_at_any<kind>(cache, place, dim, count, queries, from, to, out, largest, total)
    AS(KEPT_F32);
    AS(KEPT_F16);
    AS(KEPT_I8);
#undef AS
  }
}

// What the heads of a query look like.
struct Heads {
  int heads, kv_heads, dim;
  INL_MEMBER int sharing() const { return heads / kv_heads; }
};

// The parts of one head, `record` floats apart, to one; see `look_at` for what they hold.
static void join(const float* parts, int splits, int record, int h, int dim, float* to) {
  const float* ends = parts + SHARING * dim;
  float most = -INFINITY, sum = 0;
  for (int s = 0; s < splits; s++) most = std::max(most, ends[s * record + h]);
  memset(to, 0, dim * sizeof(float));
  for (int s = 0; s < splits; s++) {
    const float count = ends[s * record + SHARING + h];
    if (count == 0) continue;
    const float* part = parts + s * record + h * dim;
    const float weight = std::exp(ends[s * record + h] - most);
    sum += weight * count;
    for (int d = 0; d < dim; d += LANES)
      fstore(to + d, fma(fload(part + d), fsplat(weight), fload(to + d)));
  }
  for (int d = 0; d < dim; d += LANES) fstore(to + d, fdiv(fload(to + d), fsplat(sum)));
}

// Queries of the rows `rows [n]`, each on its own; queries and out are [rows, heads * dim].
static void attend_alone(const View& cache, const int32_t* rows, int n, const Heads& of,
                         const float* queries, float* out, int threads) {
  static thread_local Room room;
  const int sharing = of.sharing(), bundles = (sharing + SHARING - 1) / SHARING;
  int longest = 1;
  for (int i = 0; i < n; i++)
    longest = std::max(longest, cache.high[rows[i]] - cache.low[rows[i]]);
  const int splits = (longest + SPLIT - 1) / SPLIT, each = of.kv_heads * bundles * splits;
  const int record = SHARING * (of.dim + 2);
  float* parts = room.of((size_t)n * each * record);
  const bool long_enough = (int64_t)n * longest * of.kv_heads * of.dim > ALONE;
  const int helped = long_enough ? threads : 1;
  in_parallel(n * each, helped, [&](int job) {
    const int row = rows[job / each], kv = job % each / (bundles * splits);
    const int bundle = job % (bundles * splits) / splits, split = job % splits;
    const int from = cache.low[row] + split * SPLIT;
    const int to = std::min(from + SPLIT, cache.high[row]);
    const int first = bundle * SHARING, count = std::min(SHARING, sharing - first);
    const float* q = queries + ((int64_t)row * of.heads + kv * sharing + first) * of.dim;
    float* made = parts + (int64_t)job * record;
    float *largest = made + SHARING * of.dim, *total = largest + SHARING;
    const Place place{cache.pages + cache.page_at[row], of.kv_heads, kv};
    if (from < to) look_at(cache, place, of.dim, count, q, from, to, made, largest, total);
    else for (int h = 0; h < count; h++) largest[h] = -INFINITY, total[h] = 0;
  });
  each_row(n * of.heads, helped, [&](int job) {
    const int i = job / of.heads, head = job % of.heads;
    const int bundle = head / sharing * bundles + head % sharing / SHARING;
    const float* made = parts + ((int64_t)i * each + bundle * splits) * record;
    join(made, splits, record, head % sharing % SHARING, of.dim,
         out + ((int64_t)rows[i] * of.heads + head) * of.dim);
  });
}

}  // namespace
