// An instruction set against the scalar twin of its kernels, on random packed matrices: for
// processors that the machine at hand is not, under an emulator. Prints what it compared.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "backlog.h"
#include "table.h"

extern "C" const Table* cabochon_scalar();
extern "C" const Table* CABOCHON_TWIN();

static std::mt19937 source(1);
static int below(int n) { return (int)(source() % n); }
static float normal() { return std::normal_distribution<float>()(source); }

static int failures = 0, compared = 0;

static void compare(const std::string& what, const std::vector<float>& one,
                    const std::vector<float>& other, double bound) {
  double most = 0, off = 0;
  for (float x : other) most = std::max(most, (double)std::fabs(x));
  for (size_t i = 0; i < one.size(); i++) {
    const double d = std::fabs((double)one[i] - other[i]);
    off = d <= off ? off : d;  // what is no number stays
    if (!(d < INFINITY)) off = INFINITY;
  }
  compared++;
  if (off <= bound * most && most > 0) return;
  failures++;
  printf("%s: off by %g of %g\n", what.c_str(), off, most);
}

struct Packed {
  Matrix m{};
  std::vector<uint8_t> room;
  std::vector<float> levels;
};

static const int UNIT_BYTES[] = {512, 1024, 512, 512, 256, 384, 640, 768};

static uint16_t half() { return 0x2400 + below(0x400); }  // 1/64 to 1/32

static void fill_halves(uint8_t* p, int n) {
  for (int i = 0; i < n; i++) ((uint16_t*)p)[i] = half();
}

// A matrix of random codes, with what belongs to `scales` and `minima` beside them.
static Packed random_matrix(int codes, int scales, int minima, bool by_halves, int digits, int rows,
                            int columns) {
  Packed made;
  Matrix& m = made.m;
  m.rows = rows, m.columns = columns, m.units = (columns + UNIT - 1) / UNIT;
  m.codes = codes, m.scales = scales, m.minima = minima, m.digits = digits;
  m.halves = by_halves ? 1 : 2, m.groups = by_halves ? 2 * m.units : m.units;
  m.per_shared = m.groups, m.gain = 1, m.unit = 1.0f / 64;
  m.zero = codes == TABLE2 ? 128 : codes == TABLE ? 12 : 8, m.round = below(3);
  const int scale_size = scales == F32 ? 4 : scales <= BF16 ? 2 : 1;
  const int minimum_size = minima == CONSTANT ? 0 : minima == MIN_F32 ? 4
                           : minima == ZERO_POINT || minima == MIN_SUB_U8 ? 1 : 2;
  const auto aligned = [](int64_t n) { return (n + 63) / 64 * 64; };
  m.shared_at = aligned((int64_t)m.groups * ROWS * scale_size);
  m.minima_at = m.shared_at + aligned(ROWS * 2);
  m.shared_minima_at = m.minima_at + aligned((int64_t)m.groups * ROWS * minimum_size);
  m.codes_at = m.shared_minima_at + aligned(ROWS * 2);
  m.stride = m.codes_at + (int64_t)m.units * UNIT_BYTES[codes];
  const int blocks = (rows + ROWS - 1) / ROWS;
  made.room.resize(blocks * m.stride + 64);
  for (uint8_t& byte : made.room) byte = (uint8_t)source();
  uint8_t* data = made.room.data() + (64 - (uintptr_t)made.room.data() % 64) % 64;
  for (int b = 0; b < blocks; b++) {
    uint8_t* p = data + b * m.stride;
    const int n = m.groups * ROWS;
    for (int i = 0; i < n; i++) {
      if (scales == F16) ((uint16_t*)p)[i] = half();
      else if (scales == BF16) ((uint16_t*)p)[i] = 0x3c80 + below(0x80);
      else if (scales == F32) ((float*)p)[i] = 0.01f + 0.001f * below(16);
      else if (scales == E8M0) p[i] = 120 + below(8);
      else p[i] &= 0x77;  // neither signs nor what is no number
    }
    fill_halves(p + m.shared_at, ROWS);
    fill_halves(p + m.shared_minima_at, ROWS);
    uint8_t* z = p + m.minima_at;
    for (int i = 0; i < n && minimum_size; i++) {
      if (minima == ZERO_POINT) z[i] &= 7;
      else if (minima == MIN_F16) ((uint16_t*)z)[i] = half();
      else if (minima == MIN_BF16) ((uint16_t*)z)[i] = 0x3c80 + below(0x80);
      else if (minima == MIN_F32) ((float*)z)[i] = 0.01f * below(16);
    }
  }
  for (int i = 0; i < 16; i++) {
    m.table[0][i] = codes == TABLE2 ? below(256) : below(25), m.table[1][i] = below(256);
    m.values[i] = normal();
  }
  m.data = data;
  for (int i = 0; i < 256; i++) made.levels.push_back(std::ldexp(1.0f + i % 8 / 8.0f, i / 8 % 16 - 12));
  m.levels = made.levels.data();
  return made;
}

