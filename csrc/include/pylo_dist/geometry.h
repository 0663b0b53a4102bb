// Where the elements of a rank's tensors lie: the tables that pylo_dist/maths/tables.py writes,
// once per batch. No torch, no CUDA include. All numbers are int64, so that a table is a plain
// int64 tensor on either device.
//
// Legend (as pylo_dist/maths/reference.py): K = 3 decays; R and C lengths of the row and column
// factors; N local elements; d0 is averaged away in `row`, d1 in `col`. A `lead` is an index of the
// dims that are normalised one by one (CELO2: all but the last two dims).
#pragma once

#include "math.h"

namespace pylo_dist {

constexpr int K = 3;
constexpr int MAX_DIMS = 5;
constexpr int MAX_LEAD_DIMS = MAX_DIMS - 2;
constexpr int NUM_MOMENTS = 9;  // VeLO's sums of a tensor: p^2, m_k, m_k^2, v, v^2

// The fields of a row, all int64, in order: ONE(name) or MANY(name, how many). They are written
// once, here: the structs below are made of them, and Python, which fills the tables by name, is
// told them by `table_fields`.

// A rectangular block of a shard. Element (j_0, ..., j_4), C order, lies at
//   local_at + sum j_d local[d]   in the local 1-D tensors,
//   row_at + sum j_d row[d]       in the row vectors (strides 0 along d0),
//   col_at + sum j_d col[d]       in the column vectors (strides 0 along d1),
//   lead_at + sum j_d lead[d]     among the leads.
// Unused dims come first and have size 1; neighbouring dims that step alike are merged. The
// innermost local stride is 1.
// clang-format off
#define PYLO_DIST_BOX_FIELDS(ONE, MANY)                              \
  ONE(item)                                                          \
  MANY(sizes, MAX_DIMS)                                              \
  MANY(local, MAX_DIMS)                                              \
  MANY(row, MAX_DIMS)                                                \
  MANY(col, MAX_DIMS)                                                \
  MANY(lead, MAX_DIMS)                                               \
  ONE(local_at) ONE(row_at) ONE(col_at) ONE(lead_at)
// clang-format on

// clang-format off
// One tensor of a batch, by its GLOBAL shape:
//   numel                   N
//   shard_start, shard_run, shard_pitch
//                           local element i is number start + i / run * pitch + i % run of the
//                           whole tensor (pylo_dist/core/shards.py); run > 0 unless N = 0
//   factored                1: row and col; 0: diag (K, N)
//   rows, cols              R, C; 0 without factors
//   size_d0, size_d1        a row mean is over size_d0 elements, a column mean over size_d1
//   row_outer, row_inner    the row vector is (row_outer, size_d1, row_inner): <row>_{d1} is over
//                           the middle
//   vector_is_row           along the last dim of the shape it is `row` that changes, not `col`
//   leads, lead_numel       how many (1 unless the rule normalises per matrix), and elements of the
//                           whole tensor per lead
//   lead_row, lead_col      strides of the leads into row and col
//   matrix_*                the last two dims, used where there are several leads
//   factors_at              in `factors`, see Factors
//   squares_at              in `squares`: 12 x leads sums of squares of the factor features, in
//                           their order
//   a_buffer, a_audit, a_at which buffer of the first Sum, and where in it are the audit and the
//                           row and column sums
//   b_buffer, b_at          the same of the second Sum: num_sums x leads
//   moments_at              there too, VeLO's nine sums, see NUM_MOMENTS; -1: not asked for
//   first_box, num_boxes    its rows of the other table
#define PYLO_DIST_ITEM_FIELDS(ONE, MANY)                             \
  ONE(numel) ONE(global_numel)                                       \
  ONE(shard_start) ONE(shard_run) ONE(shard_pitch)                   \
  ONE(factored)                                                      \
  ONE(rows) ONE(cols)                                                \
  ONE(size_d0) ONE(size_d1)                                          \
  ONE(row_outer) ONE(row_inner)                                      \
  ONE(vector_is_row)                                                 \
  ONE(leads) ONE(lead_numel)                                         \
  MANY(lead_sizes, MAX_LEAD_DIMS)                                    \
  MANY(lead_row, MAX_LEAD_DIMS)                                      \
  MANY(lead_col, MAX_LEAD_DIMS)                                      \
  MANY(matrix_sizes, 2) MANY(matrix_row, 2) MANY(matrix_col, 2)      \
  ONE(factors_at)                                                    \
  ONE(squares_at)                                                    \
  ONE(a_buffer) ONE(a_audit) ONE(a_at)                               \
  ONE(b_buffer) ONE(b_at)                                            \
  ONE(moments_at)                                                    \
  ONE(first_box) ONE(num_boxes)
// clang-format on

#define PYLO_DIST_DECLARE_ONE(name) int64_t name;
#define PYLO_DIST_DECLARE_MANY(name, count) int64_t name[count];
#define PYLO_DIST_COUNT_ONE(name) +1
#define PYLO_DIST_COUNT_MANY(name, count) +(count)

struct Box {
  PYLO_DIST_BOX_FIELDS(PYLO_DIST_DECLARE_ONE, PYLO_DIST_DECLARE_MANY)
};
struct Item {
  PYLO_DIST_ITEM_FIELDS(PYLO_DIST_DECLARE_ONE, PYLO_DIST_DECLARE_MANY)
};

// How many int64 a row has.
constexpr int64_t BOX_WIDTH = PYLO_DIST_BOX_FIELDS(PYLO_DIST_COUNT_ONE, PYLO_DIST_COUNT_MANY);
constexpr int64_t ITEM_WIDTH = PYLO_DIST_ITEM_FIELDS(PYLO_DIST_COUNT_ONE, PYLO_DIST_COUNT_MANY);
static_assert(sizeof(Box) == 8 * BOX_WIDTH && sizeof(Item) == 8 * ITEM_WIDTH,
              "a row is its fields and nothing else");

// Slots of the gradient audit that the passes write (pylo_dist/core/requests.py).
constexpr int AUDIT_NONFINITE = 1;
constexpr int AUDIT_SQUARES = 2;

// Dtypes of values and gradients. State is float32, momentum and rms also bfloat16.
enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// The tensors of one item in a step; those a pass has no use for are null.
struct Tensors {
  void* value;
  const void* grad;
  float* momentum;   // (K, N); what it points to may be bfloat16, as rms
  float* rms;        // (N,)
  float* diag;       // (K, N), unless factored
  float* row;        // (K, R)
  float* col;        // (K, C)
  float* direction;  // (N,) where the network's output is wanted instead of a step
  int64_t value_type, grad_type;
};

// What the passes read of an item's factors beside row and col themselves: float32, K vectors each,
// made by pass B.
//   row_scale (K, R) | col_scale (K, C) | row_rsqrt (K, R) | col_rsqrt (K, C)
// with F_k(x) = x row_scale_k col_scale_k, and the features rsqrt(row + 1e-8), rsqrt(col + 1e-8).
struct Factors {
  const float *row, *col;
  const float *row_scale, *col_scale, *row_rsqrt, *col_rsqrt;
  int64_t rows, cols;
};

struct Run {  // a row of a box: all its elements along the innermost dim
  int64_t local, row, col, lead;
};

inline namespace PYLO_ISA {

// index / size, and the remainder in `rest`. Without a 64-bit division where 32 bits do; that is a
// function call on a GPU, which costs registers around it even where it is never made, so the rest
// is done bit by bit.
PYLO_HD int64_t divide(int64_t index, int64_t size, int64_t& rest) {
  if (static_cast<uint64_t>(index | size) <= 0xffffffffull) {
    const uint32_t i = static_cast<uint32_t>(index), by = static_cast<uint32_t>(size),
                   quotient = i / by;
    rest = i - quotient * by;
    return quotient;
  }
  uint64_t quotient = 0, left = 0;
#if defined(__CUDACC__)
#pragma unroll 1
#endif
  for (int bit = 62; bit >= 0; --bit) {
    left = left << 1 | (static_cast<uint64_t>(index) >> bit & 1);
    quotient <<= 1;
    if (left >= static_cast<uint64_t>(size)) {
      left -= static_cast<uint64_t>(size);
      quotient |= 1;
    }
  }
  rest = static_cast<int64_t>(left);
  return static_cast<int64_t>(quotient);
}

PYLO_HD int64_t factors_size(const Item& item) { return 2 * K * (item.rows + item.cols); }

PYLO_HD Factors factors_of(const Item& item, const Tensors& t, const float* factors) {
  const float* at = factors + item.factors_at;
  const int64_t r = K * item.rows, c = K * item.cols;
  return Factors{t.row, t.col, at, at + r, at + r + c, at + 2 * r + c, item.rows, item.cols};
}

// Number of runs of a box (all dims but the innermost), and where a run begins.
PYLO_HD int64_t num_runs(const Box& box) {
  return box.sizes[0] * box.sizes[1] * box.sizes[2] * box.sizes[3];
}

PYLO_HD Run run_of(const Box& box, int64_t index) {
  Run run{box.local_at, box.row_at, box.col_at, box.lead_at};
  for (int d = MAX_DIMS - 2; d >= 0; --d) {
    const int64_t j = index % box.sizes[d];
    index /= box.sizes[d];
    run.local += j * box.local[d];
    run.row += j * box.row[d];
    run.col += j * box.col[d];
    run.lead += j * box.lead[d];
  }
  return run;
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
