// A whole decoder layer without experts: what gemma4/text.py computes, in one call.
#pragma once
#include "attention.h"
#include "exact.h"
#include "rows.h"

namespace {

// out = x / rms(x) * weight; with `add`, that is added to `out`.
static void normalize(const float* x, const float* weight, int width, float eps, float* out,
                      bool add = false) {
  F sum = fzero();
  for (int i = 0; i < width; i += LANES) sum = fma(fload(x + i), fload(x + i), sum);
  const F by = fsplat(1.0f / std::sqrt(fsum(sum) / width + eps));
  for (int i = 0; i < width; i += LANES) {
    F y = fmul(fload(x + i), by);
    if (weight) y = fmul(y, fload(weight + i));
    fstore(out + i, add ? fadd(fload(out + i), y) : y);
  }
}

// gate = gelu(gate) * other, by tanh.
static void gate_by_gelu(float* gate, const float* other, int width) {
  for (int i = 0; i < width; i += LANES) {
    const F x = fload(gate + i);
    const F cube = fmul(fmul(x, x), x);
    const F u = fmul(fma(cube, fsplat(0.044715f), x), fsplat(-2 * 0.7978845608f));
    const F y = fdiv(x, fadd(fsplat(1.0f), fexp(u)));
    fstore(gate + i, fmul(y, fload(other + i)));
  }
}

static void rotate(float* x, const float* cos, const float* sin, int dim) {
  const int pairs = dim / 2, whole = pairs / LANES * LANES;
  for (int i = whole; i < pairs; i++) {
    const float a = x[i], b = x[pairs + i];
    x[i] = a * cos[i] - b * sin[i];
    x[pairs + i] = b * cos[i] + a * sin[i];
  }
  for (int i = 0; i < whole; i += LANES) {
    const F a = fload(x + i), b = fload(x + pairs + i), c = fload(cos + i), s = fload(sin + i);
    fstore(x + i, fsub(fmul(a, c), fmul(b, s)));
    fstore(x + pairs + i, fadd(fmul(b, c), fmul(a, s)));
  }
}

// What several matrices are multiplied with; quantized once, when the first of them asks.
struct Input {
  const float* x;
  int n, columns, threads;
  bool done = false;
  Quantized codes;

