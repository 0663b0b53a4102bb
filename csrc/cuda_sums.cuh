// Pass B on a GPU: the factors of every item, then the sums of squares of the element features,
// added as in cuda_gradients.cuh.
#pragma once

#include "cuda_gradients.cuh"

namespace pylo_dist {
namespace gpu {

struct PassArgs {
  Tables tables;
  RuleConstants rule;
  const bool* moves;
  const double* scale;
  float* factors;
  double* squares;
};

// The mean over the middle of row (outer, middle, inner), and from it the row's scale. `lanes`
// threads share a mean.
__device__ __forceinline__ void scale_rows(const Item& item, const float* row, float* to,
                                           int64_t group, int thread, int threads,
                                           double* scratch) {
  const int64_t at =
      group / item.row_inner * item.size_d1 * item.row_inner + group % item.row_inner;
  double sum = 0.0;
  for (int64_t i = thread; i < item.size_d1; i += threads) sum += row[at + i * item.row_inner];
  sum = scratch ? block_sum(sum, scratch) : warp_sum(sum);
  const float mean = static_cast<float>(sum / static_cast<double>(item.size_d1));
  for (int64_t i = thread; i < item.size_d1; i += threads) {
    to[at + i * item.row_inner] = row_scale_of(row[at + i * item.row_inner], mean);
  }
}

// Sum over the elements of a lead of the squares of a factor, by one warp.
__device__ __forceinline__ double lead_square(const Item& item, const float* x, bool is_row,
                                              int64_t lead, int lane) {
  const int64_t* strides = is_row ? item.lead_row : item.lead_col;
  const int64_t* matrix = is_row ? item.matrix_row : item.matrix_col;
  int64_t at = 0;
  for (int d = MAX_LEAD_DIMS - 1; d >= 0; --d) {
    at += lead % item.lead_sizes[d] * strides[d];
    lead /= item.lead_sizes[d];
  }
  const int64_t rows = matrix[0] ? item.matrix_sizes[0] : 1,
                cols = matrix[1] ? item.matrix_sizes[1] : 1;
  double sum = 0.0;
  for (int64_t i = lane; i < rows * cols; i += 32) {
    const double value = x[at + i / cols * matrix[0] + i % cols * matrix[1]];
    sum += value * value;
  }
  return warp_sum(sum) * (static_cast<double>(item.lead_numel) / static_cast<double>(rows * cols));
}

// One block per item: the factors' new state, and everything the passes read of them.
__global__ void __launch_bounds__(512, 1)
    factor_kernel(const __grid_constant__ Head head, const PassArgs args) {
  __shared__ double scratch[MOST_WARPS];
  const int64_t i = blockIdx.x;
  keep_live(head, args.tables, i);
  const Live live = live_at(head, args.tables, i);
  const Item& item = args.tables.items[i];
  if (!is_active(live) || !item.factored) return;
  float *row = live.row_or_diag, *col = live.col;
  float* row_scale = args.factors + item.factors_at;
  float *col_scale = row_scale + K * item.rows, *row_rsqrt = col_scale + K * item.cols,
        *col_rsqrt = row_rsqrt + K * item.rows;
  const double *row_sums = live.a + item.a_at, *col_sums = row_sums + item.rows;
  const double by = args.scale[i] * args.scale[i];
  const double row_by = by / static_cast<double>(item.size_d0),
               col_by = by / static_cast<double>(item.size_d1);
  const bool moves = args.moves[i];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  double* squares = args.squares + item.squares_at;
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    float *row_k = row + k * item.rows, *col_k = col + k * item.cols;
    double row_square = 0.0, row_rsqrt_square = 0.0, col_square = 0.0, col_rsqrt_square = 0.0;
    for (int64_t r = threadIdx.x; r < item.rows; r += blockDim.x) {
      float x = row_k[r];
      if (moves) row_k[r] = x = update_factor(x, row_sums[r] * row_by, k, args.rule);
      const float rsqrt = factor_rsqrt_of(x);
      row_rsqrt[k * item.rows + r] = rsqrt;
      row_square += static_cast<double>(x) * x;
      row_rsqrt_square += static_cast<double>(rsqrt) * rsqrt;
    }
    for (int64_t c = threadIdx.x; c < item.cols; c += blockDim.x) {
      float x = col_k[c];
      if (moves) col_k[c] = x = update_factor(x, col_sums[c] * col_by, k, args.rule);
      const float rsqrt = factor_rsqrt_of(x);
      col_rsqrt[k * item.cols + c] = rsqrt;
      col_scale[k * item.cols + c] = col_scale_of(x);
      col_square += static_cast<double>(x) * x;
      col_rsqrt_square += static_cast<double>(rsqrt) * rsqrt;
    }
    if (item.leads == 1) {
      const double row_times =
          static_cast<double>(item.lead_numel) / static_cast<double>(item.rows);
      const double col_times =
          static_cast<double>(item.lead_numel) / static_cast<double>(item.cols);
      const double sums[4] = {block_sum(row_square, scratch) * row_times,
                              block_sum(col_square, scratch) * col_times,
                              block_sum(row_rsqrt_square, scratch) * row_times,
                              block_sum(col_rsqrt_square, scratch) * col_times};
      if (threadIdx.x == 0) {
        for (int s = 0; s < 4; ++s) squares[s * K + k] = sums[s];
      }
    }
    __syncthreads();  // the state is written
    const int64_t groups = item.row_outer * item.row_inner;
    if (groups < warps) {
      for (int64_t g = 0; g < groups; ++g) {
        scale_rows(item, row_k, row_scale + k * item.rows, g, threadIdx.x, blockDim.x, scratch);
      }
    } else {
      for (int64_t g = warp; g < groups; g += warps)
        scale_rows(item, row_k, row_scale + k * item.rows, g, lane, 32, nullptr);
    }
    if (item.leads > 1) {
      for (int64_t l = warp; l < 4 * item.leads; l += warps) {
        const int s = static_cast<int>(l / item.leads);
        const bool is_row = s % 2 == 0;
        const float* x = is_row ? (s == 0 ? row_k : row_rsqrt + k * item.rows)
                                : (s == 1 ? col_k : col_rsqrt + k * item.cols);
        const double sum = lead_square(item, x, is_row, l % item.leads, lane);
        if (lane == 0) squares[(s * K + k) * item.leads + l % item.leads] = sum;
      }
    }
  }
}

// What an element's features are made of.
struct Place {
  int64_t local, row, col;
};

// New accumulators and element features of one element.
template <bool Extended, bool Diag>
__device__ __forceinline__ void read_element(Element<float, Extended>& e, const Live& live,
                                             const Item& item, const Factors& factors,
                                             const Place& at, float scale,
                                             const RuleConstants& rule) {
  float m[K], x[K], y[K];
#pragma unroll
  for (int k = 0; k < K; ++k) m[k] = live.momentum[k * item.numel + at.local];
  const float g = used_gradient(load_as_float(live.grad, grad_type(live), at.local), scale, rule);
  const float p = load_as_float(live.value, value_type(live), at.local);
  common_features<Extended>(e, g, p, m, live.rms[at.local], rule);
  if constexpr (Diag) {
#pragma unroll
    for (int k = 0; k < K; ++k) x[k] = live.row_or_diag[k * item.numel + at.local];
    diag_features<Extended>(e, x, rule);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      x[k] = factors.row_scale[k * factors.rows + at.row];
      y[k] = factors.col_scale[k * factors.cols + at.col];
    }
    factored_features<Extended>(e, x, y);
  }
}

