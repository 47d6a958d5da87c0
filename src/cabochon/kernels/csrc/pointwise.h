// What happens to one row at a time: norms, GELU, rotation, exponentials.
#pragma once
#include "simd.h"

namespace {

INL F fexp(F x) {  // of what is no number, no number
  x = fmin2(fsplat(88.0f), fmax2(fsplat(-87.0f), x));
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

}  // namespace
