// What gemma4/text.py computes: all that lies between embeddings and head.
#pragma once
#include <vector>

#include "layer.h"
#include "rotary.h"

namespace {

// How each row turns, a rotation after the other.
struct Rotations {
  std::vector<float> angles;
  std::vector<Rotation> each;

  Rotations(const Text& t, const int64_t* positions, int64_t n, int threads) {
    int64_t pairs = 0;
    for (int k = 0; k < t.rotations; k++) pairs += t.pairs[k];
    angles.resize(2 * n * pairs);
    float* at = angles.data();
    for (int k = 0; k < t.rotations; k++, at += 2 * n * t.pairs[k - 1]) {
      each.push_back({at, at + n * t.pairs[k]});
      turn(t.frequencies[k], positions, n, t.pairs[k], at, at + n * t.pairs[k], threads);
    }
  }
};

// found = (norm(projected * scale) + found) / sqrt(2), of every row.
static void add_projected(const Text& t, const Step& s, float* projected) {
  const F scale = fsplat(t.own_scale), half = fsplat((float)std::sqrt(0.5));
  const int64_t width = (int64_t)t.count * t.own;
  each_row(s.n, s.threads, [&](int i) {
    float* row = projected + i * width;
    for (int64_t k = 0; k < width; k += LANES) fstore(row + k, fmul(fload(row + k), scale));
    for (int64_t k = 0; k < width; k += t.own) normalize(row + k, t.own_norm, t.own, t.eps, row + k);
    for (int64_t k = 0; k < width; k += LANES)
      fstore(row + k, fmul(fadd(fload(row + k), fload(s.found + i * width + k)), half));
  });
}

static void run_layers(const Text& t, const Cache* caches, const Access* accesses,
                       const Rotations& rotations, int first, int last, const Pass& pass) {
  for (int i = first; i < last; i++) {
    Pass own = pass;
    if (t.own) own.inputs += (int64_t)i * t.own;
    const View view{caches[i], accesses[caches[i].group]};
    run_layer(*t.layers[i], view, rotations.each[t.turns[i]], own);
  }
}

// What `wanted` rows of a step see. They write nothing.
struct Narrowed {
  std::vector<int32_t> numbers;
  std::vector<Access> accesses;
  std::vector<int64_t> positions;

  explicit Narrowed(const Step& s) : numbers(3 * s.groups * s.rows) {
    int32_t* at = numbers.data();
    const auto some = [&](const int32_t* of) {
      for (int i = 0; i < s.rows; i++) at[i] = of[s.wanted[i]];
      return (at += s.rows) - s.rows;
    };
    for (int g = 0; g < s.groups; g++) {
      const Access& a = s.accesses[g];
      accesses.push_back({nullptr, a.pages, some(a.page_at), some(a.low), some(a.high)});
    }
    for (int i = 0; i < s.rows; i++) positions.push_back(s.positions[s.wanted[i]]);
  }
};

// Rows `wanted` of `from`, `width` numbers each.
static void gather(const Step& s, const float* from, int64_t width, float* to) {
  for (int i = 0; i < s.rows; i++)
    memcpy(to + i * width, from + s.wanted[i] * width, width * sizeof(float));
}

static void run_text(const Text* text, const Cache* caches, const Step* step) {
  static thread_local Room room, narrow;
  const Text& t = *text;
  const Step& s = *step;
  const int hidden = t.layers[0]->hidden;
  const int64_t width = (int64_t)t.count * t.own;
  Pass pass{s.x, nullptr, width, s.n, s.threads};
  if (t.own) {
    float* projected = room.of(s.n * width);
    Input{s.x, s.n, hidden, s.threads}.times(t.projection, projected);
    add_projected(t, s, projected);
    pass.inputs = projected;
  }
  const bool all = s.rows == s.n;
  const int whole = all ? t.count : t.writing;
  run_layers(t, caches, s.accesses, Rotations(t, s.positions, s.n, s.threads), 0, whole, pass);
  if (!s.rows) return;
  if (all) {
    memcpy(s.y, s.x, s.n * hidden * sizeof(float));
  } else {
    gather(s, s.x, hidden, s.y);
    const Narrowed seen(s);
    pass.x = s.y, pass.n = s.rows;
    if (t.own) {
      float* inputs = narrow.of(s.rows * width);
      gather(s, pass.inputs, width, inputs);
      pass.inputs = inputs;
    }
    const Rotations rotations(t, seen.positions.data(), s.rows, s.threads);
    run_layers(t, caches, seen.accesses.data(), rotations, whole, t.count, pass);
  }
  each_row(s.rows, s.threads, [&](int i) {
    float* y = s.y + (int64_t)i * hidden;
    normalize(y, t.norm, hidden, t.eps, y);
  });
}

}  // namespace
