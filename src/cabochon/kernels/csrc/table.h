// What each instruction set offers.
#pragma once
#include "api.h"

class Backlog;

struct Table {
  void (*times)(const Matrix*, const float* x, int64_t ldx, int n, int start, int stop, float* y,
                int64_t ldy, int threads);
  void (*times_rows)(const Rows*, const int64_t* ids, const float* x, int64_t ldx, int n, int start,
                     int stop, float* y, int64_t ldy, int threads);
  void (*text)(const Text*, const Cache*, const Step*);
  void (*layer)(const Layer*, const Cache*, const Access*, const Rotation*, const Pass*);
  int64_t (*sketch)(Backlog*, const Sketch*);
  void (*near)(const Sketch*, const float* x, int64_t ldx, int n, float* y, int64_t ldy, int threads);
  double (*peak)(int64_t rounds, int threads);
  void (*read)(const uint8_t* data, int64_t size, int threads);
  int64_t (*search)(const Search*);
  void (*dense)(const Matrix*, const int64_t* rows, int64_t start, int n, float* out, int threads);
  void (*picked)(const Matrix*, const Stored*, const int64_t* ids, int n, float* out, int threads);
};
