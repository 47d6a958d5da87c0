// What Python and the kernels agree on: plain structs and a C ABI, no headers of either.
//
// A packed matrix consists of blocks of 32 rows. A block is one aligned stream: its scales, what
// belongs to them, and its codes, a unit of 32 columns after the other. Within a unit, four bytes
// of a row stand together (a quad), and the 32 rows of a quad follow each other, so that a vector
// of any width holds quads of consecutive rows. Quad 2d + p holds columns 8d + 2j + p, j < 4:
// two codes a byte, as checkpoints store them, then are a quad's low and the next one's high half.
#pragma once
#include <cstdint>

constexpr int ROWS = 32;  // of a block
constexpr int UNIT = 32;  // columns of a unit
constexpr int FINE = 254;  // in the second table count as much as one in the first

enum Codes : int32_t { U4 = 0, U8 = 1, TABLE = 2, TABLE2 = 3, U2 = 4, U3 = 5, U5 = 6, U6 = 7 };

// How a scale is stored. LEVEL: a byte that a table of 256 explains. SUB: a byte times a float16
// that several groups share. E4M3, E8M0: a LEVEL whose table is, up to its rounding, `unit` times
// what the byte is as such a float.
enum Scales : int32_t { F16 = 0, BF16 = 1, F32 = 2, LEVEL = 3, SUB_U8 = 4, SUB_I8 = 5, E4M3 = 6, E8M0 = 7 };

// What is taken away: nothing but a constant code; the code of each group; a number of each group.
enum Mins : int32_t { CONSTANT = 0, ZERO_POINT = 1, MIN_F16 = 2, MIN_F32 = 3, MIN_SUB_U8 = 4, MIN_BF16 = 5 };

enum Floats : int32_t { ROW_BF16 = 0, ROW_F16 = 1, ROW_F32 = 2, ROW_E4M3 = 3 };

struct Matrix {
  const uint8_t* data;
  const float* levels;   // [256] of LEVEL, E4M3, E8M0
  int64_t stride;        // bytes from block to block
  int64_t shared_at, minima_at, shared_minima_at, codes_at;  // in a block; scales are at 0
  int32_t rows, columns, units;
  int32_t codes, scales, minima;
  int32_t groups;        // scales of a row
  int32_t halves;        // 16 columns that share a scale, counted; 1, or even
  int32_t per_shared;    // groups that share a float16
  int32_t digits;        // of activations: 1 (`int8`), 2 (`int16`), 0 (`float32`)
  int32_t round;         // products of code and scale: 0 as they are, 1 to bfloat16, 2 to float16
  float zero;            // the code that stands for zero, where it is the same everywhere
  float gain;            // times every scale
  float unit;            // of E4M3 and E8M0
  uint8_t table[2][16];  // of TABLE and TABLE2: the value of a code, plus `zero` to be unsigned
  float values[16];      // the same exactly
};

// Where the codes of a stored row lie: `Layout` and `Plane` of nn/layout.py, which explains them.
struct Plane {
  int32_t at, bits, run, to;
};
struct Layout {
  int32_t entries, bytes;  // of a block
  int32_t flip, high_first, planes;
  Plane plane[2];
};

// Numbers of a matrix that go to `at` of each block: `per_row` of `size` bytes, rows and groups so
// many bytes apart; null if there are none.
struct Grouped {
  const uint8_t* from;
  int64_t at, row, group;
  int32_t per_row, size;
};

// What a matrix is packed from: rows of `bytes`, `ld` apart, and the numbers of its groups. If there
// is a `which`, row i is row `which[i]` of what lies there.
struct Stored {
  const uint8_t* rows;
  int64_t ld, bytes;
  Layout layout;
  Grouped grouped[4];
  const int64_t* which;
};

// Which numbers there are in stored bytes, for looking at them: kernels/look.py. Floats of so many
// bytes, of which `first` masks the sign; or blocks of `bytes` with a float16 at `first` and, unless
// it is negative, at `second`, and numbers beside it as in ggml's blocks; or so many octets.
enum Form : int32_t {
  NOTHING = 0, FLOATS_1 = 1, FLOATS_2 = 2, FLOATS_4 = 4,
  BLOCK_HALF = 5, BLOCK_OCTETS = 6, BLOCK_Q2 = 7, BLOCK_Q3 = 8, BLOCK_Q4 = 9, BLOCK_Q6 = 10, BLOCK_IQ4 = 11
};
struct Numbers {
  int32_t form, bytes, first, second;
};

// What was found: `top` is the bits of the largest magnitude, or `largest` is it, or `octets` says
// how often there is each.
struct Found {
  int64_t bad, count, zeros;
  uint32_t top;
  float largest;
  int64_t octets[256];
  int32_t error;  // with which a file could not be read; -1: it ended
};

