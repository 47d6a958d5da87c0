// How far each pair of a head turns at a token's position.
#pragma once
#include <cstdint>

// Cosines and sines `[n, pairs]` of `positions` times `frequencies`, in float32 as nn/rotary.py has it.
void turn(const float* frequencies, const int64_t* positions, int64_t n, int pairs, float* cos,
          float* sin, int threads);