static std::vector<float> inputs(int n) {
  std::vector<float> x(n);
  for (float& v : x) v = normal();
  return x;
}

static void matrices() {
  const Table *one = CABOCHON_TWIN(), *other = cabochon_scalar();
  for (int codes = 0; codes < 8; codes++)
    for (int scales = 0; scales < 8; scales++)
      for (int minima = 0; minima < 6; minima++)
        for (int form = 0; form < 6; form++) {
          const bool halves = form & 1, table = codes == TABLE || codes == TABLE2;
          const int digits = form / 2;
          if (table && minima != CONSTANT) continue;
          if (codes == U5 && halves) continue;
          if (codes == U6 && !halves) continue;
          const int rows = 33 + below(40), columns = 32 * (1 + below(4)) + (form > 2 ? below(31) : 0);
          const Packed p = random_matrix(codes, scales, minima, halves, digits, rows, columns);
          char name[128];
          snprintf(name, sizeof name, "codes %d, scales %d, minima %d, halves %d, digits %d", codes,
                   scales, minima, halves, digits);
          for (int n : {1, 3, 7}) {
            const std::vector<float> x = inputs(n * columns);
            std::vector<float> y(n * rows), z(n * rows);
            one->times(&p.m, x.data(), columns, n, 0, rows, y.data(), rows, 1);
            other->times(&p.m, x.data(), columns, n, 0, rows, z.data(), rows, 1);
            compare(name, y, z, 1e-4);
          }
          std::vector<float> y(rows * columns), z(rows * columns);
          one->dense(&p.m, nullptr, 0, rows, y.data(), 1);
          other->dense(&p.m, nullptr, 0, rows, z.data(), 1);
          compare(std::string(name) + ", dense", y, z, 0);
        }
}

static std::vector<uint8_t> floats(int type, int count) {
  const int size = type == ROW_E4M3 ? 1 : type == ROW_F32 ? 4 : 2;
  std::vector<uint8_t> data((size_t)count * size);
  for (int i = 0; i < count; i++) {
    if (type == ROW_BF16) ((uint16_t*)data.data())[i] = 0x3c80 + below(0x80) + below(2) * 0x8000;
    else if (type == ROW_F16) ((uint16_t*)data.data())[i] = half() + below(2) * 0x8000;
    else if (type == ROW_F32) ((float*)data.data())[i] = normal();
    else data[i] = below(127) + below(2) * 128;
  }
  return data;
}

static void stored_floats() {
  const Table *one = CABOCHON_TWIN(), *other = cabochon_scalar();
  for (int type = 0; type < 4; type++) {
    const int rows = 37, columns = 101;
    const std::vector<uint8_t> data = floats(type, rows * columns);
    const std::vector<float> scales = inputs(10 * 4);
    for (int n : {1, 2, 5}) {
      const std::vector<float> x = inputs(n * columns);
      std::vector<float> y(n * rows), z(n * rows);
      const Rows m{data.data(), scales.data(), rows, columns, type, 4, 32};
      one->times_rows(&m, nullptr, x.data(), columns, n, 0, rows, y.data(), rows, 1);
      other->times_rows(&m, nullptr, x.data(), columns, n, 0, rows, z.data(), rows, 1);
      compare("stored floats " + std::to_string(type), y, z, 1e-4);
      const std::vector<int64_t> ids{36, 0, 5, 5, 17};
      one->times_rows(&m, ids.data(), x.data(), columns, n, 0, 5, y.data(), rows, 1);
      other->times_rows(&m, ids.data(), x.data(), columns, n, 0, 5, z.data(), rows, 1);
      compare("some stored floats " + std::to_string(type), y, z, 1e-4);
    }
  }
}

// How many are found, which, and their products.
static std::vector<float> found(const Table* by, Search s, std::vector<float> products, int count) {
  const int n = (int)products.size();
  std::vector<int64_t> ids(n);
  std::vector<float> made(2 * n + 1);
  const int64_t never[] = {5, n - 1};
  s.products = products.data(), s.n = n, s.count = count, s.room = n, s.threads = 1, s.cap = 30;
  s.never = never, s.nevers = 2;
  s.ids = ids.data(), s.found = made.data() + n + 1;
  made[0] = (float)by->search(&s);
  for (int i = 0; i < made[0]; i++) made[1 + i] = (float)ids[i];
  return made;
}