// Bytes of a file to be looked at, and where to put what is in them: `sums` for the hash, and a copy
// of one block in `every`, if that is not 0.
struct Stretch {
  int32_t file;
  int64_t at, size, every;
  Numbers numbers;
  uint64_t* sums;
  uint8_t* sample;
  Found* found;
};

// A matrix of floats as a checkpoint stores it, row by row.
struct Rows {
  const uint8_t* data;
  const float* scales;   // [ceil(rows / scale_rows), ceil(columns / scale_columns)], or null
  int32_t rows, columns, type, scale_rows, scale_columns;
};

// Either of the two, or neither: then there is no such matrix.
struct Linear {
  const Matrix* packed;
  const Rows* rows;
};

// A matrix told again in few bits, and how far off products with that may be: sketch.h.
struct Sketch {
  Matrix near;
  const float* dither;   // [columns], from 0 up to 1
  float* margins;        // [rows, 2]
  Linear whole;          // the matrix
  const Stored* stored;  // what it is packed from, unless it is rows
};

// Who looks for the `count` largest of a row's `products [n]` and what may become equal to one of them,
// of those that are `allowed` (null: all) and none of `never`. With a `sketch`, products are near the
// true ones, which are then its whole matrix times `x`. The true ones are rounded by no more than the
// part `rounding`, then through a soft-cap.
struct Search {
  float* products;  // -inf afterwards, where it may not be drawn
  const Sketch* sketch;
  const float* x;
  const int64_t* never;
  const uint8_t* allowed;
  int64_t* ids;  // what is found, in rising order: room for `room`
  float* found;  // and its products
  int32_t n, count, nevers, room, threads;
  float widest[2];  // of the margins
  float cap;        // 0: none
  float rounding;
};

// Experts of a layer. Each owns `2 * intermediate` rows of one tall matrix, its gate before what is
// gated, and `hidden` rows of another; these are cut into parts of `gate_up_rows` and `down_rows`
// rows, stored alike.
struct Experts {
  Linear router;
  const Linear *gate_up, *down;  // the parts
  const float *router_scale, *per_expert;
  const float *before, *after, *after_mlp;  // norms: of their inputs, of their sum, and beside it
  int32_t gate_up_rows, down_rows, count, chosen, intermediate;
  float root;  // times what the router sees
};

// A decoder layer. Norms are float32 weights, or null where there is none; `experts` may be null.
struct Layer {
  Linear q, k, v, o, gate, up, down, own_gate, own_up;
  const float *before_attention, *after_attention, *before_mlp, *after_mlp, *after_own;
  const float *q_norm, *k_norm;
  const Experts* experts;
  int32_t hidden, heads, kv_heads, head_dim, intermediate, own;
  int32_t shares_kv, values_are_keys;
  float eps, scalar;
};

// A text model: its layers, of which those from `writing` on write no keys and values, and a norm
// behind them. Layer i turns by rotation `turns[i]`, a pair of numbers by each of its frequencies.
// Where `own` is not 0, a layer gets so many numbers of a token for itself: what is projected from
// its embedding, times `own_scale`, through a norm, and what is found for it.
struct Text {
  const Layer* const* layers;
  const int32_t* turns;
  const float* const* frequencies;
  const int32_t* pairs;  // of each rotation
  Linear projection;
  const float *own_norm, *norm;
  int32_t count, writing, rotations, own;
  float own_scale, eps;
};

enum Kept : int32_t { KEPT_F32 = 0, KEPT_F16 = 1, KEPT_I8 = 2 };

// Where a layer's keys and values lie: `[slots, kv_heads, head_dim]`. Those in eight bits count
// multiples of a scale of each slot and head, `[slots, kv_heads]`.
struct Cache {
  void *keys, *values;
  float *key_scales, *value_scales;
  int32_t kind;
  int32_t group;  // which of a step's `accesses` is its own
};

// Row i of a step belongs to a sequence whose pages of 16 slots are `pages[page_at[i]]` on, and
// looks at positions `low[i]` to `high[i]`, end excluded. Rows of a sequence follow each other.
struct Access {
  const int64_t* slots;  // of each row, to write; not read by layers that share another's
  const int32_t *pages, *page_at, *low, *high;
};

// [n, head_dim / 2] each.
struct Rotation {
  const float *cos, *sin;
};

// A step of a text model: `x [n, hidden]`, which is overwritten, and `found [n, count, own]` of its
// tokens, each at a position. Only the rows `wanted`, sorted, are gone on with where nothing is
// written any more, and end in `y [rows, hidden]`. There is an access for each of `groups` of layers.
struct Step {
  const Access* accesses;
  float* x;
  const float* found;
  const int64_t *positions, *wanted;
  float* y;
  int32_t groups, n, rows, threads;
};

// What a layer works on: `x [n, hidden]` is read and overwritten, `inputs [n, own]` lie `inputs_ld`
// apart.
struct Pass {
  float* x;
  const float* inputs;
  int64_t inputs_ld;
  int32_t n, threads;
};
