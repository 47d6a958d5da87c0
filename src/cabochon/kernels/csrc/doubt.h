// Which products are the largest, where those that are known are near the true ones.
#pragma once
#include <cmath>
#include <vector>

#include "runs.h"
#include "sketch.h"

namespace {

// So many more than twice the count are measured first: the count-th largest of more is larger, and
// leaves fewer candidates, a third fewer for 64.
constexpr int MORE = 30;

// How far off products with `x` are.
struct Doubt {
  double norm = 0, most = 0;  // of the input, and of its largest group

  Doubt(const Sketch& s, const float* x) {
    for (int from = 0; from < s.near.columns; from += SKETCH_GROUP) {
      double squares = 0;
      for (int k = from; k < from + SKETCH_GROUP; k++) squares += (double)x[k] * x[k];
      norm += squares;
      most = std::max(most, squares);
    }
    // Rounded to eight bits of the largest of 32, inputs may grow: by sqrt(32) / 254 of their norm.
    const double grown = s.near.digits == 1 ? 1.0223 : 1.0001;
    norm = std::sqrt(norm) * grown;
    most = std::sqrt(most) * grown;
  }

  double of(const float* margins) const {
    if (norm == 0) return 0;  // also where a margin is infinite
    return std::min(margins[0] * norm, margins[1] * most);
  }
};

constexpr int SUSPECTS = 128;  // that a thread takes at a time
constexpr int EARLY = 16;      // margins are fetched so many before

// Leaves of `ids` those whose products may be `wanted` or more, on so many threads.
static void narrow(const Sketch& s, const Runs& runs, const Doubt& doubt, double wanted,
                   std::vector<int64_t>& ids, int threads) {
  const int64_t count = ids.size(), pieces = (count + SUSPECTS - 1) / SUSPECTS;
  std::vector<int64_t> ends(pieces);
  in_parallel((int)pieces, threads, [&](int piece) {
    const int64_t first = (int64_t)piece * SUSPECTS, last = std::min(first + SUSPECTS, count);
    int64_t kept = first;
    for (int64_t i = first; i < last; i++) {
      __builtin_prefetch(s.margins + 2 * ids[std::min(i + EARLY, last - 1)]);
      const int64_t row = ids[i];
      if (runs.products[row] + doubt.of(s.margins + 2 * row) >= wanted) ids[kept++] = row;
    }
    ends[piece] = kept;
  });
  auto to = ids.begin();
  for (int64_t piece = 0; piece < pieces; piece++)
    to = std::copy(ids.begin() + piece * SUSPECTS, ids.begin() + ends[piece], to);
  ids.resize(to - ids.begin());
}

// True products of an input with some rows.
struct Truth {
  const Sketch& s;
  const float* x;
  int threads;
  Quantized codes{};  // of the input, where the matrix wants them

  Truth(const Sketch& s, const float* x, int threads) : s(s), x(x), threads(threads) {
    if (s.whole.packed) codes = quantized_for(*s.whole.packed, x, s.near.columns, 1, threads);
  }

  void measure(const std::vector<int64_t>& ids, std::vector<float>& products) const {
    const int n = (int)ids.size();
    products.resize(n);
    if (const Rows* rows = s.whole.rows)
      return multiply_rows(*rows, ids.data(), lifted_for(*rows, x, rows->columns, 1), 1, 0, n,
                           products.data(), n, threads);
    // With the kernels that multiply with all rows: these packed again, ROWS together.
    each_picked(*s.whole.packed, *s.stored, ids.data(), n, threads, [&](const Matrix& m, int first) {
      multiply(m, codes, m.digits, 0, m.rows, products.data() + first, m.rows, 1);
    });
  }
};

// The columns of the largest true products, and those, where what the runs have is near them.
static void search_near(const Search& s, const Runs& runs, std::vector<int64_t>& ids,
                        std::vector<float>& products) {
  const Doubt doubt(*s.sketch, s.x);
  const Truth truth(*s.sketch, s.x, s.threads);
  // The true products of those that seem the largest say what others must reach.
  const int64_t some_more = std::min<int64_t>(2 * (int64_t)s.count + MORE, runs.highest.size());
  const int64_t first = std::max<int64_t>(s.count, some_more);
  runs.reaching(runs.kth_largest(first), [&](int64_t i) { ids.push_back(i); });
  truth.measure(ids, products);
  const double wanted = least_alike(s, kth(products, s.count));
  ids.clear();
  runs.reaching(wanted - doubt.of(s.widest), [&](int64_t i) { ids.push_back(i); });
  narrow(*s.sketch, runs, doubt, wanted, ids, s.threads);
  truth.measure(ids, products);
  std::vector<float> some = products;
  const double least = least_alike(s, kth(some, s.count));
  size_t kept = 0;
  for (size_t i = 0; i < ids.size(); i++)
    if (products[i] >= least) ids[kept] = ids[i], products[kept++] = products[i];
  ids.resize(kept), products.resize(kept);
}

}  // namespace
