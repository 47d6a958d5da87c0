// From what checkpoints store to blocks of 32 rows.
#pragma once
#include "api.h"

// The same from the block `block` on.
Stored from_block(Stored stored, int64_t block);

// Fills a block of `m` from `stored`, whose first row is that of the block.
void pack(const Matrix& m, const Stored& stored, int64_t block);
