// Vectors of one instruction set: `V` is LANES quads of bytes, `F` is LANES floats, `Dot` sums
// products of unsigned and signed bytes. Everything above this file is written once.
#pragma once
#include "api.h"
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(CABOCHON_AVX512) || defined(CABOCHON_AVX2)
#include <immintrin.h>
#elif defined(CABOCHON_NEON)
#include <arm_neon.h>
#endif

#if defined(CABOCHON_AVX512) || defined(CABOCHON_AVX2) || defined(CABOCHON_NEON)
#define INL static inline __attribute__((always_inline))
#define INL_MEMBER inline __attribute__((always_inline))
#else  // speed does not matter, the time to compile does
#define INL static inline
#define INL_MEMBER inline
#endif
// gcc turns sums of vectors into trees, and spills them; this pins their order.
#define KEEP(x) asm("" : "+x"(x))

namespace {  // the same names mean something else in each instruction set's object

INL float from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INL float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + 0x38000000));
  float small = (float)rest * 0x1p-24f;  // subnormal
  return sign ? -small : small;
}

INL float bf16_to_float(uint16_t h) {
  return from_bits((uint32_t)h << 16);
}

INL float e4m3_tiny(uint8_t x) {  // times 2^-120
  return from_bits((uint32_t)(x & 0x80) << 24 | (uint32_t)(x & 0x7f) << 20);
}

INL float e8m0_to_float(uint8_t x) {
  return from_bits(x ? (uint32_t)x << 23 : 0x00400000);
}

INL uint16_t float_to_bf16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INL uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;
  if (bits < 0x38800000) {  // subnormal: let the addition round
    float x, magic = 0.5f;
    memcpy(&x, &bits, 4);
    x += magic;
    memcpy(&bits, &x, 4);
    return sign | (uint16_t)(bits - 0x3f000000);
  }
  return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
}

// ------------------------------------------------------------------------------------ AVX-512
#if defined(CABOCHON_AVX512)
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

// --------------------------------------------------------------------------- AVX2 and AVX-VNNI
#elif defined(CABOCHON_AVX2)
constexpr int LANES = 8;
typedef __m256i V;
typedef __m256 F;
INL V load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INL V splat8(uint8_t x) { return _mm256_set1_epi8((char)x); }
INL V quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
INL V both(V a, V b) { return _mm256_and_si256(a, b); }
INL V either(V a, V b) { return _mm256_or_si256(a, b); }
INL V with(V a, V b, V mask) { return either(a, both(b, mask)); }
template <int N> INL V right(V a) { return _mm256_srli_epi16(a, N); }
template <int N> INL V left(V a) { return _mm256_slli_epi16(a, N); }
INL V table16(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}
INL V lookup(V table, V index) { return _mm256_shuffle_epi8(table, index); }
INL F fzero() { return _mm256_setzero_ps(); }
INL F fload(const float* p) { return _mm256_loadu_ps(p); }
INL void fstore(float* p, F a) { _mm256_storeu_ps(p, a); }
INL F fsplat(float x) { return _mm256_set1_ps(x); }
INL F fadd(F a, F b) { return _mm256_add_ps(a, b); }
INL F fsub(F a, F b) { return _mm256_sub_ps(a, b); }
INL F fmul(F a, F b) { return _mm256_mul_ps(a, b); }
INL F fdiv(F a, F b) { return _mm256_div_ps(a, b); }
INL F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INL F fms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
INL F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
INL F fmax2(F a, F b) { return _mm256_max_ps(a, b); }
INL F fmin2(F a, F b) { return _mm256_min_ps(a, b); }
INL F fabs1(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
INL F fround(F a) { return _mm256_round_ps(a, 0); }
INL F fpow2(F n) {
  __m256i i = _mm256_cvtps_epi32(n);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(127)), 23));
}
INL float fsum(F a) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
INL void fsum4(const F* a, float* out) {
  F x = _mm256_add_ps(_mm256_unpacklo_ps(a[0], a[1]), _mm256_unpackhi_ps(a[0], a[1]));
  F y = _mm256_add_ps(_mm256_unpacklo_ps(a[2], a[3]), _mm256_unpackhi_ps(a[2], a[3]));
  F z = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
}
INL float fmaximum(F a) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}
INL uint32_t fno_less(F a, F b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
INL F fload_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INL F fload_bf16(const uint16_t* p) {
  __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
INL F fload_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INL F fload_i8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INL F fload_e4m3(const uint8_t* p) {  // times 2^-120
  __m256i x = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  x = _mm256_and_si256(_mm256_slli_epi32(x, 20), _mm256_set1_epi32((int)0x87f00000));
  return _mm256_castsi256_ps(x);
}
INL F fload_e8m0(const uint8_t* p) {
  __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
  x = _mm256_max_epi32(_mm256_slli_epi32(x, 23), _mm256_set1_epi32(0x00400000));
  return _mm256_castsi256_ps(x);
}
INL F fgather(const float* table, const uint8_t* p) {
  return _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), 4);
}
INL void fstore_f16(uint16_t* p, F a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, 0)); }
INL F fto_f16(F a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, 0)); }
INL F fto_bf16(F a) {
  __m256i x = _mm256_castps_si256(a);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  x = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}
