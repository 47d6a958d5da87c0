// What the codes of a block count, and what is taken away from them, as floats.
#pragma once
#include "api.h"
#include "simd.h"

namespace {

constexpr int AHEAD = 6144;  // bytes to fetch before they are needed; measured on Zen 5

template <int KIND> INL F stored_scale(const uint8_t* p, int i, const float* levels) {
  if (KIND == F16) return fload_f16((const uint16_t*)p + i);
  if (KIND == BF16) return fload_bf16((const uint16_t*)p + i);
  if (KIND == F32) return fload((const float*)p + i);
  if (KIND == LEVEL) return fgather(levels, p + i);
  if (KIND == E4M3) return fload_e4m3(p + i);
  if (KIND == E8M0) return fload_e8m0(p + i);
  return KIND == SUB_U8 ? fload_u8(p + i) : fload_i8(p + i);
}

// Calls work(above, first, last) for the vectors of `[groups, 32]`, of each row's groups those that
// share what lies at `above`: every 32nd from `first` on.
template <class Work> INL void each_shared(const Matrix& m, const Work& work) {
  for (int g = 0, above = 0; g < m.groups; g += m.per_shared, above += ROWS)
    for (int v = 0; v < ROWS; v += LANES)
      work(above + v, g * ROWS + v, std::min(g + m.per_shared, m.groups) * ROWS);
}

template <int KIND>
static void expand_scales(const Matrix& m, const uint8_t* block, float* S, float gain) {
  constexpr int BYTES = KIND == F32 ? 4 : KIND <= BF16 ? 2 : 1;
  const auto some = [&](F by, int first, int last, int step) {
    for (int i = first; i < last; i += step) {
      if (i * BYTES % 64 == 0) __builtin_prefetch(block + i * BYTES + AHEAD);
      fstore(S + i, fmul(stored_scale<KIND>(block, i, m.levels), by));
    }
  };
  if (KIND != SUB_U8 && KIND != SUB_I8) return some(fsplat(gain), 0, m.groups * ROWS, LANES);
  const uint16_t* shared = (const uint16_t*)(block + m.shared_at);
  each_shared(m, [&](int above, int first, int last) {
    some(fmul(fload_f16(shared + above), fsplat(gain)), first, last, ROWS);
  });
}

template <int KIND> INL F stored_minimum(const Matrix& m, const uint8_t* p, int i) {
  if (KIND == CONSTANT) return fsplat(m.zero);
  if (KIND == MIN_F16) return fload_f16((const uint16_t*)p + i);
  if (KIND == MIN_BF16) return fload_bf16((const uint16_t*)p + i);
  return KIND == MIN_F32 ? fload((const float*)p + i) : fload_u8(p + i);
}

template <int KIND>
static void expand_minima(const Matrix& m, const uint8_t* block, const float* S, float* Z, float bias,
                          bool exact) {
  const uint8_t* minima = block + m.minima_at;
  const F back = fsplat(bias);
  const auto some = [&](F by, int first, int last, int step) {
    for (int i = first; i < last; i += step) {
      const F s = fload(S + i);
      F z = stored_minimum<KIND>(m, minima, i);
      if (KIND == MIN_SUB_U8 || (KIND <= ZERO_POINT && !exact)) z = fmul(z, KIND == MIN_SUB_U8 ? by : s);
      fstore(Z + i, fnma(back, s, z));
    }
  };
  if (KIND != MIN_SUB_U8) return some(fzero(), 0, m.groups * ROWS, LANES);
  const uint16_t* shared = (const uint16_t*)(block + m.shared_minima_at);
  each_shared(m, [&](int above, int first, int last) {
    some(fload_f16(shared + above), first, last, ROWS);
  });
}

// Scales `S` and, where `minus`, what is taken away, `Z`, of each group and row, `[groups, 32]`
// each: an entry is S * code - Z. With `exact`, where a code stands for zero, Z is that code.
static void expand(const Matrix& m, const uint8_t* block, float* S, float* Z, float bias, bool minus,
                   bool exact) {
  const float gain = exact ? 1.0f : m.gain;
  const bool by_table = exact && (m.scales == E4M3 || m.scales == E8M0);
  switch (by_table ? LEVEL : m.scales) {
    case F16: expand_scales<F16>(m, block, S, gain); break;
    case BF16: expand_scales<BF16>(m, block, S, gain); break;
    case F32: expand_scales<F32>(m, block, S, gain); break;
    case LEVEL: expand_scales<LEVEL>(m, block, S, gain); break;
    case E4M3: expand_scales<E4M3>(m, block, S, gain * m.unit * 0x1p120f); break;
    case E8M0: expand_scales<E8M0>(m, block, S, gain * m.unit); break;
    case SUB_U8: expand_scales<SUB_U8>(m, block, S, gain); break;
    default: expand_scales<SUB_I8>(m, block, S, gain);
  }
  if (!minus) return;
  switch (m.minima) {
    case CONSTANT: return expand_minima<CONSTANT>(m, block, S, Z, bias, exact);
    case ZERO_POINT: return expand_minima<ZERO_POINT>(m, block, S, Z, bias, exact);
    case MIN_F16: return expand_minima<MIN_F16>(m, block, S, Z, bias, exact);
    case MIN_F32: return expand_minima<MIN_F32>(m, block, S, Z, bias, exact);
    case MIN_BF16: return expand_minima<MIN_BF16>(m, block, S, Z, bias, exact);
    default: expand_minima<MIN_SUB_U8>(m, block, S, Z, bias, exact);
  }
}

}  // namespace
