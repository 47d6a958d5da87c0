// What each instruction set offers.
#pragma once
#include "api.h"

class Backlog;

struct Table {
  void (*times)(const Matrix*, const float* x, int64_t ldx, int n, int start, int stop, float* y,
                int64_t ldy, int threads);
  void (*times_rows)(const Rows*, const int64_t* ids, const float* x, int64_t ldx, int n, int start,
                     int stop, float* y, int64_t ldy, int threads);
  void (*layers)(const Layer* const*, const Cache*, const int32_t* turns, const Step*, int first,
                 int count);
  void (*own)(const Own*, const float* found, float* made, int n, int threads);
  int64_t (*sketch)(Backlog*, const Rows*, const Matrix* to, const Margin*);
  double (*peak)(int64_t rounds, int threads);
  void (*read)(const uint8_t* data, int64_t size, int threads);
  int64_t (*search)(const Search*);
  void (*dense)(const Matrix*, const int64_t* rows, int64_t start, int n, float* out, int threads);
};
