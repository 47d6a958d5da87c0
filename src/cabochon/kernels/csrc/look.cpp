// One pass over stored bytes: sums for their hash, and how the numbers among them look. What is
// counted is defined by nn/look.py, which counts the same without this.
//
// Plain code: it runs at the speed of memory. Bytes are read into room that stays in a near cache,
// not mapped: pages that are looked at once cost more to map than to copy, would count as memory of
// the process, and end it where a file is cut meanwhile.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <unistd.h>

#include "api.h"
#include "backlog.h"

namespace {

constexpr int64_t HASHED = 1 << 16;    // bytes that one sum is of
constexpr int64_t TAKEN = 4 * HASHED;  // that a thread takes together
constexpr int64_t LARGEST = 512;       // bytes of a block, at most
constexpr int64_t AHEAD = 64 << 20;    // bytes that the system is asked to read before their time
constexpr uint64_t FACTOR = 0x9E3779B97F4A7C15;
constexpr int LANES = 16;              // words, of which each has a sum of its own

// The sum over 64-bit words of word times (2 * place + 1) times FACTOR. Multiplications are left to
// the end: of two running sums of a lane, the second counts a word once for each that is not before
// it, which gives the place.
uint64_t hashed(const uint8_t* p) {
  constexpr int STEPS = HASHED / 8 / LANES;
  uint64_t once[LANES] = {}, often[LANES] = {};
  for (int k = 0; k < STEPS; k++) {
    uint64_t word[LANES];
    memcpy(word, p + k * sizeof word, sizeof word);
    for (int l = 0; l < LANES; l++) {
      once[l] += word[l];
      often[l] += once[l];
    }
  }
  uint64_t sum = 0;
  for (int l = 0; l < LANES; l++)
    sum += 2 * LANES * (STEPS * once[l] - often[l]) + (2 * l + 1) * once[l];
  return sum * FACTOR;
}

template <class T> T read(const uint8_t* p) {
  T x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Floats of one size: without their signs, they are ordered as their bits are. `mask` leaves these.
// BATCH is how many are counted in as many bits as they have. Words are signed ones: the oldest
// vector instructions compare no others.
template <class T, int BATCH>
void look_at_floats(const uint8_t* p, int64_t size, T mask, Found* f) {
  T top = 0;
  for (int64_t at = 0; at < size; at += BATCH * sizeof(T)) {
    const int n = (int)std::min<int64_t>(BATCH, (size - at) / sizeof(T));
    T zeros = 0, most = 0;
    for (int i = 0; i < n; i++) {
      const T x = read<T>(p + at + i * sizeof(T)) & mask;
      most = std::max(most, x);
      zeros += x == 0;
    }
    top = std::max(top, most);
    f->zeros += (uint64_t)zeros;
  }
  f->count += size / sizeof(T);
  f->top = std::max(f->top, (uint32_t)top);
}

constexpr int INFINITE = 0x7c00;  // of a float16, as what is no number is above it

uint16_t magnitude(const uint8_t* p) { return read<uint16_t>(p) & 0x7fff; }

float of_half(uint16_t magnitude) {
  const uint32_t bits = (uint32_t)magnitude << 13;  // its exponent counts from 112 less
  float x;
  memcpy(&x, &bits, 4);
  return x * 0x1p112f;
}

// Numbers that a block's codes are multiplied with, besides its float16; how many.
int within(int form, const uint8_t* b, int8_t* to) {
  switch (form) {
    case BLOCK_Q2:
      for (int i = 0; i < 16; i++) to[i] = b[i] & 15;
      return 16;
    case BLOCK_Q3:
      for (int i = 0; i < 16; i++) {
        const int low = b[96 + i % 8] >> i / 8 * 4 & 15, high = b[104 + i % 4] >> i / 4 * 2 & 3;
        to[i] = (int8_t)((low | high << 4) - 32);
      }
      return 16;
    case BLOCK_Q4:
      for (int i = 0; i < 4; i++) {
        to[i] = b[4 + i] & 63;
        to[4 + i] = (b[12 + i] & 15) | b[4 + i] >> 6 << 4;
      }
      return 8;
    case BLOCK_Q6:
      memcpy(to, b + 192, 16);
      return 16;
    default:  // BLOCK_IQ4
      for (int i = 0; i < 8; i++) {
        const int low = b[4 + i / 2] >> i % 2 * 4 & 15, high = b[2 + i / 4] >> i % 4 * 2 & 3;
        to[i] = (int8_t)((low | high << 4) - 32);
      }
      return 8;
  }
}

void look_at_halves(const Numbers& s, const uint8_t* b, Found* f) {
  const uint16_t scale = magnitude(b + s.first);
  f->bad += scale >= INFINITE || (s.second >= 0 && magnitude(b + s.second) >= INFINITE);
  f->zeros += scale == 0;
  f->top = std::max<uint32_t>(f->top, scale);
  f->count++;
}

void look_at_shared(const Numbers& s, const uint8_t* b, Found* f) {
  const uint16_t scale = magnitude(b + s.first);
  f->bad += scale >= INFINITE || (s.second >= 0 && magnitude(b + s.second) >= INFINITE);
  int8_t of[16];
  const int n = within(s.form, b, of);
  int top = 0, zeros = 0;
  for (int i = 0; i < n; i++) {
    top = std::max(top, std::abs(of[i]));
    zeros += of[i] == 0;
  }
  f->zeros += scale ? zeros : n;
  f->count += n;
  f->largest = std::max(f->largest, top * of_half(scale));
}

// `first` octets a block, of which none may be above `second`.
void look_at_octets(const Numbers& s, const uint8_t* b, Found* f) {
  bool bad = false;
  for (int i = 0; i < s.first; i++) {
    bad |= b[i] > s.second;
    f->octets[b[i]]++;
  }
  f->bad += bad;
  f->count += s.first;
}

int64_t after(int64_t place, int64_t unit) { return (place + unit - 1) / unit * unit; }

template <class Look> void each_block(const Numbers& s, const uint8_t* from, const uint8_t* to,
                                      Found* f, const Look& look) {
  for (; from < to; from += s.bytes) look(s, from, f);
}

// `data` are the bytes from `start` on: what begins before `stop`; a block may end behind that.
void look(const Numbers& s, const uint8_t* data, int64_t start, int64_t stop, Found* f) {
  const int64_t size = stop - start;
  switch (s.form) {
    case NOTHING: return;
    case FLOATS_1: return look_at_floats<uint8_t, 128>(data, size, s.first, f);
    case FLOATS_2: return look_at_floats<int16_t, 8192>(data, size, s.first, f);
    case FLOATS_4: return look_at_floats<int32_t, 8192>(data, size, s.first, f);
  }
  const uint8_t* from = data + after(start, s.bytes) - start;
  const uint8_t* to = data + size;
  if (s.form == BLOCK_HALF) return each_block(s, from, to, f, look_at_halves);
  if (s.form == BLOCK_OCTETS) return each_block(s, from, to, f, look_at_octets);
  each_block(s, from, to, f, look_at_shared);
}

void add(const Found& part, Found* to) {
  to->bad += part.bad;
  to->count += part.count;
  to->zeros += part.zeros;
  to->top = std::max(to->top, part.top);
  to->largest = std::max(to->largest, part.largest);
  if (part.error) to->error = part.error;
  for (int i = 0; i < 256; i++) to->octets[i] += part.octets[i];
}

// Copies of the blocks that begin in `[start, stop)` and whose number is a multiple of `every`.
void sample(const Stretch& s, const uint8_t* data, int64_t start, int64_t stop) {
  const int64_t size = s.numbers.bytes, step = size * s.every;
  for (int64_t at = after(start, step); at < stop; at += step)
    memcpy(s.sample + at / s.every, data + at - start, size);
}

// Reads `[start, stop)` of a stretch; the number of the error if that cannot be, -1 if the file ends.
int fetch(const Stretch& s, int64_t start, int64_t stop, uint8_t* to) {
#if defined(POSIX_FADV_WILLNEED)
  posix_fadvise(s.file, s.at + start + AHEAD, stop - start, POSIX_FADV_WILLNEED);
#endif
  while (start < stop) {
    const ssize_t count = pread(s.file, to, stop - start, s.at + start);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count < 0 ? errno : -1;
    start += count, to += count;
  }
  return 0;
}

// Sums of whole 64 KiB are words, and what is left lies behind them.
void look_at_piece(const Stretch& s, int64_t piece, std::mutex* together) {
  static thread_local const std::unique_ptr<uint8_t[]> room(new uint8_t[TAKEN + LARGEST]);
  const int64_t begin = piece * TAKEN, end = std::min(s.size, begin + TAKEN);
  Found part = {};
  part.error = fetch(s, begin, std::min(s.size, end + LARGEST), room.get());
  for (int64_t at = begin; at < end && !part.error; at += HASHED) {
    const int64_t stop = std::min(end, at + HASHED);
    const uint8_t* data = room.get() + (at - begin);
    if (stop - at == HASHED) s.sums[at / HASHED] = hashed(data);
    else memcpy(s.sums + at / HASHED, data, stop - at);
    look(s.numbers, data, at, stop, &part);
  }
  if (s.every && !part.error) sample(s, room.get(), begin, end);
  std::lock_guard<std::mutex> lock(*together);
  add(part, s.found);
}

}  // namespace

extern "C" {
int64_t cabochon_look(Backlog* backlog, const Stretch* stretch) {
  const auto together = std::make_shared<std::mutex>();
  return backlog->add((int)((stretch->size + TAKEN - 1) / TAKEN), [s = *stretch, together](int i) {
    look_at_piece(s, i, together.get());
  });
}
}
