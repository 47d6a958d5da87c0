// From rows as checkpoints store them to blocks of 32 rows. Plain code: it runs once.
#include <algorithm>
#include <cstring>

#include "backlog.h"
#include "pack.h"

constexpr int AHEAD = 256;  // bytes of a row that are fetched before they are needed

typedef uint64_t Eight;  // codes, one a byte; the first is lowest

// Which of the rows that are stored is row `r`.
static int64_t place(const Stored& s, int r) { return s.which ? s.which[r] : r; }

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

typedef void (*Unpack)(const uint8_t*, const Plane&, int, Eight*);

template <int RUN> static Unpack in_runs(int bits) {
  return bits == 1 ? run_bits<RUN, 1> : bits == 2 ? run_bits<RUN, 2> : run_bits<RUN, 4>;
}

static Unpack unpacking(const Plane& plane) {
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

// Two codes of BITS that follow each other into one, the first low; each such pair is a byte.
template <int BITS> static uint32_t pairs(Eight x) { return even(x | x >> (8 - BITS)); }

// Sixteen codes of six bits, four quads, in the bytes of three; see `six_bits` of codes.h.
static void pack_sixes(Eight first, Eight second, uint8_t* to) {
  const uint32_t quads[] = {even(first), even(first >> 8), even(second)}, last = even(second >> 8);
  for (int i = 0; i < 3; i++) {
    const uint32_t both = quads[i] | (last >> 2 * i & 0x03030303) << 6;
    memcpy(to + i * 128, &both, 4);
  }
}

// All eight quads of three bits in the bytes of three; see `three_bits`.
static void pack_threes(const Eight* code, uint8_t* to) {
  uint32_t quad[8];
  for (int t = 0; t < 8; t++) quad[t] = even(code[t / 2] >> t % 2 * 8);
  for (int i = 0; i < 3; i++) {
    const uint32_t above = i < 2 ? quad[6 + i] & 0x03030303
                                 : (quad[6] >> 2 & 0x01010101) | (quad[7] >> 1 & 0x02020202);
    const uint32_t all = quad[2 * i] | quad[2 * i + 1] << 3 | above << 6;
    memcpy(to + i * 128, &all, 4);
  }
}

// The codes of a row's unit to the row's quads; `to` is the unit, `r` the row.
template <int CODES> static void pack_unit(const Eight* code, int r, uint8_t* to) {
  uint32_t low[2] = {}, high = 0;
  to += r * 4;
  if (CODES == U3) return pack_threes(code, to);
  for (int d = 0; d < 4; d++) {
    const Eight x = code[d];
    if (CODES == U8) {
      const uint32_t a = even(x), b = even(x >> 8);
      memcpy(to + 2 * d * 128, &a, 4), memcpy(to + (2 * d + 1) * 128, &b, 4);
    }
    if (CODES == U4 || CODES == U5) {
      const uint32_t both = pairs<4>(x & each(15));
      memcpy(to + d * 128, &both, 4);
    }
    if (CODES == U6 && d % 2) pack_sixes(code[d - 1], x, to + d / 2 * 384);
    if (CODES == U2) low[d / 2] |= pairs<2>(x & each(3)) << d % 2 * 4;
    if (CODES == U5) high |= pairs<1>(x >> 4 & each(1)) << 2 * d;
  }
  if (CODES == U2) memcpy(to, low, 4), memcpy(to + 128, low + 1, 4);
  if (CODES == U5) memcpy(to + 512, &high, 4);
}

// What is read over and over is copied: stores of bytes might change anything else.
template <int CODES, class Codes>
static void pack_rows(const Stored s, const Codes codes, int rows, const Matrix& m, uint8_t* to) {
  static const int sizes[] = {512, 1024, 512, 512, 256, 384, 640, 768};
  const int units = s.layout.entries / UNIT, bytes = s.layout.bytes;  // of a block
  const int in_all = m.units, columns = m.columns;
  const Eight flip = each(s.layout.flip);
  uint8_t cut[256];  // the last block of a row, filled up with zeros
  for (int u = 0; u < in_all; u++, to += sizes[CODES]) {
    const int64_t at = (int64_t)(u / units) * bytes;
    const int unit = u % units, left = columns - u * UNIT;
    const bool whole = at + bytes <= s.bytes;
    for (int r = 0; r < ROWS; r++) {
      Eight code[4] = {};
      if (r < rows) {
        const uint8_t* block = s.rows + place(s, r) * s.ld + at;
        __builtin_prefetch(block + AHEAD);
        if (!whole) {
          memset(cut, 0, sizeof cut);
          memcpy(cut, block, s.bytes - at);
          block = cut;
        }
        codes(block, unit, code);
        if (flip)
          for (Eight& x : code) x ^= flip;
        // What lies beyond the last column is nothing, whatever is stored there.
        if (left < UNIT) memset((uint8_t*)code + left, 0, UNIT - left);
      }
      pack_unit<CODES>(code, r, to);
    }
  }
}

// Codes of four bits, of which `pairs` makes bytes of two, as they are packed, without more steps.
template <class Pairs>
static void pack_pairs(const Stored s, const Pairs pairs, int rows, const Matrix& m, uint8_t* to) {
  const int units = s.layout.entries / UNIT, bytes = s.layout.bytes;  // of a block
  const int in_all = m.units, columns = m.columns;
  const uint32_t flip = s.layout.flip * 0x11111111u;
  uint8_t cut[256] = {};
  for (int u = 0; u < in_all; u++, to += 512) {
    const int64_t at = (int64_t)(u / units) * bytes;
    const int unit = u % units, left = columns - u * UNIT;
    const bool whole = at + bytes <= s.bytes;
    for (int r = 0; r < ROWS; r++) {
      uint32_t both[4] = {};
      if (r < rows) {
        const uint8_t* block = s.rows + place(s, r) * s.ld + at;
        __builtin_prefetch(block + AHEAD);
        if (!whole) block = (const uint8_t*)memcpy(cut, block, s.bytes - at);
        pairs(block, unit, both);
        for (uint32_t& x : both) x ^= flip;
        for (int i = left; i < UNIT; i++) both[i / 8] &= ~(15u << i % 8 * 4);
      }
      for (int d = 0; d < 4; d++) memcpy(to + d * 128 + r * 4, both + d, 4);
    }
  }
}

// Sixteen bytes from `p`; of each, the four bits from `down` on: two become a byte of `to`.
static void join(const uint8_t* p, int down, void* to) {
  typedef uint16_t Pairs __attribute__((vector_size(16)));
  typedef uint8_t Joined __attribute__((vector_size(8)));
  Pairs x;
  memcpy(&x, p, sizeof x);
  x >>= down;
  const Joined joined = __builtin_convertvector((x & 0x0f) | (x >> 4 & 0xf0), Joined);
  memcpy(to, &joined, sizeof joined);
}

static bool is(const Plane& plane, int bits, int run) {
  return plane.bits == bits && plane.run == run;
}

// The layouts of most of what there is are worth code of their own.
template <int CODES>
static void pack_by(const Stored& s, int rows, const Matrix& m, uint8_t* to) {
  const Layout& l = s.layout;
  const Plane one = l.plane[0], two = l.plane[1];
  const bool alone = l.planes == 1;
  const auto with = [&](auto codes) { pack_rows<CODES>(s, codes, rows, m, to); };
  const auto by = [&](auto pairs) { pack_pairs(s, pairs, rows, m, to); };
  if (CODES == U4 && alone && is(one, 4, 16))
    return by([at = one.at](const uint8_t* b, int v, uint32_t* both) {
      join(b + at + v * 16, 0, both);
      join(b + at + v * 16, 4, both + 2);
    });
  if (CODES == U4 && alone && is(one, 4, 32))
    return by([at = one.at](const uint8_t* b, int v, uint32_t* both) {
      join(b + at + v / 2 * 32, v % 2 * 4, both);
      join(b + at + v / 2 * 32 + 16, v % 2 * 4, both + 2);
    });
  if (CODES == U4 && alone && is(one, 4, 0) && l.bytes == 16)
    return by([swapped = l.high_first](const uint8_t* b, int, uint32_t* both) {
      constexpr uint32_t halves = 0x0f0f0f0f;
      memcpy(both, b, 16);
      for (int i = 0; i < 4 && swapped; i++)
        both[i] = (both[i] & halves) << 4 | (both[i] >> 4 & halves);
    });
  if (CODES == U8 && alone && is(one, 8, 0))
    return with([at = one.at](const uint8_t* b, int v, Eight* code) {
      memcpy(code, b + at + v * UNIT, UNIT);
    });
  if (CODES == U6 && l.planes == 2 && is(one, 4, 64) && is(two, 2, 32))
    return with([at = one.at, above = two.at](const uint8_t* b, int v, Eight* code) {
      run_bits<64, 4>(b + at, Plane{}, v, code);
      run_bits<32, 2>(b + above, Plane{0, 0, 0, 4}, v, code);
    });
  const Unpack first = unpacking(one), second = l.planes == 2 ? unpacking(two) : nullptr;
  with([=](const uint8_t* b, int v, Eight* code) {
    first(b + one.at, one, v, code);
    if (second) second(b + two.at, two, v, code);
  });
}

static void pack_block(const Stored& s, int rows, const Matrix& m, uint8_t* to) {
  switch (m.codes) {
    case U8: return pack_by<U8>(s, rows, m, to);
    case U2: return pack_by<U2>(s, rows, m, to);
    case U3: return pack_by<U3>(s, rows, m, to);
    case U5: return pack_by<U5>(s, rows, m, to);
    case U6: return pack_by<U6>(s, rows, m, to);
    default: return pack_by<U4>(s, rows, m, to);
  }
}

// Numbers of `rows` of ROWS rows.
template <class T>
static void pack_numbers(const Stored& s, const Grouped& of, int rows, T* to) {
  for (int r = 0; r < ROWS; r++)
    for (int g = 0; g < of.per_row; g++) {
      to[g * ROWS + r] = 0;
      if (r < rows) memcpy(to + g * ROWS + r, of.from + place(s, r) * of.row + g * of.group, sizeof(T));
    }
}

static void pack_grouped(const Stored& s, const Grouped& of, int rows, uint8_t* to) {
  if (of.size == 1) pack_numbers(s, of, rows, to);
  else if (of.size == 2) pack_numbers(s, of, rows, (uint16_t*)to);
  else pack_numbers(s, of, rows, (uint32_t*)to);
}

void pack(const Matrix& m, const Stored& stored, int64_t block) {
  const int rows = (int)std::min<int64_t>(ROWS, m.rows - block * ROWS);
  uint8_t* to = (uint8_t*)m.data + block * m.stride;
  for (const Grouped& g : stored.grouped)
    if (g.from) pack_grouped(stored, g, rows, to + g.at);
  pack_block(stored, rows, m, to + m.codes_at);
}

Stored from_block(Stored s, int64_t block) {
  if (s.which) {
    s.which += block * ROWS;
    return s;
  }
  s.rows += block * ROWS * s.ld;
  for (Grouped& g : s.grouped)
    if (g.from) g.from += block * ROWS * g.row;
  return s;
}

extern "C" {
int64_t cabochon_pack(Backlog* backlog, const Matrix* matrix, const Stored* stored) {
  return backlog->add((matrix->rows + ROWS - 1) / ROWS, [m = *matrix, s = *stored](int64_t block) {
    pack(m, from_block(s, block), block);
  });
}
}