__device__ __forceinline__ Factors factors_on_device(const Item& item, const Live& live,
                                                     const float* factors) {
  const float* at = factors + item.factors_at;
  const int64_t r = K * item.rows, c = K * item.cols;
  return Factors{live.row_or_diag, live.col,       at,        at + r,
                 at + r + c,       at + 2 * r + c, item.rows, item.cols};
}

// sums[s] += squares of what pass B sums, in its order.
template <bool Extended, bool Diag, int N>
__device__ __forceinline__ void add_squares(double (&sums)[N], const Element<float, Extended>& e) {
  using L = Layout<Extended>;
  const auto add = [&](int s, float x) {
    sums[s] += static_cast<double>(x) * static_cast<double>(x);
  };
#pragma unroll
  for (int f = 0; f < L::FIRST_FACTOR; ++f) add(f, e.x[f]);
  if constexpr (Diag) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      add(L::FIRST_FACTOR + k, e.d[k]);
      add(L::FIRST_FACTOR + K + k, factor_rsqrt_of(e.d[k]));
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k)
    add(L::FIRST_FACTOR + (Diag ? 2 * K : 0) + k, e.x[L::FIRST_FACTOR + k]);
}

// Element `index` of a job: its run and column, without a division where a run of the job has a
// power of two of them.
struct JobShape {
  int64_t first_run, first;
  uint32_t columns;
  int shift;

