// A mixture of experts: a router chooses in float32, then every chosen expert is multiplied with
// all of its tokens at once. The bytes of the others are not read.
#pragma once
#include "input.h"
#include "pointwise.h"

namespace {

// A pair is a token and one of its experts; pairs lie in the order of experts.
struct Pairs {
  int count;               // n * chosen
  int active;              // experts that were chosen at all
  int32_t *expert, *begin; // [active], [active + 1]
  int32_t* token;          // [count]
  int32_t* place;          // [n, chosen]: where the pairs of a token lie
  float* share;            // [n, chosen]
};

// The `chosen` largest of softmax(scores), made to sum up to one, times what each expert counts.
static void choose_experts(const Experts& e, float* scores, int32_t* numbers, float* shares) {
  float most = scores[0], sum = 0, total = 0;
  for (int i = 1; i < e.count; i++) most = std::max(most, scores[i]);
  for (int i = 0; i < e.count; i++) sum += scores[i] = std::exp(scores[i] - most);
  for (int i = 0; i < e.count; i++) scores[i] /= sum;
  for (int k = 0; k < e.chosen; k++) {
    int best = -1;
    for (int i = 0; i < e.count; i++)
      if (scores[i] != -1 && (best < 0 || scores[i] > scores[best])) best = i;
    numbers[k] = best;
    total += shares[k] = scores[best];
    scores[best] = -1;  // shares are never negative
  }
  for (int k = 0; k < e.chosen; k++) shares[k] = shares[k] / total * e.per_expert[numbers[k]];
}

static void sort_by_expert(const Experts& e, int n, const int32_t* numbers, int32_t* counts,
                           Pairs& to) {
  memset(counts, 0, e.count * sizeof(int32_t));
  for (int i = 0; i < to.count; i++) counts[numbers[i]]++;
  to.active = 0;
  for (int i = 0, at = 0; i < e.count; i++) {
    if (counts[i]) {
      to.begin[to.active] = at;
      to.expert[to.active++] = i;
    }
    at += counts[i];
    counts[i] = at - counts[i];
  }
  to.begin[to.active] = to.count;
  for (int i = 0; i < to.count; i++) {
    to.place[i] = counts[numbers[i]]++;
    to.token[to.place[i]] = i / e.chosen;
  }
}

// Pairs of the rows `x [n, hidden]`. The router is multiplied exactly however it is stored.
static Pairs route(const Experts& e, const float* x, int n, int hidden, float eps, int threads) {
  static thread_local Room floats, integers;
  const int count = n * e.chosen;
  float* scores = floats.of((size_t)n * (hidden + e.count) + count);
  float *normed = scores + (size_t)n * e.count, *share = normed + (size_t)n * hidden;
  int32_t* token = (int32_t*)integers.of((size_t)3 * count + 3 * e.count + 1);
  Pairs to{count, 0, token + 3 * count, token + 3 * count + e.count, token, token + count, share};
  int32_t *numbers = token + 2 * count, *counts = to.begin + e.count + 1;
  for (int i = 0; i < n; i++) {
    float* row = normed + (int64_t)i * hidden;
    normalize(x + (int64_t)i * hidden, e.router_scale, hidden, eps, row);
    for (int k = 0; k < hidden; k += LANES) fstore(row + k, fmul(fload(row + k), fsplat(e.root)));
  }
  if (const Rows* m = e.router.rows)
    multiply_rows(*m, nullptr, lifted_for(*m, normed, hidden, n), n, 0, e.count, scores, e.count,
                  threads);
  else
    multiply_exactly(*e.router.packed, normed, hidden, n, 0, e.count, scores, e.count, threads);
  each_row(n, threads, [&](int i) {
    choose_experts(e, scores + (int64_t)i * e.count, numbers + i * e.chosen, share + i * e.chosen);
  });
  sort_by_expert(e, n, numbers, counts, to);
  return to;
}

// Inputs `first` on times rows `start` to `stop` of a tall matrix that is cut into parts.
static void times_tall(const Linear* parts, int part_rows, const Inputs& in, int first, int count,
                       int start, int stop, float* y, int64_t ldy) {
  for (int part = start / part_rows; part * part_rows < stop; part++) {
    const int top = part * part_rows;
    const int from = std::max(start, top), to = std::min(stop, top + part_rows);
    in.times(parts[part], first, count, from - top, to - top, y + from - start, ldy, 1);
  }
}

// Rows of a matrix of `columns` that a thread takes at a time.
INL int rows_at_once(int columns) {
  return std::max<int>(1, (int)(2 * CHUNK / columns / ROWS)) * ROWS;
}

// What the pairs are multiplied with first: their tokens, once for each of a token's experts.
static Inputs gather(const Experts& e, const Pairs& p, const float* x, int n, int hidden,
                     int threads) {
  static thread_local Room once, room;
  const int digits = digits_of(e.gate_up[0]), units = units_of(hidden);
  if (digits == 0) {
    float* all = room.of((size_t)p.count * hidden);
    for (int i = 0; i < p.count; i++)
      memcpy(all + (int64_t)i * hidden, x + (int64_t)p.token[i] * hidden, hidden * sizeof(float));
    return {all, hidden, {}};
  }
  const auto make = [&](Room& in, int64_t columns) {
    return quantized_in(in.of(quantized_bytes(columns, units) / sizeof(float) + 1), columns, units);
  };
  const Quantized some = make(once, (int64_t)n * digits);
  quantize(x, hidden, n, hidden, units, digits, some, threads);
  const Quantized all = make(room, (int64_t)p.count * digits);
  const int64_t size = (int64_t)digits * units;
  each_row(p.count, threads, [&](int i) {
    const Quantized from = some_columns(some, (int64_t)p.token[i] * digits, units);
    const Quantized to = some_columns(all, (int64_t)i * digits, units);
    memcpy(to.codes, from.codes, size * UNIT);
    memcpy(to.scales, from.scales, size * sizeof(float));
    memcpy(to.sums, from.sums, size * sizeof(float));
    memcpy(to.halves, from.halves, size * 2 * sizeof(float));
  });
  return {nullptr, hidden, all};
}

// gelu(gate) * up of all pairs, `[pairs, intermediate]`.
static void activate(const Experts& e, const Pairs& p, const Inputs& in, const Next& out,
                     int threads) {
  const int width = e.intermediate, each = rows_at_once(in.columns);
  const int chunks = (width + each - 1) / each;
  in_parallel(p.active * chunks, threads, [&](int job) {
    static thread_local Room room;
    const int a = job / chunks, first = p.begin[a], count = p.begin[a + 1] - first;
    const int from = job % chunks * each, rows = std::min(each, width - from);
    const int gate = p.expert[a] * 2 * width + from, up = gate + width;
    float *made = room.of((size_t)count * rows * 2), *other = made + (size_t)count * rows;
    times_tall(e.gate_up, e.gate_up_rows, in, first, count, gate, gate + rows, made, rows);
    times_tall(e.gate_up, e.gate_up_rows, in, first, count, up, up + rows, other, rows);
    for (int64_t i = 0; i < count; i++) {
      gate_by_gelu(made + i * rows, other + i * rows, rows);
      out.put(first + i, made + i * rows, from, from + rows);
    }
  });
}

// The last matrix of each expert, `out [pairs, hidden]`.
static void project(const Experts& e, const Pairs& p, const Inputs& in, int hidden, float* out,
                    int threads) {
  const int each = rows_at_once(in.columns), chunks = (hidden + each - 1) / each;
  in_parallel(p.active * chunks, threads, [&](int job) {
    const int a = job / chunks, first = p.begin[a], count = p.begin[a + 1] - first;
    const int from = job % chunks * each, rows = std::min(each, hidden - from);
    const int start = p.expert[a] * hidden + from;
    times_tall(e.down, e.down_rows, in, first, count, start, start + rows,
               out + (int64_t)first * hidden + from, hidden);
  });
}

// The weighted sum of what its experts make of each row of `x [n, hidden]`, to `out`.
static void mix(const Experts& e, const Pairs& p, const float* x, int n, int hidden, float* out,
                int threads) {
  static thread_local Room room;
  float* made = room.of((size_t)p.count * hidden);
  const Next next = Next::of(e.down[0], p.count, e.intermediate);
  activate(e, p, gather(e, p, x, n, hidden, threads), next, threads);
  project(e, p, next.inputs(), hidden, made, threads);
  each_row(n, threads, [&](int i) {
    for (int k = 0; k < hidden; k += LANES) {
      F sum = fzero();
      for (int c = 0; c < e.chosen; c++) {
        const int at = i * e.chosen + c;
        sum = fma(fload(made + (int64_t)p.place[at] * hidden + k), fsplat(p.share[at]), sum);
      }
      fstore(out + (int64_t)i * hidden + k, sum);
    }
  });
}

}  // namespace
