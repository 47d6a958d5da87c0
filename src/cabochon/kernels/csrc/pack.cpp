// From rows as checkpoints store them to blocks of 32 rows. Plain code: it runs once.
#include <algorithm>
#include <cstring>
#include <sys/mman.h>

#include "api.h"
#include "pool.h"

constexpr int AHEAD = 256;  // bytes of a row that are fetched before they are needed

typedef uint64_t Eight;  // codes, one a byte; the first is lowest

static Eight eight(const uint8_t* p) {
  Eight x;
  memcpy(&x, p, 8);
  return x;
}

static Eight each(int byte) { return byte * 0x0101010101010101; }

// Entries at even places, close together; those at odd places are the even ones of `x >> 8`.
static uint32_t even(Eight x) {
  x &= 0x00ff00ff00ff00ff;
  x = (x | x >> 8) & 0x0000ffff0000ffff;
  return (uint32_t)(x | x >> 16);
}

// A plane's bits of the unit `v` of a block, added to its codes: `p` is the plane, RUN its run.
template <int RUN, int BITS>
static void run_bits(const uint8_t* p, const Plane& plane, int v, Eight* code) {
  constexpr int LENGTH = RUN < UNIT ? RUN : UNIT;  // entries that lie in a row, equally high
  constexpr int PARTS = 8 / BITS;
  const Eight mask = each((1 << BITS) - 1);
  for (int e = 0; e < UNIT; e += LENGTH) {
    const unsigned entry = v * UNIT + e, down = entry / RUN % PARTS * BITS;
    const uint8_t* from = p + entry / (RUN * PARTS) * RUN + entry % RUN;
    for (int i = 0; i < LENGTH; i += 8)
      code[(e + i) / 8] |= (eight(from + i) >> down & mask) << plane.to;
  }
}

template <int BITS>
static void stream_bits(const uint8_t* p, const Plane& plane, int v, Eight* code) {
  for (int d = 0; d < 4; d++) {
    Eight x = 0, spread = 0;
    memcpy(&x, p + v * 4 * BITS + d * BITS, BITS);
    if (BITS == 4) {
      x = (x | x << 16) & 0x0000ffff0000ffff;
      x = (x | x << 8) & 0x00ff00ff00ff00ff;
      spread = (x | x << 4) & 0x0f0f0f0f0f0f0f0f;
    } else {
      for (int i = 0; i < 8; i++) spread |= (x >> i * BITS & ((1 << BITS) - 1)) << 8 * i;
    }
    code[d] |= spread << plane.to;
  }
}

static void high_first(const uint8_t* p, const Plane& plane, int v, Eight* code) {
  Eight low[4] = {};
  stream_bits<4>(p, plane, v, low);
  for (int d = 0; d < 4; d++)
    code[d] = (low[d] << 8 & 0x0f000f000f000f00) | (low[d] >> 8 & 0x000f000f000f000f);
}

typedef void (*Unpack)(const uint8_t*, const Plane&, int, Eight*);

template <int RUN> static Unpack in_runs(int bits) {
  return bits == 1 ? run_bits<RUN, 1> : bits == 2 ? run_bits<RUN, 2> : run_bits<RUN, 4>;
}

static Unpack unpacking(const Layout& layout, const Plane& plane) {
  if (layout.high_first) return high_first;
  switch (plane.run) {
    case 8: return in_runs<8>(plane.bits);
    case 16: return in_runs<16>(plane.bits);
    case 32: return in_runs<32>(plane.bits);
    case 64: return in_runs<64>(plane.bits);
  }
  static const Unpack streams[] = {stream_bits<1>, stream_bits<2>, stream_bits<3>, stream_bits<4>,
                                   stream_bits<5>, stream_bits<6>, stream_bits<7>, stream_bits<8>};
  return streams[plane.bits - 1];
}

// The codes of a row's unit to the row's quads; `to` is the unit, `r` the row.
template <int CODES> static void pack_unit(const Eight* code, int r, uint8_t* to) {
  constexpr int above = CODES == U3 ? 256 : 512;  // where the plane of high bits begins
  uint32_t low[2] = {}, high[2] = {};
  to += r * 4;
  for (int d = 0; d < 4; d++) {
    const uint32_t a = even(code[d]), b = even(code[d] >> 8);
    const int T = 2 * d, pair = T % 4 * 2;  // of `a`; the next is `b`'s
    if (CODES == U8) memcpy(to + T * 128, &a, 4), memcpy(to + (T + 1) * 128, &b, 4);
    if (CODES == U4 || CODES == U5 || CODES == U6) {
      const uint32_t both = (a & 0x0f0f0f0f) | (b & 0x0f0f0f0f) << 4;
      memcpy(to + d * 128, &both, 4);
    }
    if (CODES == U2 || CODES == U3)
      low[T / 4] |= (a & 0x03030303) << pair | (b & 0x03030303) << (pair + 2);
    if (CODES == U6)
      high[T / 4] |= (a >> 4 & 0x03030303) << pair | (b >> 4 & 0x03030303) << (pair + 2);
    if (CODES == U5) high[0] |= (a >> 4 & 0x01010101) << T | (b >> 4 & 0x01010101) << (T + 1);
    if (CODES == U3) high[0] |= (a >> 2 & 0x01010101) << T | (b >> 2 & 0x01010101) << (T + 1);
  }
  if (CODES == U2 || CODES == U3) memcpy(to, low, 4), memcpy(to + 128, low + 1, 4);
  if (CODES == U6) memcpy(to + above, high, 4), memcpy(to + above + 128, high + 1, 4);
  if (CODES == U5 || CODES == U3) memcpy(to + above, high, 4);
}