  __device__ __forceinline__ explicit JobShape(const Job& job)
      : first_run(job.first_run),
        first(job.first),
        columns(static_cast<uint32_t>(job.last - job.first)),
        shift(0) {
    while ((1u << shift) < columns) ++shift;
    if ((1u << shift) != columns) shift = -1;
  }
  __device__ __forceinline__ Place place(const Box& box, uint32_t index, int64_t* lead) const {
    const uint32_t r = shift >= 0 ? index >> shift : index / columns;
    const int64_t c = first + (index - r * columns);
    const Run run = find_run(box, first_run + r);
    if (lead) *lead = run.lead + c * box.lead[INNER];
    return Place{run.local + c, run.row + c * box.row[INNER], run.col + c * box.col[INNER]};
  }
};

__device__ __forceinline__ uint32_t job_numel(const Job& job) {
  return static_cast<uint32_t>((job.last_run - job.first_run) * (job.last - job.first));
}

template <bool Extended, bool Diag>
__device__ __forceinline__ constexpr int num_feature_sums() {
  return Diag ? Layout<Extended>::SUMS_DIAG : Layout<Extended>::SUMS_FACTORED;
}

// VeLO's sums of the old accumulators, from sums[first] on: m_k, m_k^2, v, v^2.
template <int first, int N>
__device__ __forceinline__ void add_old(double (&sums)[N], const Live& live, const Item& item,
                                        int64_t at) {
  const double v = live.rms[at];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const double m = live.momentum[k * item.numel + at];
    sums[first + k] += m;
    sums[first + K + k] += m * m;
  }
  sums[first + 2 * K] += v;
  sums[first + 2 * K + 1] += v * v;
}

// With `Moments` those too, behind the others.
template <bool Extended, bool Diag, bool Moments, int N>
__device__ __forceinline__ void sum_job(const PassArgs& args, const Job& job, const Box& box,
                                        const Item& item, const Live& live, double (&sums)[N]) {
  const Factors factors = factors_on_device(item, live, args.factors);
  const float scale = static_cast<float>(args.scale[box.item]);
  const JobShape shape(job);
  const uint32_t numel = job_numel(job);
  for (uint32_t i = threadIdx.x; i < numel; i += blockDim.x) {
    const Place at = shape.place(box, i, nullptr);
    Element<float, Extended> e;
    read_element<Extended, Diag>(e, live, item, factors, at, scale, args.rule);
    add_squares<Extended, Diag>(sums, e);
    if constexpr (Moments) add_old<num_feature_sums<Extended, Diag>()>(sums, live, item, at.local);
  }
}

// The same of those sums alone. Vectors take a turn of their own for them, since the registers are
// full without.
__device__ __forceinline__ void sum_old(const Job& job, const Box& box, const Item& item,
                                        const Live& live, double (&sums)[NUM_MOMENTS - 1]) {
  const JobShape shape(job);
  const uint32_t numel = job_numel(job);
  for (uint32_t i = threadIdx.x; i < numel; i += blockDim.x)
    add_old<0>(sums, live, item, shape.place(box, i, nullptr).local);
}

// The sums of a block to rows first .. first + num of the partial sums of a job.
template <int N>
__device__ __forceinline__ void store_sums(const double (&sums)[N], double (*warp_sums)[8],
                                           const Tables& tables, int64_t job, int first, int num) {
#pragma unroll
  for (int s = 0; s < N; ++s) {
    const double sum = warp_sum(sums[s]);
    if ((threadIdx.x & 31) == 0) warp_sums[s][threadIdx.x >> 5] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < num) {
    double sum = 0.0;
    for (int w = 0; w < 8; ++w) sum += warp_sums[threadIdx.x][w];
    tables.partials[(first + threadIdx.x) * tables.num_jobs + job] = sum;
  }
  __syncthreads();
}

// The sums over the groups of an item's jobs, box after box, by the block that finished the last of
// them.
template <bool Extended, bool Moments>
__device__ __forceinline__ void sum_groups(const PassArgs& args, const Item& item, const Live& live,
                                           const ItemRange& range, int num, int features) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t jobs = args.tables.num_jobs;
  double* to = live.b + item.b_at;
  int64_t j = range.first_job;
  while (j < range.last_job) {
    const int64_t box = args.tables.jobs[j].box;
    int64_t turn = 0;
    for (; j < range.last_job && args.tables.jobs[j].box == box;
         j = args.tables.jobs[j].group_end) {
      const Job& group = args.tables.jobs[j];
      for (int s = 0; s < num; ++s, ++turn) {
        if (turn % warps != warp) continue;
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = j + lane; i < group.group_end; i += 32)
          sum += args.tables.partials[s * jobs + i];
        sum = warp_sum(sum);
        if (lane != 0) continue;
        if (s < features) to[s * item.leads + group.lead] += sum;
        if constexpr (Moments) {
          double* moments = live.b + item.moments_at;
          if (s == Layout<Extended>::P) moments[0] += sum;
          if (s >= features) moments[1 + s - features] += sum;
        }
      }
    }
    __syncthreads();  // the next box may add to the same lead
  }
}

