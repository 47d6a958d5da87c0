// The products of a row, in runs of which the largest is known.
#pragma once
#include <cfloat>
#include <functional>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace {

constexpr int RUN = 256;          // products of which the largest is known
constexpr int RUNS_AT_ONCE = 64;  // that a thread takes at a time
constexpr double TANH_ROUNDS = 1e-6;  // in float32, generously

// The `count`-th largest, or the least if there are fewer.
static float kth(std::vector<float>& of, int64_t count) {
  if (of.empty()) return -INFINITY;
  const auto at = of.begin() + std::min<int64_t>(count, of.size()) - 1;
  std::nth_element(of.begin(), at, of.end(), std::greater<float>());
  return *at;
}

// The least product that may become equal to this one: the soft-cap rounds at its ends, and so may
// who gets products in another type.
static double least_alike(const Search& s, double product) {
  double least = product;
  if (s.cap > 0 && std::isfinite(product)) {
    const double share = std::tanh(product / s.cap) - TANH_ROUNDS;
    least = share > -1 ? s.cap * std::atanh(share) : -INFINITY;
  }
  return s.rounding > 0 ? least - s.rounding * std::fabs(least) : least;
}

// As a float that is finite.
static float no_more_than(double x) {
  float made = (float)x;
  if (made > x) made = std::nextafter(made, -INFINITY);
  return std::max(made, -FLT_MAX);
}

// A row's products, of which those that may not be drawn are -inf.
struct Runs {
  float* products;
  int64_t n;
  std::vector<float> highest;

  void look(const Search& s) {
    for (int i = 0; i < s.nevers; i++)
      if (s.never[i] >= 0 && s.never[i] < n) products[s.never[i]] = -INFINITY;
    highest.resize((n + RUN - 1) / RUN);
    const int count = (int)highest.size();
    in_parallel((count + RUNS_AT_ONCE - 1) / RUNS_AT_ONCE, s.threads, [&](int piece) {
      const int first = piece * RUNS_AT_ONCE, last = std::min(first + RUNS_AT_ONCE, count);
      for (int64_t r = first; r < last; r++) highest[r] = highest_of(s, r * RUN, std::min(r * RUN + RUN, n));
    });
  }

  float highest_of(const Search& s, int64_t from, int64_t to) {
    if (s.allowed)
      for (int64_t i = from; i < to; i++)
        if (!s.allowed[i]) products[i] = -INFINITY;
    F most = fsplat(-INFINITY);
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) most = fmax2(fload(products + i), most);
    float found = fmaximum(most);
    for (; i < to; i++) found = std::max(found, products[i]);
    return found > -INFINITY ? found : -INFINITY;  // NEON's is NaN where one of them is
  }

  // Calls work(i) for those that are at least so large and may be drawn, in their order.
  template <class Work> void reaching(double wanted, const Work& work) const {
    const float least = no_more_than(wanted);
    for (size_t r = 0; r < highest.size(); r++) {
      if (highest[r] < least) continue;
      int64_t i = r * RUN;
      const int64_t to = std::min<int64_t>(i + RUN, n);
      for (; i + LANES <= to; i += LANES)
        for (uint32_t bits = fno_less(fload(products + i), fsplat(least)); bits; bits &= bits - 1)
          work(i + __builtin_ctz(bits));
      for (; i < to; i++)
        if (products[i] >= least) work(i);
    }
  }

  float kth_largest(int64_t count) const {
    // As many runs have a product that is no less than the least of these: none below it counts.
    std::vector<float> some = highest;
    const float least = count <= (int64_t)some.size() ? kth(some, count) : -INFINITY;
    some.clear();
    reaching(least, [&](int64_t i) { some.push_back(products[i]); });
    return kth(some, count);
  }
};

}  // namespace
