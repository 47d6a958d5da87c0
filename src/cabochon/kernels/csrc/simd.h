// Vectors of one instruction set: `V` is LANES quads of bytes, `F` is LANES floats, `Dot` sums
// products of unsigned and signed bytes. Everything above this file is written once.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "api.h"

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

}  // namespace

#if defined(CABOCHON_AVX512)
#include "simd_avx512.h"
#elif defined(CABOCHON_AVX2)
#include "simd_avx2.h"
#elif defined(CABOCHON_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

#if !defined(CABOCHON_WORDS)
namespace {

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

}  // namespace
#endif