template <int J> INL F fbyte(V a) {
  return _mm256_cvtepi32_ps(
      _mm256_and_si256(_mm256_srli_epi32(a, 8 * J), _mm256_set1_epi32(255)));
}
template <int J> INL F fvalue(const float* values, V a) {
  __m256i index = _mm256_srli_epi32(a, 8 * J);
  __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), index);
  __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
INL void store_codes(int8_t* out, const F* x) {
  __m256i i[4];
  for (int k = 0; k < 4; k++) i[k] = _mm256_cvtps_epi32(x[k]);
  __m256i p = _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
  p = _mm256_permutevar8x32_epi32(p, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  _mm256_storeu_si256((__m256i*)out, _mm256_shuffle_epi8(p, order));
}
#if defined(CABOCHON_VNNI)
template <int BITS> struct Dot {
  static constexpr float BIAS = 0, ONE = 1;
  static constexpr int HELD = 8;
  __m256i s;
  template <int T, int N> INL_MEMBER void add(V w, V a) {
    s = _mm256_dpbusd_avx_epi32(T == 0 ? _mm256_setzero_si256() : s, w, a);
  }
  INL_MEMBER F total() const { return _mm256_cvtepi32_ps(s); }
};
#else
// Pairs of products are summed in 16 bits for as long as they fit: `FLUSH` quads.
template <int BITS> struct Dot {
  static constexpr float BIAS = BITS == 8 ? 128 : 0, ONE = 1;
  static constexpr int HELD = 8;
  static constexpr int FLUSH = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
  __m256i s16, s;
  template <int T, int N> INL_MEMBER void add(V w, V a) {
    __m256i p;
    if (BITS == 8) {  // 2 * 128 * 127 fits, 2 * 255 * 127 does not: signed codes, minus BIAS
      w = _mm256_xor_si256(w, _mm256_set1_epi8((char)0x80));
      p = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
    } else {
      p = _mm256_maddubs_epi16(w, a);
    }
    s16 = T % FLUSH == 0 ? p : _mm256_add_epi16(s16, p);
    KEEP(s16);
    if (T % FLUSH == FLUSH - 1 || T == N - 1) {
      __m256i wide = _mm256_madd_epi16(s16, _mm256_set1_epi16(1));
      s = T < FLUSH ? wide : _mm256_add_epi32(s, wide);
    }
  }
  INL_MEMBER F total() const { return _mm256_cvtepi32_ps(s); }
};
// Both digits of a value are one word of 16 bits: half the steps of two sums of bytes. Products of a
// row's quad are two sums until the end.
struct DotOfTwo {
  static constexpr float BIAS = 128, ONE = 1 + 1.0f / FINE;  // of either digit; 1 in each of them
  static constexpr int HELD = 16;  // more than there is room for: words of inputs are made once
  struct Values {
    V low, high;  // bytes of the words
  };
  struct Table {
    V low, high;
    INL_MEMBER Table(const uint8_t* first, const uint8_t* second) {
      uint8_t bytes[2][16];
      for (int i = 0; i < 16; i++) {
        const int word = (first[i] - 128) * FINE + second[i] - 128;
        bytes[0][i] = (uint8_t)word, bytes[1][i] = (uint8_t)(word >> 8);
      }
      low = table16(bytes[0]), high = table16(bytes[1]);
    }
    INL_MEMBER Values of(V codes) const { return {lookup(low, codes), lookup(high, codes)}; }
  };
  __m256i s[2];  // of rows 0, 1, 4, 5 and of the others
  template <int T, int N> INL_MEMBER void add(const Values& w, V a) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(a));
    const __m256i p = _mm256_madd_epi16(_mm256_unpacklo_epi8(w.low, w.high), words);
    const __m256i q = _mm256_madd_epi16(_mm256_unpackhi_epi8(w.low, w.high), words);
    s[0] = T == 0 ? p : _mm256_add_epi32(s[0], p);
    s[1] = T == 0 ? q : _mm256_add_epi32(s[1], q);
  }
  INL_MEMBER F total() const {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_hadd_epi32(s[0], s[1])), fsplat(1.0f / FINE));
  }
};
#define CABOCHON_WORDS
#endif

// ---------------------------------------------------------------------------------------- NEON
#elif defined(CABOCHON_NEON)
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

// -------------------------------------------------------------------------------------- scalar
#else
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
#endif

#if !defined(CABOCHON_WORDS)
// Sums products of bytes and of values of two digits, each of them a byte.
struct DotOfTwo {
  typedef Dot<8> D;
  static constexpr float BIAS = D::BIAS, ONE = 1 + 1.0f / FINE;
  static constexpr int HELD = D::HELD;
  struct Values {
    V first, second;
  };
  struct Table {
    V first, second;
    INL_MEMBER Table(const uint8_t* a, const uint8_t* b) : first(table16(a)), second(table16(b)) {}
    INL_MEMBER Values of(V codes) const { return {lookup(first, codes), lookup(second, codes)}; }
  };
  D first, second;
  template <int T, int N> INL_MEMBER void add(const Values& w, V a) {
    first.template add<T, N>(w.first, a);
    second.template add<T, N>(w.second, a);
  }
  INL_MEMBER F total() const { return fma(second.total(), fsplat(1.0f / FINE), first.total()); }
};
#endif

}  // namespace
