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

// One code a byte, `ld` of them a row.
static void pack_bytes(const uint8_t* from, int64_t ld, int rows, const Matrix& m, uint8_t* to) {
  static const int sizes[] = {512, 1024, 512, 512, 256, 384, 640, 768};
  const int size = sizes[m.codes];
  memset(to, 0, (size_t)size * m.units);
  for (int u = 0; u < m.units; u++, to += size)
    for (int r = 0; r < rows; r++)
      for (int k = 0; k < UNIT && u * UNIT + k < m.columns; k++) {
        const uint8_t code = from[r * ld + u * UNIT + k];
        const int d = k / 8, j = k % 8 / 2, T = 2 * d + k % 2, lane = r * 4 + j;
        uint8_t* four = to + d * 128 + lane;
        switch (m.codes) {
          case U8: to[T * 128 + lane] = code; break;
          case U4: case TABLE: case TABLE2: *four |= code << 4 * (T % 2); break;
          case U2: to[T / 4 * 128 + lane] |= code << 2 * (T % 4); break;
          case U3:
            to[T / 4 * 128 + lane] |= (code & 3) << 2 * (T % 4);
            to[256 + lane] |= (code >> 2) << T;
            break;
          case U5:
            *four |= (code & 15) << 4 * (T % 2);
            to[512 + lane] |= (code >> 4) << T;
            break;
          case U6:
            *four |= (code & 15) << 4 * (T % 2);
            to[512 + T / 4 * 128 + lane] |= (code >> 4) << 2 * (T % 4);
            break;
        }
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
    else pack_bytes(from, ld, rows, *m, to);
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
