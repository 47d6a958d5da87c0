// Keys and values in the paged cache, as it stores them.
#pragma once
#include "api.h"
#include "simd.h"

namespace {

constexpr int PAGE = 16;  // slots

template <int KIND> INL F kept(const void* p, int64_t i) {
  if (KIND == KEPT_F16) return fload_f16((const uint16_t*)p + i);
  if (KIND == KEPT_I8) return fload_i8((const uint8_t*)p + i);
  return fload((const float*)p + i);
}

template <int KIND> constexpr int KEPT_BYTES = KIND == KEPT_F32 ? 4 : KIND == KEPT_F16 ? 2 : 1;

// A layer's cache, and what the rows of a step write and see of it.
struct View : Cache, Access {};

// Where one head of one sequence lies: of a position its slot and head, counted in heads.
struct Place {
  const int32_t* pages;
  int kv_heads, head;
  int64_t operator()(int position) const {
    return ((int64_t)pages[position / PAGE] * PAGE + position % PAGE) * kv_heads + head;
  }
};

INL float scale_at(const float* scales, int64_t i) { return scales ? scales[i] : 1.0f; }

// One head in eight bits: multiples of a 127th of the largest. What is no number gives a scale
// that is none.
static void write_bytes(const float* from, int8_t* to, float* scale, int width) {
  F largest = fzero(), poison = fzero();
  for (int i = 0; i < width; i += LANES) {
    largest = fmax2(largest, fabs1(fload(from + i)));
    poison = fma(fload(from + i), fzero(), poison);
  }
  const float most = fmaximum(largest);
  *scale = most / 127.0f + fsum(poison);
  const float by = most > 1e-30f ? 127.0f / most : 0.0f;  // smaller ones become zeros
  for (int i = 0; i < width; i++) to[i] = (int8_t)(int)std::nearbyint(from[i] * by);
}

static void write_kept(const View& cache, const float* from, void* to, float* scales, int64_t slot,
                       int kv_heads, int dim) {
  const int width = kv_heads * dim;
  if (cache.kind == KEPT_I8) {
    for (int h = 0; h < kv_heads; h++)
      write_bytes(from + h * dim, (int8_t*)to + slot * width + h * dim,
                  scales + slot * kv_heads + h, dim);
    return;
  }
  for (int i = 0; i < width; i += LANES)
    if (cache.kind == KEPT_F16) fstore_f16((uint16_t*)to + slot * width + i, fload(from + i));
    else fstore((float*)to + slot * width + i, fload(from + i));
}

}  // namespace
