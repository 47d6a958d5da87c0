// Vectors of AVX-512, with VNNI; simd.h tells what they are.
#pragma once
#include <immintrin.h>

namespace {

constexpr int LANES = 16;
typedef __m512i V;
typedef __m512 F;
INL V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
INL V splat8(uint8_t x) { return _mm512_set1_epi8((char)x); }
INL V quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
INL V both(V a, V b) { return _mm512_and_si512(a, b); }
INL V either(V a, V b) { return _mm512_or_si512(a, b); }
INL V with(V a, V b, V mask) { return _mm512_ternarylogic_epi32(a, b, mask, 0xf8); }  // a | b & mask
template <int N> INL V right(V a) { return _mm512_srli_epi16(a, N); }
template <int N> INL V left(V a) { return _mm512_slli_epi16(a, N); }
INL V table16(const uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
INL V lookup(V table, V index) { return _mm512_shuffle_epi8(table, index); }
INL F fzero() { return _mm512_setzero_ps(); }
INL F fload(const float* p) { return _mm512_loadu_ps(p); }
INL void fstore(float* p, F a) { _mm512_storeu_ps(p, a); }
INL F fsplat(float x) { return _mm512_set1_ps(x); }
INL F fadd(F a, F b) { return _mm512_add_ps(a, b); }
INL F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
INL F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
INL F fdiv(F a, F b) { return _mm512_div_ps(a, b); }
INL F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INL F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
INL F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
INL F fmax2(F a, F b) { return _mm512_max_ps(a, b); }
INL F fmin2(F a, F b) { return _mm512_min_ps(a, b); }
INL F fabs1(F a) { return _mm512_abs_ps(a); }
INL F fround(F a) { return _mm512_roundscale_ps(a, 0); }
INL F fpow2(F n) {  // 2^n of whole numbers in float's normal range
  __m512i i = _mm512_cvtps_epi32(n);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(127)), 23));
}
INL float fsum(F a) { return _mm512_reduce_add_ps(a); }
INL void fsum4(const F* a, float* out) {  // four sums in fewer steps than four times one
  F x = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  F y = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  F z = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
INL float fmaximum(F a) { return _mm512_reduce_max_ps(a); }
INL uint32_t fno_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // a bit a lane
INL F fload_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
INL F fload_bf16(const uint16_t* p) {
  __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
INL F fload_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INL F fload_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// A float's exponent starts 120 lower, and its mantissa is longer: times 2^-120, subnormals included.
INL F fload_e4m3(const uint8_t* p) {
  __m512i x = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  x = _mm512_and_si512(_mm512_slli_epi32(x, 20), _mm512_set1_epi32((int)0x87f00000));
  return _mm512_castsi512_ps(x);
}
INL F fload_e8m0(const uint8_t* p) {  // 2^(code - 127), of which the first is subnormal
  __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
  x = _mm512_max_epi32(_mm512_slli_epi32(x, 23), _mm512_set1_epi32(0x00400000));
  return _mm512_castsi512_ps(x);
}
INL F fgather(const float* table, const uint8_t* p) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), table, 4);
}
INL void fstore_f16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 0));
}
INL F fto_f16(F a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, 0)); }
INL F fto_bf16(F a) {
  __m512i x = _mm512_castps_si512(a);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  x = _mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
template <int J> INL F fbyte(V a) {  // byte J of each quad
  return _mm512_cvtepi32_ps(
      _mm512_and_si512(_mm512_srli_epi32(a, 8 * J), _mm512_set1_epi32(255)));
}
template <int J> INL F fvalue(const float* values, V a) {  // of 16, by byte J of each quad
  return _mm512_permutexvar_ps(_mm512_srli_epi32(a, 8 * J), _mm512_loadu_ps(values));
}
INL void store_codes(int8_t* out, const F* x) {  // 32 numbers, whole after rounding, within a byte
  __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  for (int i = 0; i < 2; i++)
    _mm_storeu_si128((__m128i*)out + i,
                     _mm_shuffle_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x[i])), order));
}
template <int BITS> struct Dot {
  static constexpr float BIAS = 0, ONE = 1;
  static constexpr int HELD = 16;  // by registers, beside what is added
  __m512i s;
  template <int T, int N> INL_MEMBER void add(V w, V a) {
    s = _mm512_dpbusd_epi32(T == 0 ? _mm512_setzero_si512() : s, w, a);
  }
  INL_MEMBER F total() const { return _mm512_cvtepi32_ps(s); }
};

}  // namespace
