// Memory of one thread for what it makes on the way.
#pragma once
#include <cstdlib>

namespace {

struct Room {  // grown to the largest that was asked for
  float* data = nullptr;
  size_t size = 0;
  float* of(size_t n) {
    if (n > size) {
      free(data);
      data = (float*)aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
      size = n;
    }
    return data;
  }
  ~Room() { free(data); }
};

}  // namespace