  void times(const Linear& w, float* y) {
    if (w.rows) return multiply_rows(*w.rows, x, columns, n, 0, w.rows->rows, y, w.rows->rows, threads);
    const Matrix& m = *w.packed;
    if (m.digits == 0) return multiply_exactly(m, x, columns, n, 0, m.rows, y, m.rows, threads);
    if (!done) {
      static thread_local Room room;
      const int count = n * m.digits;
      codes = quantized_in(room.of(quantized_bytes(count, m.units) / sizeof(float) + 1), count, m.units);
      quantize(x, columns, n, columns, m.units, m.digits, codes, threads);
      done = true;
    }
    multiply(m, codes, n * m.digits, 0, m.rows, y, m.rows, threads);
  }
};

template <class Work> INL void each_row(const Step& s, const Work& work) {
  in_parallel((s.n + FEW_ROWS - 1) / FEW_ROWS, s.threads, [&](int piece) {
    const int from = piece * FEW_ROWS, to = std::min(from + FEW_ROWS, s.n);
    for (int i = from; i < to; i++) work(i);
  });
}

static void write_kept(const Cache& cache, const float* from, void* to, int64_t slot, int width) {
  for (int i = 0; i < width; i += LANES)
    if (cache.half) fstore_f16((uint16_t*)to + slot * width + i, fload(from + i));
    else fstore((float*)to + slot * width + i, fload(from + i));
}

static void before(const Layer& l, const Cache& cache, const Step& s, float* normed) {
  const int width = l.heads * l.head_dim, kept = l.kv_heads * l.head_dim, pairs = l.head_dim / 2;
  each_row(s, [&](int i) {
    normalize(s.x + (int64_t)i * l.hidden, l.before_attention, l.hidden, l.eps,
              normed + (int64_t)i * l.hidden);
  });
  Input in{normed, s.n, l.hidden, s.threads};
  in.times(l.q, s.queries);
  if (!l.shares_kv) {
    in.times(l.k, s.keys);
    if (!l.values_are_keys) in.times(l.v, s.values);
  }
  each_row(s, [&](int i) {
    const float *cos = s.cos + (int64_t)i * pairs, *sin = s.sin + (int64_t)i * pairs;
    for (int h = 0; h < l.heads; h++) {
      float* q = s.queries + (int64_t)i * width + h * l.head_dim;
      normalize(q, l.q_norm, l.head_dim, l.eps, q);
      rotate(q, cos, sin, l.head_dim);
    }
    if (l.shares_kv) return;
    for (int h = 0; h < l.kv_heads; h++) {
      float* k = s.keys + (int64_t)i * kept + h * l.head_dim;
      float* v = s.values + (int64_t)i * kept + h * l.head_dim;
      normalize(l.values_are_keys ? k : v, nullptr, l.head_dim, l.eps, v);
      normalize(k, l.k_norm, l.head_dim, l.eps, k);
      rotate(k, cos, sin, l.head_dim);
    }
    if (!(s.phases & 2)) return;
    write_kept(cache, s.keys + (int64_t)i * kept, cache.keys, cache.slots[i], kept);
    write_kept(cache, s.values + (int64_t)i * kept, cache.values, cache.slots[i], kept);
  });
}

static void after(const Layer& l, const Step& s, float* normed) {
  static thread_local Room room;
  const int64_t n = s.n, wide = std::max(l.intermediate, l.hidden);
  float *first = room.of(2 * n * wide), *second = first + n * wide;
  const auto row = [&](float* p, int i) { return p + (int64_t)i * l.hidden; };
  Input{s.attended, s.n, l.heads * l.head_dim, s.threads}.times(l.o, first);
  each_row(s, [&](int i) {
    normalize(row(first, i), l.after_attention, l.hidden, l.eps, row(s.x, i), true);
    normalize(row(s.x, i), l.before_mlp, l.hidden, l.eps, row(normed, i));
  });
  Input in{normed, s.n, l.hidden, s.threads};
  in.times(l.gate, first);
  in.times(l.up, second);
  each_row(s, [&](int i) {
    gate_by_gelu(first + (int64_t)i * l.intermediate, second + (int64_t)i * l.intermediate,
                 l.intermediate);
  });
  Input{first, s.n, l.intermediate, s.threads}.times(l.down, second);
  each_row(s, [&](int i) {
    normalize(row(second, i), l.after_mlp, l.hidden, l.eps, row(s.x, i), true);
  });
  if (l.own) {
    Input{s.x, s.n, l.hidden, s.threads}.times(l.own_gate, first);
    each_row(s, [&](int i) {
      gate_by_gelu(first + (int64_t)i * l.own, s.inputs + i * s.inputs_ld, l.own);
    });
    Input{first, s.n, l.own, s.threads}.times(l.own_up, second);
    each_row(s, [&](int i) {
      normalize(row(second, i), l.after_own, l.hidden, l.eps, row(s.x, i), true);
    });
  }
  const F scalar = fsplat(l.scalar);
  each_row(s, [&](int i) {
    for (int k = 0; k < l.hidden; k += LANES)
      fstore(row(s.x, i) + k, fmul(fload(row(s.x, i) + k), scalar));
  });
}

static void run_layer(const Layer& l, const Cache& cache, const Step& s) {
  static thread_local Room room;
  float* normed = room.of((size_t)s.n * l.hidden);
  if (s.phases & 1) before(l, cache, s, normed);
  if (s.phases & 2)
    attend(cache, s.n, l.heads, l.kv_heads, l.head_dim, s.queries, s.attended, s.threads);
  if (s.phases & 4) after(l, s, normed);
}

}  // namespace
