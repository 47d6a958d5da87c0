// How the codes of each quad are stored, and made bytes again. Written once over simd.h.
#pragma once
#include "api.h"
#include "simd.h"

namespace {

template <int T> INL V four_bits(const uint8_t* p) {
  V x = load(p + (T / 2) * 128);
  return both(T & 1 ? right<4>(x) : x, splat8(15));
}
template <int T> INL V two_bits(const uint8_t* p) {
  return both(right<2 * (T % 4)>(load(p + (T / 4) * 128)), splat8(3));
}
template <int T> INL V fifth_bit(const uint8_t* p) {  // bit T of each byte, moved to bit 4
  V x = load(p);
  if constexpr (T > 4) x = right<T - 4>(x);
  if constexpr (T < 4) x = left<4 - T>(x);
  return both(x, splat8(16));
}
// Six quads lie two in a vector; of the others, the two low bits above four of these, and the high
// ones above the last two.
template <int T> INL V three_bits(const uint8_t* p) {
  if constexpr (T < 6) return both(right<T % 2 * 3>(load(p + T / 2 * 128)), splat8(7));
  const V low = both(right<6>(load(p + T % 2 * 128)), splat8(3));
  return with(low, right<4 + T % 2>(load(p + 256)), splat8(4));
}
// Three quads of four lie in the low bits of three vectors, the fourth in what is left of them.
template <int T> INL V six_bits(const uint8_t* p) {
  p += T / 4 * 384;
  if constexpr (T % 4 < 3) return both(load(p + T % 4 * 128), splat8(63));
  V x = both(right<6>(load(p)), splat8(3));
  x = with(x, right<4>(load(p + 128)), splat8(12));
  return with(x, right<2>(load(p + 256)), splat8(48));
}

// `get` is what is multiplied, and summed in a `D`; `raw` is the code itself; BYTES are those of a unit.
struct CodesU8 {
  typedef Dot<8> D;
  static constexpr int BYTES = 1024;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU8(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const { return load(p + T * 128); }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesU4 {
  typedef Dot<4> D;
  static constexpr int BYTES = 512;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU4(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const {
    return four_bits<T>(p);
  }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesU2 {
  typedef Dot<2> D;
  static constexpr int BYTES = 256;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU2(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const {
    return two_bits<T>(p);
  }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesU3 {
  typedef Dot<3> D;
  static constexpr int BYTES = 384;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU3(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const { return three_bits<T>(p); }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesU5 {
  typedef Dot<5> D;
  static constexpr int BYTES = 640;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU5(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const {
    return either(four_bits<T>(p), fifth_bit<T>(p + 512));
  }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesU6 {
  typedef Dot<6> D;
  static constexpr int BYTES = 768;
  static constexpr bool TABLED = false;
  INL_MEMBER explicit CodesU6(const Matrix&) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const { return six_bits<T>(p); }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return raw<T>(p); }
};
struct CodesTable {  // 16 values of at most five bits
  typedef Dot<5> D;
  static constexpr int BYTES = 512;
  static constexpr bool TABLED = true;
  V table;
  INL_MEMBER explicit CodesTable(const Matrix& m) : table(table16(m.table[0])) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const { return four_bits<T>(p); }
  template <int T> INL_MEMBER V get(const uint8_t* p) const { return lookup(table, raw<T>(p)); }
};
struct CodesTable2 {  // 16 values of two digits
  typedef DotOfTwo D;
  static constexpr int BYTES = 512;
  static constexpr bool TABLED = true;
  DotOfTwo::Table table;
  INL_MEMBER explicit CodesTable2(const Matrix& m) : table(m.table[0], m.table[1]) {}
  template <int T> INL_MEMBER V raw(const uint8_t* p) const { return four_bits<T>(p); }
  template <int T> INL_MEMBER DotOfTwo::Values get(const uint8_t* p) const {
    return table.of(raw<T>(p));
  }
};

}  // namespace
