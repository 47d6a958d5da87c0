// From rows as checkpoints store them to blocks of 32 rows. Plain code: it runs once.
#include <algorithm>
#include <cstring>
#include <omp.h>
#include <sys/mman.h>

#include "api.h"

// Codes of two a byte, the even column in the low half: whole quads move. `ld` bytes a row.
static void pack_nibbles(const uint8_t* from, int64_t ld, int rows, int units, uint8_t* to) {
  for (int u = 0; u < units; u++)
    for (int d = 0; d < 4; d++)
      for (int r = 0; r < ROWS; r++, to += 4) {
        const int64_t at = u * 16 + d * 4;
        if (r < rows && at + 4 <= ld) memcpy(to, from + r * ld + at, 4);
        else {
          memset(to, 0, 4);
          if (r < rows && at < ld) memcpy(to, from + r * ld + at, ld - at);
        }
      }
}

// The codes of a row's unit, one a byte, to the row's quads; `to` is the unit, `r` the row.
template <int CODES> static void pack_unit(const uint8_t* code, int r, uint8_t* to) {
  constexpr bool nibbles = CODES != U8 && CODES != U2 && CODES != U3;
  constexpr int above = CODES == U3 ? 256 : 512;  // where the plane of high bits begins
  uint8_t high[8] = {}, low[8] = {};
  for (int d = 0; d < 4; d++)
    for (int j = 0; j < 4; j++) {
      const uint8_t a = code[8 * d + 2 * j], b = code[8 * d + 2 * j + 1];
      const int T = 2 * d;  // of `a`; the next is `b`'s
      if (CODES == U8) to[T * 128 + r * 4 + j] = a, to[(T + 1) * 128 + r * 4 + j] = b;
      if (nibbles) to[d * 128 + r * 4 + j] = (a & 15) | b << 4;
      if (CODES == U2 || CODES == U3)
        low[T / 4 * 4 + j] |= (a & 3) << 2 * (T % 4) | (b & 3) << 2 * (T % 4 + 1);
      if (CODES == U6)
        high[T / 4 * 4 + j] |= (a >> 4) << 2 * (T % 4) | (b >> 4) << 2 * (T % 4 + 1);
      if (CODES == U5) high[j] |= (a >> 4) << T | (b >> 4) << (T + 1);
      if (CODES == U3) high[j] |= (a >> 2) << T | (b >> 2) << (T + 1);
    }
  for (int i = 0; i < 2; i++) {
    if (CODES == U2 || CODES == U3) memcpy(to + i * 128 + r * 4, low + 4 * i, 4);
    if (CODES == U6) memcpy(to + above + i * 128 + r * 4, high + 4 * i, 4);
  }
  if (CODES == U5 || CODES == U3) memcpy(to + above + r * 4, high, 4);
}

// One code a byte, `ld` of them a row.
template <int CODES>
static void pack_bytes(const uint8_t* from, int64_t ld, int rows, const Matrix& m, uint8_t* to) {
  static const int sizes[] = {512, 1024, 512, 512, 256, 384, 640, 768};
  for (int u = 0; u < m.units; u++, to += sizes[CODES])
    for (int r = 0; r < ROWS; r++) {
      uint8_t code[UNIT] = {};
      const int width = r < rows ? std::min(UNIT, m.columns - u * UNIT) : 0;
      if (width > 0) memcpy(code, from + r * ld + u * UNIT, width);
      pack_unit<CODES>(code, r, to);
    }
}

static void pack_some(const uint8_t* from, int64_t ld, int rows, const Matrix& m, uint8_t* to) {
  switch (m.codes) {
    case U8: return pack_bytes<U8>(from, ld, rows, m, to);
    case U2: return pack_bytes<U2>(from, ld, rows, m, to);
    case U3: return pack_bytes<U3>(from, ld, rows, m, to);
    case U5: return pack_bytes<U5>(from, ld, rows, m, to);
    case U6: return pack_bytes<U6>(from, ld, rows, m, to);
    default: return pack_bytes<U4>(from, ld, rows, m, to);
  }
}

extern "C" {
// Rows `start` to `stop` of `m`, of which `codes` is the first; `nibbles`: two codes a byte.
void cabochon_pack_codes(const Matrix* m, const uint8_t* codes, int64_t ld, int nibbles, int start,
                         int stop, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int b = start / ROWS; b < (stop + ROWS - 1) / ROWS; b++) {
    uint8_t* to = (uint8_t*)m->data + b * m->stride + m->codes_at;
    const uint8_t* from = codes + (int64_t)(b * ROWS - start) * ld;
    const int rows = std::min(ROWS, stop - b * ROWS);
    if (nibbles) pack_nibbles(from, ld, rows, m->units, to);
    else pack_some(from, ld, rows, *m, to);
  }
}

// `from [rows, per_row]`, entries of `size` bytes, to `[per_row, 32]` at `at` of each block.
void cabochon_pack_scales(const Matrix* m, int64_t at, const uint8_t* from, int per_row, int size,
                          int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int b = 0; b < (m->rows + ROWS - 1) / ROWS; b++)
    for (int g = 0; g < per_row; g++)
      for (int r = 0; r < ROWS; r++) {
        uint8_t* to = (uint8_t*)m->data + b * m->stride + at + ((int64_t)g * ROWS + r) * size;
        if (b * ROWS + r < m->rows)
          memcpy(to, from + ((int64_t)(b * ROWS + r) * per_row + g) * size, size);
        else
          memset(to, 0, size);
      }
}

// Ask for large pages; worth 6 % in decoding.
void cabochon_advise(void* data, int64_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, first = ((uintptr_t)data + page - 1) / page * page;
  madvise((void*)first, (uintptr_t)data + size - first, MADV_HUGEPAGE);
#endif
}
}