// Matrices so small that a thread sums one, over all boxes that hold a part of it.
template <bool Extended>
__device__ __forceinline__ void sum_small_leads(const PassArgs& args) {
  const Tables& tables = args.tables;
  for (int64_t j = blockIdx.x; j < tables.num_lead_jobs; j += gridDim.x) {
    const LeadJob job = tables.lead_jobs[j];
    const Item& item = tables.items[job.item];
    const Live& live = tables.live[job.item];
    if (!is_active(live)) continue;
    const Factors factors = factors_on_device(item, live, args.factors);
    const float scale = static_cast<float>(args.scale[job.item]);
    for (int64_t lead = job.first + threadIdx.x; lead < job.last; lead += blockDim.x) {
      double sums[num_feature_sums<Extended, false>()] = {};
#pragma unroll 1
      for (int64_t b = item.first_box; b < item.first_box + item.num_boxes; ++b) {
        const Box& box = tables.boxes[b];
        int64_t rest = lead - box.lead_at, numel = box_numel(box);
        Place begin{box.local_at, box.row_at, box.col_at};
        bool here = rest >= 0 && numel > 0;
        for (int d = 0; d < MAX_DIMS && here; ++d) {
          if (box.lead[d] == 0 || box.sizes[d] == 1) continue;
          const int64_t at = rest / box.lead[d];
          here = at < box.sizes[d];
          rest -= at * box.lead[d];
          numel /= box.sizes[d];
          begin.local += at * box.local[d];
          begin.row += at * box.row[d];
          begin.col += at * box.col[d];
        }
        if (!here || rest != 0) continue;
#pragma unroll 1
        for (int64_t i = 0; i < numel; ++i) {
          Place at = begin;
          int64_t index = i;
          for (int d = INNER; d >= 0; --d) {
            if (box.lead[d] != 0 || box.sizes[d] == 1) continue;
            const int64_t x = index % box.sizes[d];
            index /= box.sizes[d];
            at.local += x * box.local[d];
            at.row += x * box.row[d];
            at.col += x * box.col[d];
          }
          Element<float, Extended> e;
          read_element<Extended, false>(e, live, item, factors, at, scale, args.rule);
          add_squares<Extended, false>(sums, e);
        }
      }
#pragma unroll
      for (int s = 0; s < Layout<Extended>::SUMS_FACTORED; ++s)
        live.b[item.b_at + s * item.leads + lead] += sums[s];
    }
  }
}

template <bool Extended, bool Moments>
__global__ void __launch_bounds__(256) feature_kernel(const PassArgs args) {
  constexpr int further = Moments ? NUM_MOMENTS - 1 : 0;
  constexpr int factored = num_feature_sums<Extended, false>(),
                diag = num_feature_sums<Extended, true>();
  constexpr int most = factored + further > diag ? factored + further : diag;
  __shared__ double warp_sums[most][8];
  const Tables& tables = args.tables;
  for (int64_t j = blockIdx.x; j < tables.num_jobs; j += gridDim.x) {
    const Job job = tables.jobs[j];
    const Box& box = tables.boxes[job.box];
    const Item& item = tables.items[box.item];
    const Live& live = tables.live[box.item];
    if (!is_active(live) || has_small_leads(item)) continue;
    double sums[most] = {};
    const int features = item.factored ? factored : diag, num = features + further;
    if (item.factored) {
      sum_job<Extended, false, Moments>(args, job, box, item, live, sums);
      store_sums(sums, warp_sums, tables, j, 0, num);
    } else {
      sum_job<Extended, true, false>(args, job, box, item, live, sums);
      store_sums(sums, warp_sums, tables, j, 0, diag);
      if constexpr (Moments) {
        double old[further] = {};
        sum_old(job, box, item, live, old);
        store_sums(old, warp_sums, tables, j, diag, further);
      }
    }
    const ItemRange range = tables.ranges[box.item];
    if (is_last(&tables.counters[box.item],
                static_cast<unsigned>(range.last_job - range.first_job))) {
      sum_groups<Extended, Moments>(args, item, live, range, num, features);
    }
  }
  if constexpr (!Moments) sum_small_leads<Extended>(args);  // moments are of whole tensors
}

}  // namespace gpu
}  // namespace pylo_dist
