// Which products of a row are the largest, for who draws a token from few of them.
#pragma once
#include "doubt.h"

namespace {

// Writes the columns of the largest and their products, as far as there is room, and returns how
// many there are.
static int64_t search(const Search* s) {
  static thread_local Runs runs;
  static thread_local std::vector<int64_t> ids;
  static thread_local std::vector<float> products;
  ids.clear(), products.clear();
  runs.products = s->products, runs.n = s->n;
  runs.look(*s);
  if (s->sketch) {
    search_near(*s, runs, ids, products);
  } else {
    runs.reaching(least_alike(*s, runs.kth_largest(s->count)), [&](int64_t i) {
      ids.push_back(i);
      products.push_back(runs.products[i]);
    });
  }
  const size_t told = std::min(ids.size(), (size_t)s->room);
  std::copy_n(ids.begin(), told, s->ids);
  std::copy_n(products.begin(), told, s->found);
  return (int64_t)ids.size();
}

}  // namespace