// What is packed: rows of `bytes` each, `ld` apart.
struct Stored {
  const Layout& layout;
  const uint8_t* rows;
  int64_t ld, bytes;
};

template <int CODES> static void pack_rows(const Stored& s, int rows, const Matrix& m, uint8_t* to) {
  static const int sizes[] = {512, 1024, 512, 512, 256, 384, 640, 768};
  const Layout& l = s.layout;
  const int units = l.entries / UNIT;  // of a block
  Unpack unpack[2];
  for (int i = 0; i < l.planes; i++) unpack[i] = unpacking(l, l.plane[i]);
  uint8_t cut[256];  // the last block of a row, filled up with zeros
  for (int u = 0; u < m.units; u++, to += sizes[CODES]) {
    const int64_t at = (int64_t)(u / units) * l.bytes;
    const int unit = u % units, left = m.columns - u * UNIT;
    for (int r = 0; r < ROWS; r++) {
      Eight code[4] = {};
      if (r < rows) {
        const uint8_t* block = s.rows + r * s.ld + at;
        __builtin_prefetch(block + AHEAD);
        if (at + l.bytes > s.bytes) {
          memset(cut, 0, sizeof cut);
          memcpy(cut, block, s.bytes - at);
          block = cut;
        }
        for (int i = 0; i < l.planes; i++)
          unpack[i](block + l.plane[i].at, l.plane[i], unit, code);
        if (l.flip)
          for (Eight& x : code) x ^= each(l.flip);
        // What lies beyond the last column is nothing, whatever is stored there.
        if (left < UNIT) memset((uint8_t*)code + left, 0, UNIT - left);
      }
      pack_unit<CODES>(code, r, to);
    }
  }
}

static void pack_block(const Stored& s, int rows, const Matrix& m, uint8_t* to) {
  switch (m.codes) {
    case U8: return pack_rows<U8>(s, rows, m, to);
    case U2: return pack_rows<U2>(s, rows, m, to);
    case U3: return pack_rows<U3>(s, rows, m, to);
    case U5: return pack_rows<U5>(s, rows, m, to);
    case U6: return pack_rows<U6>(s, rows, m, to);
    default: return pack_rows<U4>(s, rows, m, to);
  }
}

// `rows` of ROWS numbers from `from`, whose rows and groups are so many bytes apart.
template <class T>
static void pack_numbers(const uint8_t* from, int64_t row, int64_t group, int per_row, int rows,
                         T* to) {
  for (int r = 0; r < ROWS; r++)
    for (int g = 0; g < per_row; g++) {
      to[g * ROWS + r] = 0;
      if (r < rows) memcpy(to + g * ROWS + r, from + r * row + g * group, sizeof(T));
    }
}

extern "C" {
// The codes of all rows: each has `bytes`, `ld` apart.
void cabochon_pack_codes(const Matrix* m, const Layout* layout, const uint8_t* octets, int64_t ld,
                         int64_t bytes, int threads) {
  in_parallel((m->rows + ROWS - 1) / ROWS, threads, [&](int64_t b) {
    const Stored stored{*layout, octets + b * ROWS * ld, ld, bytes};
    uint8_t* to = (uint8_t*)m->data + b * m->stride + m->codes_at;
    pack_block(stored, std::min<int>(ROWS, m->rows - b * ROWS), *m, to);
  });
}

// Numbers of `size` bytes, `per_row` a row, to `[per_row, 32]` at `at` of each block.
void cabochon_pack_scales(const Matrix* m, int64_t at, const uint8_t* from, int64_t row,
                          int64_t group, int per_row, int size, int threads) {
  in_parallel((m->rows + ROWS - 1) / ROWS, threads, [&](int64_t b) {
    uint8_t* to = (uint8_t*)m->data + b * m->stride + at;
    const uint8_t* rows = from + b * ROWS * row;
    const int count = std::min<int>(ROWS, m->rows - b * ROWS);
    if (size == 1) pack_numbers(rows, row, group, per_row, count, to);
    else if (size == 2) pack_numbers(rows, row, group, per_row, count, (uint16_t*)to);
    else pack_numbers(rows, row, group, per_row, count, (uint32_t*)to);
  });
}

// Ask for large pages; worth 6 % in decoding.
void cabochon_advise(void* data, int64_t size) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 4096, first = ((uintptr_t)data + page - 1) / page * page;
  madvise((void*)first, (uintptr_t)data + size - first, MADV_HUGEPAGE);
#endif
}
}