// Room for codes of four bits with a bfloat16 for every 64 columns, as a sketch has them.
static Packed four_bits(int rows, int columns, int digits) {
  Packed made;
  Matrix& m = made.m;
  m.rows = rows, m.columns = columns, m.units = columns / UNIT, m.digits = digits;
  m.codes = U4, m.scales = BF16, m.minima = CONSTANT, m.zero = 8, m.gain = m.unit = 1;
  m.halves = 4, m.groups = columns / 64, m.per_shared = 1;
  m.codes_at = (m.groups * ROWS * 2 + 63) / 64 * 64;
  m.stride = m.codes_at + m.units * UNIT_BYTES[U4];
  made.room.resize((rows + ROWS - 1) / ROWS * m.stride + 64);
  m.data = made.room.data() + (64 - (uintptr_t)made.room.data() % 64) % 64;
  return made;
}

// Entries of a sketch that `by` makes of `whole`, its margins, and products that are near the true ones.
static void sketch(const Table* by, const Linear& whole, const Stored* stored, int rows, int columns,
                   int digits, const std::vector<float>& x, std::vector<float> (&made)[5]) {
  std::vector<float> dither(columns);
  for (int k = 0; k < columns; k++) dither[k] = std::fmod(k * 0.618f, 1.0f);
  Packed room = four_bits(rows, columns, digits);
  made[0].resize(rows * columns), made[1].resize(2 * rows), made[2].resize(2 * rows);
  const Sketch s{room.m, dither.data(), made[1].data(), whole, stored};
  Backlog backlog(0);
  backlog.wait(by->sketch(&backlog, &s), 1 << 30);
  cabochon_scalar()->dense(&room.m, nullptr, 0, rows, made[0].data(), 1);
  by->near(&s, x.data(), columns, 2, made[2].data(), rows, 1);
  std::vector<float> products(made[2].begin(), made[2].begin() + rows);
  Search asked{};
  asked.sketch = &s, asked.x = x.data(), asked.widest[0] = asked.widest[1] = INFINITY;
  made[3] = found(by, asked, products, 3);
  if (!stored) return;
  const std::vector<int64_t> ids{rows - 1, 0, 5, 5, 17};
  made[4].resize(ids.size() * columns);
  by->picked(whole.packed, stored, ids.data(), (int)ids.size(), made[4].data(), 1);
}

static void compare_sketches(const std::string& of, const Linear& whole, const Stored* stored,
                             int rows, int columns, int digits) {
  const std::vector<float> x = inputs(2 * columns);
  std::vector<float> ours[5], others[5];
  sketch(CABOCHON_TWIN(), whole, stored, rows, columns, digits, x, ours);
  sketch(cabochon_scalar(), whole, stored, rows, columns, digits, x, others);
  compare("a sketch of " + of, ours[0], others[0], 0);
  compare("margins of " + of, ours[1], others[1], 1e-5);
  compare("near " + of, ours[2], others[2], 1e-4);
  compare("a search in " + of, ours[3], others[3], 1e-5);
  if (stored) compare("rows of " + of, ours[4], others[4], 0);
}

static void sketches() {
  const int rows = 300, columns = 192;
  for (int type = 0; type < 3; type++) {
    const std::vector<uint8_t> data = floats(type, rows * columns);
    const Rows m{data.data(), nullptr, rows, columns, type, 1, columns};
    compare_sketches("floats " + std::to_string(type), {nullptr, &m}, nullptr, rows, columns, 2);
  }
  Packed eight = random_matrix(U8, F16, CONSTANT, false, 1, rows, columns);
  eight.m.zero = 128;
  std::vector<uint8_t> codes(rows * columns), scales(rows * columns / UNIT * 2);
  for (uint8_t& code : codes) code = below(256);
  fill_halves(scales.data(), rows * columns / UNIT);
  Stored stored{codes.data(), columns, columns, {UNIT, UNIT, 0, 0, 1, {{0, 8, 0, 0}}}, {}, nullptr};
  stored.grouped[0] = {scales.data(), 0, columns / UNIT * 2, 2, columns / UNIT, 2};
  compare_sketches("codes", {&eight.m, nullptr}, &stored, rows, columns, 1);
}

static void searches() {
  const Table *one = CABOCHON_TWIN(), *other = cabochon_scalar();
  for (int count : {1, 8, 64, 3000})
    for (bool some : {false, true}) {
      std::vector<float> products(5003);
      std::vector<uint8_t> allowed(products.size());
      for (float& p : products) p = normal() * 9;
      for (uint8_t& a : allowed) a = below(3) == 0;
      Search asked{};
      asked.allowed = some ? allowed.data() : nullptr;
      compare("a search", found(one, asked, products, count), found(other, asked, products, count), 0);
    }
}

int main() {
  searches();
  matrices();
  stored_floats();
  sketches();
  printf("%d compared, %d failed\n", compared, failures);
  return failures != 0;
}
