// Where the elements of a rank's tensors lie: what pylo_dist/maths/compiled.py writes into its tables, once per batch.
// No torch, no CUDA include. All numbers are int64, so that a table is a plain int64 tensor on either device.
//
// Legend (as pylo_dist/maths/reference.py): K = 3 decays; R and C lengths of the row and column factors; N local elements; d0 is averaged
// away in `row`, d1 in `col`. A `lead` is an index of the dims that are normalised one by one (CELO2: all but the last two dims).
#pragma once

#include "math.h"

namespace pylo_dist {

constexpr int K = 3;
constexpr int MAX_DIMS = 5;
constexpr int MAX_LEAD_DIMS = MAX_DIMS - 2;
constexpr int NUM_MOMENTS = 9;  // VeLO's sums of a tensor: p^2, m_k, m_k^2, v, v^2

// A rectangular block of a shard. Element (j_0, ..., j_4), C order, lies at
//   local_at + sum j_d local[d]   in the local 1-D tensors,
//   row_at + sum j_d row[d]       in the row vectors (strides 0 along d0),
//   col_at + sum j_d col[d]       in the column vectors (strides 0 along d1),
//   lead_at + sum j_d lead[d]     among the leads.
// Unused dims come first and have size 1; neighbouring dims that step alike are merged. The innermost local stride is 1.
struct Box {
  int64_t item;
  int64_t sizes[MAX_DIMS];
  int64_t local[MAX_DIMS];
  int64_t row[MAX_DIMS];
  int64_t col[MAX_DIMS];
  int64_t lead[MAX_DIMS];
  int64_t local_at, row_at, col_at, lead_at;
};

// One tensor of a batch, by its GLOBAL shape.
struct Item {
  int64_t numel;               // N
  int64_t global_numel;
  int64_t factored;            // 1: row and col; 0: diag (K, N)
  int64_t rows, cols;          // R, C; 0 without factors
  int64_t size_d0, size_d1;    // a row mean is over size_d0 elements, a column mean over size_d1
  int64_t row_outer, row_inner;  // the row vector is (row_outer, size_d1, row_inner): <row>_{d1} is over the middle
  int64_t vector_is_row;       // along the last dim of the shape it is `row` that changes, and `col` that does not
  int64_t leads;               // how many; 1 unless the rule normalises per matrix
  int64_t lead_numel;          // elements of the whole tensor per lead
  int64_t lead_sizes[MAX_LEAD_DIMS], lead_row[MAX_LEAD_DIMS], lead_col[MAX_LEAD_DIMS];  // strides into row and col
  int64_t matrix_sizes[2], matrix_row[2], matrix_col[2];  // the last two dims, used where there are several leads
  int64_t factors_at;          // in `factors`, see Factors
  int64_t squares_at;          // in `squares`: 12 x leads sums of squares of the factor features (in the order of the features)
  int64_t a_buffer, a_audit, a_at;  // which buffer of the first Sum, and where in it are the audit and the row and column sums
  int64_t b_buffer, b_at;      // the same of the second Sum: num_sums x leads
  int64_t moments_at;          // there too, VeLO's nine sums (p^2, m_k, m_k^2, v, v^2); -1: not asked for
  int64_t first_box, num_boxes;
};

// Slots of the gradient audit that the passes write (pylo_dist/core/rule.py).
constexpr int AUDIT_NONFINITE = 1;
constexpr int AUDIT_SQUARES = 2;

// Dtypes of values and gradients. State is float32.
enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// The tensors of one item in a step; those a pass has no use for are null.
struct Tensors {
  void* value;
  const void* grad;
  float* momentum;   // (K, N)
  float* rms;        // (N,)
  float* diag;       // (K, N), unless factored
  float* row;        // (K, R)
  float* col;        // (K, C)
  float* direction;  // (N,) where the network's output is wanted instead of a step
  int64_t value_type, grad_type;
};

// What the passes read of an item's factors beside row and col themselves: float32, K vectors each, made by pass B.
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

PYLO_HD int64_t factors_size(const Item& item) { return 2 * K * (item.rows + item.cols); }

PYLO_HD Factors factors_of(const Item& item, const Tensors& t, const float* factors) {
  const float* at = factors + item.factors_at;
  const int64_t r = K * item.rows, c = K * item.cols;
  return Factors{t.row, t.col, at, at + r, at + r + c, at + 2 * r + c, item.rows, item.cols};
}

// Number of runs of a box (all dims but the innermost), and where a run begins.
PYLO_HD int64_t num_runs(const Box& box) { return box.sizes[0] * box.sizes[1] * box.sizes[2] * box.sizes[3]; }

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
