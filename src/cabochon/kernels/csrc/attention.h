// Attention of single queries over the paged cache, where it lies: what decoding does.
#pragma once
#include "quantize.h"

namespace {

constexpr int PAGE = 16;    // slots
constexpr int SPLIT = 256;  // positions that a thread takes at a time
constexpr int SHARING = 8;  // query heads at once that share a key head

template <bool HALF> INL F kept(const void* p, int64_t i) {
  return HALF ? fload_f16((const uint16_t*)p + i) : fload((const float*)p + i);
}

INL F fexp(F x) {
  x = fmin2(fmax2(x, fsplat(-87.0f)), fsplat(88.0f));
  const F n = fround(fmul(x, fsplat(1.44269504f)));
  F r = fnma(n, fsplat(0.693359375f), x);
  r = fnma(n, fsplat(-2.12194440e-4f), r);
  F p = fsplat(1.9875691500e-4f);
  p = fma(p, r, fsplat(1.3981999507e-3f));
  p = fma(p, r, fsplat(8.3334519073e-3f));
  p = fma(p, r, fsplat(4.1665795894e-2f));
  p = fma(p, r, fsplat(1.6666665459e-1f));
  p = fma(p, r, fsplat(5.0000001201e-1f));
  p = fma(fmul(p, r), r, fadd(r, fsplat(1.0f)));
  return fmul(p, fpow2(n));
}

// `count` query heads over positions `from` to `to`, at most SPLIT. The sums of the values,
// weighted by exp(score - largest), go to `out [count, dim]`, their weights to `total`.
template <bool HALF>
static void look_at(const Cache& cache, int row, int head, int kv_heads, int dim, int count,
                    const float* queries, int from, int to, float* out, float* largest,
                    float* total) {
  alignas(64) float scores[SHARING][SPLIT];
  const int32_t* pages = cache.pages + cache.page_at[row];
  const auto place = [&](int position) {
    const int64_t slot = (int64_t)pages[position / PAGE] * PAGE + position % PAGE;
    return (slot * kv_heads + head) * dim;
  };
  const int n = to - from;
  for (int i = 0; i < n; i++) {
    const int64_t at = place(from + i);
    F sums[SHARING];
    for (int h = 0; h < SHARING; h++) sums[h] = fzero();
    for (int d = 0; d < dim; d += LANES) {
      const F key = kept<HALF>(cache.keys, at + d);
      if (count == SHARING) {
#pragma GCC unroll 8
        for (int h = 0; h < SHARING; h++) sums[h] = fma(key, fload(queries + h * dim + d), sums[h]);
      } else {
        for (int h = 0; h < count; h++) sums[h] = fma(key, fload(queries + h * dim + d), sums[h]);
      }
    }
    for (int h = 0; h < count; h++) scores[h][i] = fsum(sums[h]);
  }
  for (int h = 0; h < count; h++) {
    float most = scores[h][0];
    for (int i = 1; i < n; i++) most = std::max(most, scores[h][i]);
    for (int i = n; i < (n + LANES - 1) / LANES * LANES; i++) scores[h][i] = -INFINITY;
    F sum = fzero();
    for (int i = 0; i < n; i += LANES) {
      const F s = fsub(fload(scores[h] + i), fsplat(most));
      const F p = fexp(s);
      fstore(scores[h] + i, p);
    }
    for (int i = n; i < (n + LANES - 1) / LANES * LANES; i++) scores[h][i] = 0;
    for (int i = 0; i < n; i += LANES) sum = fadd(sum, fload(scores[h] + i));
    largest[h] = most;
    total[h] = fsum(sum);
    memset(out + h * dim, 0, dim * sizeof(float));
  }
  for (int i = 0; i < n; i += 4) {
    int64_t at[4];
    for (int j = 0; j < 4; j++) at[j] = place(from + std::min(i + j, n - 1));
    for (int d = 0; d < dim; d += LANES) {
      F value[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) value[j] = kept<HALF>(cache.values, at[j] + d);
      for (int h = 0; h < count; h++) {
        F sum = fload(out + h * dim + d);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)  // beyond n, weights are zero
          sum = fma(value[j], fsplat(i + j < n ? scores[h][i + j] : 0.0f), sum);
        fstore(out + h * dim + d, sum);
      }
    }
  }
}

// queries and out [n, heads * dim].
static void attend(const Cache& cache, int n, int heads, int kv_heads, int dim,
                   const float* queries, float* out, int threads) {
  static thread_local Room room;
  const int sharing = heads / kv_heads, bundles = (sharing + SHARING - 1) / SHARING;
  int longest = 1;
  for (int i = 0; i < n; i++) longest = std::max(longest, cache.high[i] - cache.low[i]);
  const int splits = (longest + SPLIT - 1) / SPLIT, each = kv_heads * bundles * splits;
  const int record = SHARING * (dim + 2);
  float* parts = room.of((size_t)n * each * record);
  in_parallel(n * each, n * longest > 64 ? threads : 1, [&](int job) {
    const int row = job / each, kv = job % each / (bundles * splits);
    const int bundle = job % (bundles * splits) / splits, split = job % splits;
    const int from = cache.low[row] + split * SPLIT;
    const int to = std::min(from + SPLIT, cache.high[row]);
    const int first = bundle * SHARING, count = std::min(SHARING, sharing - first);
    const float* q = queries + ((int64_t)row * heads + kv * sharing + first) * dim;
    float* made = parts + (int64_t)job * record;
    float *largest = made + SHARING * dim, *total = largest + SHARING;
    if (from >= to) {
      for (int h = 0; h < count; h++) largest[h] = -INFINITY, total[h] = 0;
    } else if (cache.half) {
      look_at<true>(cache, row, kv, kv_heads, dim, count, q, from, to, made, largest, total);
    } else {
      look_at<false>(cache, row, kv, kv_heads, dim, count, q, from, to, made, largest, total);
    }
  });
  for (int row = 0; row < n; row++)
    for (int head = 0; head < heads; head++) {
      const int h = head % sharing % SHARING;
      const float* made = parts + ((int64_t)row * each + (head / sharing * bundles +
                          head % sharing / SHARING) * splits) * record;
      float most = -INFINITY, sum = 0;
      for (int s = 0; s < splits; s++) most = std::max(most, made[s * record + SHARING * dim + h]);
      float* to = out + ((int64_t)row * heads + head) * dim;
      memset(to, 0, dim * sizeof(float));
      for (int s = 0; s < splits; s++) {
        const float* part = made + s * record;
        const float count = part[SHARING * dim + SHARING + h];
        if (count == 0) continue;
        const float weight = std::exp(part[SHARING * dim + h] - most);
        sum += weight * count;
        for (int d = 0; d < dim; d += LANES)
          fstore(to + d, fma(fload(part + h * dim + d), fsplat(weight), fload(to + d)));
      }
      for (int d = 0; d < dim; d += LANES)
        fstore(to + d, fdiv(fload(to + d), fsplat(sum)));
    }
}

}  // namespace
