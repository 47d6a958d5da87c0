// Vectors of AVX2, and of AVX-VNNI; simd.h tells what they are.
#pragma once
#include <immintrin.h>

namespace {

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

}  // namespace
