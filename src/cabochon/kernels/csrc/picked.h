// Some rows of a matrix, packed again from where they are stored, for who needs few of them.
#pragma once
#include "exact.h"
#include "pack.h"
#include "rows.h"

namespace {

// The first of the rows of `stored`, no more than ROWS, as a block of a matrix like `m`: packed in
// memory of this thread.
static Matrix packed_again(const Matrix& m, const Stored& stored, int rows) {
  static thread_local Room room;
  Matrix some = m;
  some.rows = rows;
  some.data = (const uint8_t*)room.of(m.stride / sizeof(float) + 1);
  pack(some, stored, 0);
  return some;
}

// A row, and the numbers of its groups where these are not within it.
INL void fetch_row(const Stored& s, int64_t row) {
  fetch(s.rows + row * s.ld, s.bytes);
  for (const Grouped& g : s.grouped)
    if (g.from && g.group == g.size) fetch(g.from + row * g.row, (int64_t)g.per_row * g.size);
}

// Calls work(m, first) with a matrix of each ROWS of the rows `ids`, of which `first` is the first.
template <class Work>
static void each_picked(const Matrix& m, const Stored& stored, const int64_t* ids, int n, int threads,
                        const Work& work) {
  in_parallel((n + ROWS - 1) / ROWS, threads, [&](int piece) {
    const int first = piece * ROWS, count = std::min(ROWS, n - first);
    Stored picked = stored;
    picked.which = ids + first;
    for (int i = 0; i < count; i++) fetch_row(picked, picked.which[i]);
    work(packed_again(m, picked, count), first);
  });
}

// The rows `ids` as `dense` defines them, to `out [n, columns]`.
static void dense_picked(const Matrix& m, const Stored& stored, const int64_t* ids, int n, float* out,
                         int threads) {
  each_picked(m, stored, ids, n, threads, [&](const Matrix& some, int first) {
    dense(some, nullptr, 0, some.rows, out + (int64_t)first * m.columns, 1);
  });
}

}  // namespace
