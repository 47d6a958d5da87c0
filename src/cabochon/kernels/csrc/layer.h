// What gemma4/text.py computes in a decoder layer.
#pragma once
#include "experts.h"
#include "prompt.h"

namespace {

template <class Work> INL void each_row(const Pass& s, const Work& work) {
  each_row(s.n, s.threads, work);
}

// Room for what attention makes and looks at, of one pass.
struct Vectors {
  float *queries, *attended, *keys, *values;
};

static void before(const Layer& l, const View& cache, const Rotation& rotation, const Pass& s,
                   const Vectors& made, float* normed) {
  const int width = l.heads * l.head_dim, kept = l.kv_heads * l.head_dim, pairs = l.head_dim / 2;
  each_row(s, [&](int i) {
    normalize(s.x + (int64_t)i * l.hidden, l.before_attention, l.hidden, l.eps,
              normed + (int64_t)i * l.hidden);
  });
  Input in{normed, s.n, l.hidden, s.threads};
  if (l.shares_kv) in.times(l.q, made.queries);
  else if (l.values_are_keys) in.times({{&l.q, made.queries}, {&l.k, made.keys}});
  else in.times({{&l.q, made.queries}, {&l.k, made.keys}, {&l.v, made.values}});
  each_row(s, [&](int i) {
    const float *cos = rotation.cos + (int64_t)i * pairs, *sin = rotation.sin + (int64_t)i * pairs;
    for (int h = 0; h < l.heads; h++) {
      float* q = made.queries + (int64_t)i * width + h * l.head_dim;
      normalize(q, l.q_norm, l.head_dim, l.eps, q);
      rotate(q, cos, sin, l.head_dim);
    }
    if (l.shares_kv) return;
    for (int h = 0; h < l.kv_heads; h++) {
      float* k = made.keys + (int64_t)i * kept + h * l.head_dim;
      float* v = made.values + (int64_t)i * kept + h * l.head_dim;
      normalize(l.values_are_keys ? k : v, nullptr, l.head_dim, l.eps, v);
      normalize(k, l.k_norm, l.head_dim, l.eps, k);
      rotate(k, cos, sin, l.head_dim);
    }
    const int64_t at = (int64_t)i * kept, slot = cache.slots[i];
    write_kept(cache, made.keys + at, cache.keys, cache.key_scales, slot, l.kv_heads, l.head_dim);
    write_kept(cache, made.values + at, cache.values, cache.value_scales, slot, l.kv_heads, l.head_dim);
  });
}

// gelu(gate(x)) * up(x), projected back, of the rows `normed`.
static void feed_forward(const Layer& l, const Pass& s, const float* normed, float* made) {
  const int width = l.intermediate, n = s.n;
  const int each = std::max(ROWS, rows_at_once(l.gate, n) / ROWS * ROWS);
  const Next next = Next::of(l.down, n, width);
  Input in{normed, n, l.hidden, s.threads};
  in.ready(l.gate), in.ready(l.up);
  in_parallel((width + each - 1) / each, s.threads, [&](int piece) {
    static thread_local Room room;
    const int from = piece * each, to = std::min(from + each, width), some = to - from;
    float *gate = room.of((size_t)n * some * 2), *up = gate + (size_t)n * some;
    in.made.times(l.gate, 0, n, from, to, gate, some, 1);
    in.made.times(l.up, 0, n, from, to, up, some, 1);
    for (int64_t i = 0; i < n; i++) {
      gate_by_gelu(gate + i * some, up + i * some, some);
      next.put(i, gate + i * some, from, to);
    }
  });
  next.inputs().times(l.down, 0, n, 0, l.hidden, made, l.hidden, s.threads);
}

// To what `feed_forward` made, what the experts make of the same rows; each through its norm.
static void add_experts(const Layer& l, const Pass& s, float* normed, float* room, float* made) {
  const Experts& e = *l.experts;
  const Pairs pairs = route(e, s.x, s.n, l.hidden, l.eps, s.threads);
  each_row(s, [&](int i) {
    const int64_t at = (int64_t)i * l.hidden;
    normalize(s.x + at, e.before, l.hidden, l.eps, normed + at);
  });
  mix(e, pairs, normed, s.n, l.hidden, room, s.threads);
  each_row(s, [&](int i) {
    const int64_t at = (int64_t)i * l.hidden;
    normalize(made + at, e.after_mlp, l.hidden, l.eps, made + at);
    normalize(room + at, e.after, l.hidden, l.eps, made + at, true);
  });
}

// What the layer gets of each token for itself.
static void add_own(const Layer& l, const Pass& s, float* room, float* made) {
  Input{s.x, s.n, l.hidden, s.threads}.times(l.own_gate, room);
  each_row(s, [&](int i) {
    gate_by_gelu(room + (int64_t)i * l.own, s.inputs + i * s.inputs_ld, l.own);
  });
  Input{room, s.n, l.own, s.threads}.times(l.own_up, made);
  each_row(s, [&](int i) {
    const int64_t at = (int64_t)i * l.hidden;
    normalize(made + at, l.after_own, l.hidden, l.eps, s.x + at, true);
  });
}

static void after(const Layer& l, const Pass& s, const float* attended, float* normed) {
  static thread_local Room rooms;
  const int64_t size = (int64_t)s.n * std::max(l.hidden, l.own);
  float *room = rooms.of(2 * size), *made = room + size;
  Input{attended, s.n, l.heads * l.head_dim, s.threads}.times(l.o, made);
  each_row(s, [&](int i) {
    const int64_t at = (int64_t)i * l.hidden;
    normalize(made + at, l.after_attention, l.hidden, l.eps, s.x + at, true);
    normalize(s.x + at, l.before_mlp, l.hidden, l.eps, normed + at);
  });
  feed_forward(l, s, normed, made);
  if (l.experts) add_experts(l, s, normed, room, made);
  each_row(s, [&](int i) {
    const int64_t at = (int64_t)i * l.hidden;
    normalize(made + at, l.after_mlp, l.hidden, l.eps, s.x + at, true);
  });
  if (l.own) add_own(l, s, room, made);
  each_row(s, [&](int i) {
    float* x = s.x + (int64_t)i * l.hidden;
    for (int k = 0; k < l.hidden; k += LANES) fstore(x + k, fmul(fload(x + k), fsplat(l.scalar)));
  });
}

static void run_layer(const Layer& l, const View& cache, const Rotation& rotation, const Pass& s) {
  static thread_local Room rows, room;
  const int64_t width = l.heads * l.head_dim, kept = l.kv_heads * l.head_dim;
  float* normed = rows.of((size_t)s.n * l.hidden);
  float* queries = room.of(2 * s.n * (width + kept));
  float *attended = queries + s.n * width, *keys = attended + s.n * width;
  const Vectors made{queries, attended, keys, keys + s.n * kept};
  before(l, cache, rotation, s, made, normed);
  attend(cache, s.n, {l.heads, l.kv_heads, l.head_dim}, queries, attended, s.threads);
  after(l, s, attended, normed);
}

}  // namespace
