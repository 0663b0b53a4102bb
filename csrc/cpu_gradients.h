// Pass A on a CPU: sums of g^2 along rows and columns, the audit.
#pragma once

#include "cpu_tiles.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

constexpr int CHUNK = 256;

struct GradientSums {
  int64_t beyond = 0;
  RawWide squares{};  // of what was not clamped
};

// Squares of R runs of `count` (a multiple of W) gradients: their sums over each run to run_sums,
// over the runs added to `vector`.
template <int R, bool Clamp, bool HasVector>
PYLO_HD void add_runs(const float* const (&g)[R], int count, const GradientLimits& limits,
                      GradientSums& sums, double (&run_sums)[R], double* vector) {
  RawWide of_run[R] = {};
  for (int o = 0; o < count; o += W) {
    RawWide low{}, high{};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec x = load(g[r] + o);
      sums.beyond += count_beyond(x, limits.limit);
      RawWide l = low_half(x), h = high_half(x);
      l = l * l;
      h = h * h;
      if constexpr (Clamp) {
        sums.squares += l + h;
        l = min_(l, limits.clamp_square);
        h = min_(h, limits.clamp_square);
      }
      of_run[r] += l + h;
      low += l;
      high += h;
    }
    if constexpr (HasVector) {
      RawWide at[2];
      __builtin_memcpy(at, vector + o, sizeof at);
      at[0] += low;
      at[1] += high;
      __builtin_memcpy(vector + o, at, sizeof at);
    }
  }
  for (int r = 0; r < R; ++r) {
    run_sums[r] = total(of_run[r]);
    if constexpr (!Clamp) sums.squares[0] += run_sums[r];
  }
}

// The gradients at `at` in place, or as floats in `buffer`, whose pads up to a multiple of W are
// zero.
PYLO_HD const float* gradients_at(const Tensors& t, int64_t at, int count,
                                  const GradientLimits& limits, GradientSums& sums, float* buffer) {
  if (t.grad_type == FLOAT32 && count % W == 0 && !limits.replace)
    return static_cast<const float*>(t.grad) + at;
  read(buffer, t.grad, t.grad_type, at, count);
  for (int i = count; i % W; ++i) buffer[i] = 0.0f;
  if (limits.replace) {
    const float largest = t.grad_type == FLOAT32    ? 3.402823466e38f
                          : t.grad_type == BFLOAT16 ? 3.389531390e38f
                                                    : 65504.0f;
    for (int i = 0; i < count; ++i) {
      const float x = buffer[i];
      sums.beyond += !(__builtin_fabsf(x) <= limits.limit);
      if (x != x) buffer[i] = 0.0f;
      if (__builtin_isinf(x)) buffer[i] = x > 0.0f ? largest : -largest;
    }
  }
  return buffer;
}

template <int R, bool Clamp>
static void dense_runs(const Tensors& t, const Run (&runs)[R], int64_t first, int64_t last,
                       const GradientLimits& limits, GradientSums& sums, double* vector,
                       double* const (&constant)[R]) {
  alignas(64) float buffers[R][CHUNK];
  GradientLimits counted = limits;
  if (limits.replace) counted.limit = __builtin_inff();  // counted before they were replaced
  for (int64_t j = first; j < last; j += CHUNK) {
    const int count = static_cast<int>(last - j < CHUNK ? last - j : CHUNK);
    const float* g[R];
    for (int r = 0; r < R; ++r)
      g[r] = gradients_at(t, runs[r].local + j, count, limits, sums, buffers[r]);
    double run_sums[R];
    add_runs<R, Clamp, true>(g, (count + W - 1) / W * W, counted, sums, run_sums,
                             vector + (j - first));
    for (int r = 0; r < R; ++r) *constant[r] += run_sums[r];
  }
}

template <bool Clamp>
static void dense_gradients(const PassArgs& args, const Job& job, const GradientLimits& limits,
                            GradientPartial& out, GradientSums& sums) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  double* vector = item.vector_is_row ? out.row - out.rows.first : out.col - out.cols.first;
  double* constant = item.vector_is_row ? out.col - out.cols.first : out.row - out.rows.first;
  int64_t run = job.first_run;
  while (run < job.last_run) {
    Run runs[4];
    int64_t at[4];
    int count = 0;
    for (; count < 4 && run + count < job.last_run; ++count) {
      runs[count] = run_of(box, run + count);
      at[count] = item.vector_is_row ? runs[count].col : runs[count].row;
      if (item.vector_is_row ? runs[count].row != runs[0].row : runs[count].col != runs[0].col)
        break;
    }
    double* to = vector + (item.vector_is_row ? runs[0].row : runs[0].col) + job.first;
    if (count == 4) {
      double* const sides[4] = {constant + at[0], constant + at[1], constant + at[2],
                                constant + at[3]};
      dense_runs<4, Clamp>(t, runs, job.first, job.last, limits, sums, to, sides);
      run += 4;
    } else {
      const Run one[1] = {runs[0]};
      double* const side[1] = {constant + at[0]};
      dense_runs<1, Clamp>(t, one, job.first, job.last, limits, sums, to, side);
      run += 1;
    }
  }
}

static void gradients(const PassArgs& args, const Job& job, const GradientLimits& limits,
                      GradientPartial& out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  GradientSums sums;
  if (is_dense(item, box)) {
    if (limits.clamp_square < __builtin_inf()) {
      dense_gradients<true>(args, job, limits, out, sums);
    } else {
      dense_gradients<false>(args, job, limits, out, sums);
    }
  } else {
    constexpr int inner = MAX_DIMS - 1;
    alignas(64) float buffer[CHUNK];
    GradientLimits counted = limits;
    if (limits.replace) counted.limit = __builtin_inff();
    for (int64_t run = job.first_run; run < job.last_run; ++run) {
      const Run at = run_of(box, run);
      for (int64_t j = job.first; j < job.last; j += CHUNK) {
        const int count = static_cast<int>(job.last - j < CHUNK ? job.last - j : CHUNK);
        const float* g[1] = {gradients_at(t, at.local + j, count, limits, sums, buffer)};
        double run_sum[1];
        add_runs<1, false, false>(g, (count + W - 1) / W * W, counted, sums, run_sum, nullptr);
        if (!item.factored) continue;
        double* row = out.row - out.rows.first + at.row + j * box.row[inner];
        double* col = out.col - out.cols.first + at.col + j * box.col[inner];
        for (int i = 0; i < count; ++i) {
          const double square = min_(static_cast<double>(g[0][i]) * static_cast<double>(g[0][i]),
                                     limits.clamp_square);
          row[i * box.row[inner]] += square;
          col[i * box.col[inner]] += square;
        }
      }
    }
  }
  out.audit[0] += static_cast<double>(sums.beyond);
  out.audit[1] += total(sums.squares);
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
