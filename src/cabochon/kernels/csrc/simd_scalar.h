// Vectors of plain C++; simd.h tells what they are.
#pragma once

namespace {

constexpr int LANES = 16;
struct V { uint8_t b[4 * LANES]; };
struct F { float f[LANES]; };
#define EACH(type, expression) type r; for (int i = 0; i < LANES; i++) r.f[i] = expression; return r
#define BYTES(expression) V r; for (int i = 0; i < 4 * LANES; i++) r.b[i] = expression; return r
INL V load(const uint8_t* p) { BYTES(p[i]); }
INL V splat8(uint8_t x) { BYTES(x); }
INL V quad(const int8_t* p) { BYTES((uint8_t)p[i % 4]); }
INL V both(V a, V b) { BYTES(a.b[i] & b.b[i]); }
INL V either(V a, V b) { BYTES(a.b[i] | b.b[i]); }
INL V with(V a, V b, V mask) { BYTES(a.b[i] | (b.b[i] & mask.b[i])); }
template <int N> INL V right(V a) { BYTES((uint8_t)(a.b[i] >> N)); }
template <int N> INL V left(V a) { BYTES((uint8_t)(a.b[i] << N)); }
INL V table16(const uint8_t* p) { BYTES(p[i % 16]); }
INL V lookup(V table, V index) { BYTES(table.b[index.b[i] & 15]); }
INL F fzero() { EACH(F, 0.0f); }
INL F fload(const float* p) { EACH(F, p[i]); }
INL void fstore(float* p, F a) { for (int i = 0; i < LANES; i++) p[i] = a.f[i]; }
INL F fsplat(float x) { EACH(F, x); }
INL F fadd(F a, F b) { EACH(F, a.f[i] + b.f[i]); }
INL F fsub(F a, F b) { EACH(F, a.f[i] - b.f[i]); }
INL F fmul(F a, F b) { EACH(F, a.f[i] * b.f[i]); }
INL F fdiv(F a, F b) { EACH(F, a.f[i] / b.f[i]); }
INL F fma(F a, F b, F c) { EACH(F, a.f[i] * b.f[i] + c.f[i]); }
INL F fms(F a, F b, F c) { EACH(F, a.f[i] * b.f[i] - c.f[i]); }
INL F fnma(F a, F b, F c) { EACH(F, c.f[i] - a.f[i] * b.f[i]); }
INL F fmax2(F a, F b) { EACH(F, a.f[i] > b.f[i] ? a.f[i] : b.f[i]); }
INL F fmin2(F a, F b) { EACH(F, a.f[i] < b.f[i] ? a.f[i] : b.f[i]); }
INL F fabs1(F a) { EACH(F, std::fabs(a.f[i])); }
INL F fround(F a) { EACH(F, std::nearbyint(a.f[i])); }
INL F fpow2(F n) { EACH(F, std::ldexp(1.0f, (int)n.f[i])); }
INL float fsum(F a) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += a.f[i];
  return s;
}
INL void fsum4(const F* a, float* out) {
  for (int i = 0; i < 4; i++) out[i] = fsum(a[i]);
}
INL float fmaximum(F a) {
  float s = a.f[0];
  for (int i = 1; i < LANES; i++) s = s > a.f[i] ? s : a.f[i];
  return s;
}
INL uint32_t fno_less(F a, F b) {
  uint32_t bits = 0;
  for (int i = 0; i < LANES; i++) bits |= (uint32_t)(a.f[i] >= b.f[i]) << i;
  return bits;
}
INL F fload_f16(const uint16_t* p) { EACH(F, half_to_float(p[i])); }
INL F fload_bf16(const uint16_t* p) { EACH(F, bf16_to_float(p[i])); }
INL F fload_u8(const uint8_t* p) { EACH(F, (float)p[i]); }
INL F fload_i8(const uint8_t* p) { EACH(F, (float)(int8_t)p[i]); }
INL F fload_e4m3(const uint8_t* p) { EACH(F, e4m3_tiny(p[i])); }
INL F fload_e8m0(const uint8_t* p) { EACH(F, e8m0_to_float(p[i])); }
INL F fgather(const float* table, const uint8_t* p) { EACH(F, table[p[i]]); }
INL void fstore_f16(uint16_t* p, F a) {
  for (int i = 0; i < LANES; i++) p[i] = float_to_half(a.f[i]);
}
INL F fto_f16(F a) { EACH(F, half_to_float(float_to_half(a.f[i]))); }
INL F fto_bf16(F a) { EACH(F, bf16_to_float(float_to_bf16(a.f[i]))); }
template <int J> INL F fbyte(V a) { EACH(F, (float)a.b[4 * i + J]); }
template <int J> INL F fvalue(const float* values, V a) { EACH(F, values[a.b[4 * i + J] & 15]); }
INL void store_codes(int8_t* out, const F* x) {
  for (int d = 0; d < 4; d++)
    for (int j = 0; j < 8; j++)
      out[8 * d + 4 * (j & 1) + j / 2] = (int8_t)(int)std::nearbyint(x[d / 2].f[d % 2 * 8 + j]);
}
template <int BITS> struct Dot {
  static constexpr float BIAS = 0, ONE = 1;
  static constexpr int HELD = 2;
  int32_t s[LANES];
  template <int T, int N> INL_MEMBER void add(V w, V a) {
    for (int i = 0; i < LANES; i++) {
      int32_t p = 0;
      for (int j = 0; j < 4; j++) p += (int)w.b[4 * i + j] * (int8_t)a.b[4 * i + j];
      s[i] = T == 0 ? p : s[i] + p;
    }
  }
  INL_MEMBER F total() const { EACH(F, (float)s[i]); }
};

}  // namespace
