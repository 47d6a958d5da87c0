// The kernels for one instruction set, which the build chooses. Each gives a table.
#include "exact.h"
#include "limits.h"
#include "quantize.h"
#include "rows.h"
#include "search.h"
#include "table.h"
#include "text.h"

static void times(const Matrix* m, const float* x, int64_t ldx, int n, int start, int stop, float* y,
                  int64_t ldy, int threads) {
  if (m->digits == 0) return multiply_exactly(*m, x, ldx, n, start, stop, y, ldy, threads);
  const Quantized q = quantized_for(*m, x, ldx, n, threads);
  multiply(*m, q, n * m->digits, start, stop, y, ldy, threads);
}

static void times_rows(const Rows* m, const int64_t* ids, const float* x, int64_t ldx, int n,
                       int start, int stop, float* y, int64_t ldy, int threads) {
  multiply_rows(*m, ids, lifted_for(*m, x, ldx, n), n, start, stop, y, ldy, threads);
}

static int64_t sketch(Backlog* backlog, const Sketch* s) { return make_sketch(backlog, *s); }

static void near(const Sketch* s, const float* x, int64_t ldx, int n, float* y, int64_t ldy,
                 int threads) {
  multiply_near(*s, x, ldx, n, y, ldy, threads);
}

static void entries(const Matrix* m, const int64_t* rows, int64_t start, int n, float* out,
                    int threads) {
  dense(*m, rows, start, n, out, threads);
}

static void picked(const Matrix* m, const Stored* stored, const int64_t* ids, int n, float* out,
                   int threads) {
  dense_picked(*m, *stored, ids, n, out, threads);
}

static void layer(const Layer* of, const Cache* cache, const Access* access, const Rotation* rotation,
                  const Pass* pass) {
  run_layer(*of, View{*cache, *access}, *rotation, *pass);
}

extern "C" const Table* CABOCHON_TABLE() {
  static const Table table = {times, times_rows, run_text, layer,   sketch, near,
                              peak,  read_all,   search,   entries, picked};
  return &table;
}
