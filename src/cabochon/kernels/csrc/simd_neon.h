// Vectors of NEON, with its dot products; simd.h tells what they are.
#pragma once
#include <arm_neon.h>

namespace {

constexpr int LANES = 4;
typedef uint8x16_t V;
typedef float32x4_t F;
INL V load(const uint8_t* p) { return vld1q_u8(p); }
INL V splat8(uint8_t x) { return vdupq_n_u8(x); }
INL V quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return vreinterpretq_u8_s32(vdupq_n_s32(x));
}
INL V both(V a, V b) { return vandq_u8(a, b); }
INL V either(V a, V b) { return vorrq_u8(a, b); }
INL V with(V a, V b, V mask) { return either(a, both(b, mask)); }
template <int N> INL V right(V a) {
  return vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(-N)));
}
template <int N> INL V left(V a) {
  return vreinterpretq_u8_u16(vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(N)));
}
INL V table16(const uint8_t* p) { return vld1q_u8(p); }
INL V lookup(V table, V index) { return vqtbl1q_u8(table, index); }
INL F fzero() { return vdupq_n_f32(0); }
INL F fload(const float* p) { return vld1q_f32(p); }
INL void fstore(float* p, F a) { vst1q_f32(p, a); }
INL F fsplat(float x) { return vdupq_n_f32(x); }
INL F fadd(F a, F b) { return vaddq_f32(a, b); }
INL F fsub(F a, F b) { return vsubq_f32(a, b); }
INL F fmul(F a, F b) { return vmulq_f32(a, b); }
INL F fdiv(F a, F b) { return vdivq_f32(a, b); }
INL F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
INL F fms(F a, F b, F c) { return vfmaq_f32(vnegq_f32(c), a, b); }
INL F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
INL F fmax2(F a, F b) { return vmaxq_f32(a, b); }
INL F fmin2(F a, F b) { return vminq_f32(a, b); }
INL F fabs1(F a) { return vabsq_f32(a); }
INL F fround(F a) { return vrndnq_f32(a); }
INL F fpow2(F n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
INL float fsum(F a) { return vaddvq_f32(a); }
INL void fsum4(const F* a, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3])));
}
INL float fmaximum(F a) { return vmaxvq_f32(a); }
INL uint32_t fno_less(F a, F b) {
  const uint32x4_t bits = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bits));
}
INL F fload_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INL F fload_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INL F fload_u8(const uint8_t* p) {
  float x[4] = {(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
  return vld1q_f32(x);
}
INL F fload_i8(const uint8_t* p) {
  float x[4] = {(float)(int8_t)p[0], (float)(int8_t)p[1], (float)(int8_t)p[2], (float)(int8_t)p[3]};
  return vld1q_f32(x);
}
INL F fload_e4m3(const uint8_t* p) {  // times 2^-120
  float x[4];
  for (int i = 0; i < 4; i++) x[i] = e4m3_tiny(p[i]);
  return vld1q_f32(x);
}
INL F fload_e8m0(const uint8_t* p) {
  float x[4];
  for (int i = 0; i < 4; i++) x[i] = e8m0_to_float(p[i]);
  return vld1q_f32(x);
}
INL F fgather(const float* table, const uint8_t* p) {
  float x[4] = {table[p[0]], table[p[1]], table[p[2]], table[p[3]]};
  return vld1q_f32(x);
}
INL void fstore_f16(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
INL F fto_f16(F a) { return vcvt_f32_f16(vcvt_f16_f32(a)); }
INL F fto_bf16(F a) {
  uint32x4_t x = vreinterpretq_u32_f32(a);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  x = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)));
}
template <int J> INL F fbyte(V a) {
  uint32x4_t x = vshlq_u32(vreinterpretq_u32_u8(a), vdupq_n_s32(-8 * J));
  return vcvtq_f32_u32(vandq_u32(x, vdupq_n_u32(255)));
}
template <int J> INL F fvalue(const float* values, V a) {
  uint8_t b[16];
  vst1q_u8(b, a);
  float x[4];
  for (int i = 0; i < 4; i++) x[i] = values[b[4 * i + J] & 15];
  return vld1q_f32(x);
}
INL void store_codes(int8_t* out, const F* x) {
  for (int d = 0; d < 4; d++) {
    int32_t c[8];
    vst1q_s32(c, vcvtnq_s32_f32(x[2 * d]));
    vst1q_s32(c + 4, vcvtnq_s32_f32(x[2 * d + 1]));
    for (int j = 0; j < 4; j++) {
      out[8 * d + j] = (int8_t)c[2 * j];
      out[8 * d + 4 + j] = (int8_t)c[2 * j + 1];
    }
  }
}
template <int BITS> struct Dot {  // signed times signed: codes of eight bits are moved by BIAS
  static constexpr float BIAS = BITS == 8 ? 128 : 0, ONE = 1;
  static constexpr int HELD = 24;
  int32x4_t s;
  template <int T, int N> INL_MEMBER void add(V w, V a) {
    if (BITS == 8) w = veorq_u8(w, vdupq_n_u8(0x80));
    s = vdotq_s32(T == 0 ? vdupq_n_s32(0) : s, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(a));
  }
  INL_MEMBER F total() const { return vcvtq_f32_s32(s); }
};

}  // namespace
