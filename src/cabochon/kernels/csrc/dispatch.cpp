// Chooses the instruction set, and is what Python calls.
#include <cstring>

#include "table.h"

extern "C" {
const Table* cabochon_scalar();
#if defined(__x86_64__)
const Table* cabochon_avx2();
const Table* cabochon_avxvnni();
const Table* cabochon_avx512vnni();
#elif defined(__aarch64__)
const Table* cabochon_neon();
#endif
}

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
static bool has_dotprod() { return getauxval(AT_HWCAP) & (1 << 20); }
#endif

#if defined(__x86_64__)
#include <cpuid.h>
static bool has_avxvnni() {  // gcc 12 knows no name for it
  unsigned a = 0, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}
#endif

static const Table* table;

extern "C" {
// Whether `name` exists on this machine; if so it is what runs from now on.
int cabochon_choose(const char* name) {
  const Table* found = nullptr;
  if (!strcmp(name, "scalar")) found = cabochon_scalar();
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (!strcmp(name, "avx2") && avx2) found = cabochon_avx2();
  if (!strcmp(name, "avxvnni") && avx2 && has_avxvnni()) found = cabochon_avxvnni();
  if (!strcmp(name, "avx512vnni") && avx2 && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found = cabochon_avx512vnni();
#elif defined(__aarch64__)
#if defined(__linux__)
  if (!strcmp(name, "neon") && has_dotprod()) found = cabochon_neon();
#else
  if (!strcmp(name, "neon")) found = cabochon_neon();
#endif
#endif
  if (found) table = found;
  return found != nullptr;
}

void cabochon_times(const Matrix* m, const float* x, int64_t ldx, int n, int start, int stop,
                    float* y, int64_t ldy, int threads) {
  table->times(m, x, ldx, n, start, stop, y, ldy, threads);
}

void cabochon_times_rows(const Rows* m, const int64_t* ids, const float* x, int64_t ldx, int n,
                         int start, int stop, float* y, int64_t ldy, int threads) {
  table->times_rows(m, ids, x, ldx, n, start, stop, y, ldy, threads);
}

int64_t cabochon_sketch(Backlog* backlog, const Sketch* of) { return table->sketch(backlog, of); }

void cabochon_near(const Sketch* of, const float* x, int64_t ldx, int n, float* y, int64_t ldy,
                   int threads) {
  table->near(of, x, ldx, n, y, ldy, threads);
}

int64_t cabochon_search(const Search* asked) { return table->search(asked); }

void cabochon_dense(const Matrix* m, const int64_t* rows, int64_t start, int n, float* out,
                    int threads) {
  table->dense(m, rows, start, n, out, threads);
}

// Rows of a matrix that need not be packed, from what it is packed from.
void cabochon_picked(const Matrix* m, const Stored* stored, const int64_t* ids, int n, float* out,
                     int threads) {
  table->picked(m, stored, ids, n, out, threads);
}

// Hidden states of the rows that a step wants; `caches` are those of each layer.
void cabochon_text(const Text* text, const Cache* caches, const Step* step) {
  table->text(text, caches, step);
}

void cabochon_layer(const Layer* layer, const Cache* cache, const Access* access,
                    const Rotation* rotation, const Pass* pass) {
  table->layer(layer, cache, access, rotation, pass);
}

// Additions and multiplications done, of codes of four bits that are already in registers.
double cabochon_peak(int64_t rounds, int threads) { return table->peak(rounds, threads); }

void cabochon_read(const uint8_t* data, int64_t size, int threads) {
  table->read(data, size, threads);
}
}
