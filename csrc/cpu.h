// What ops.cpp, which deals the work, and cpu_kernels.h, which does it for one instruction set, say
// to each other. No torch.
#pragma once

#include "packing.h"
#include "pylo_dist/adamw.h"
#include "pylo_dist/mlp.h"
#include "pylo_dist/rounding.h"

namespace pylo_dist {

// Runs first_run .. last_run of a box, and of each the elements first .. last along the innermost
// dim. Jobs follow from the tables alone, never from the number of threads: so do the partial sums,
// and with them the bits of the results.
struct Job {
  int64_t box, first_run, last_run, first, last;
};

// A range of indices into a row, column or lead vector that a job touches.
struct IndexRange {
  int64_t first, size;
};

struct GradientLimits {
  float limit;          // larger ones count as non-finite
  double clamp_square;  // bound of g^2 in the factors
  bool replace;         // NaN and inf are taken as 0 and the largest number
};

struct PassArgs {
  const Item* items;
  const Box* boxes;
  const Tensors* tensors;
  int64_t state_type;   // of momentum and rms: where it is BFLOAT16, so is what they point to
  const int64_t* keys;  // per item, of its seed and step, where state is bfloat16
  RuleConstants rule;
  const double* scale;  // per item
  const float* factors;
  const float* normalisers;  // (leads, INPUTS) per item, from normalisers_at[item]
  const int64_t* normalisers_at;
  const char* networks;  // as `pack` makes them
  int64_t network_bytes;
  const int64_t* network_of;  // per item, which of them
  const Step* steps;
};

// The sums of squares of pass A that a job makes.
struct GradientPartial {
  double audit[2];  // non-finite entries, sum of g^2
  double *row, *col;
  IndexRange rows, cols;
};

// Numbers beyond the end of row and col of a partial that may be written (zeros are added there).
constexpr int PAD = 16;

struct Kernels {
  const char* name;
  void (*gradients)(const PassArgs&, const Job&, const GradientLimits&, GradientPartial&);
  // p^2, m_k, m_k^2, v, v^2 over the local elements first .. last
  void (*moments)(const Tensors&, int64_t state_type, int64_t numel, int64_t first, int64_t last,
                  double* out);
  // (num_partials, leads.size) sums of squares of the element features; then, where an item has
  // moments, all of them but p^2
  void (*features)(const PassArgs&, const Job&, bool extended, IndexRange leads, double* out);
  // bytes of a network as `updates` reads it, and it from a packed one (mlp.h); aligned to a line
  int64_t (*network_bytes)(int hidden);
  void (*pack)(const float* packed, bool vector_is_row, int hidden, void* to);
  // pass C; gives the sum of (p_new - p)^2
  double (*updates)(const PassArgs&, const Job&, int hidden);
  // elements from the given ones on, of which the ends are noted
  void (*copy)(const Pair&, int64_t from_at, int64_t to_at, int64_t count, Ends&);
  // AdamW's step of elements first .. last of a tensor, whose state is bfloat16 where there is the
  // key of seed and step; gives the sum of (p_new - p)^2
  double (*adamw)(const AdamWTensors&, const AdamWRule&, const AdamWNumbers&, float scale,
                  const int64_t* key, int64_t first, int64_t last);
  double (*squares)(const void* x, int64_t type, int64_t first, int64_t last);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

// Those of the chosen instruction set.
const Kernels& kernels();

}  // namespace pylo_dist
