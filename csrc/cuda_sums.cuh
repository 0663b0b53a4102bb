// Passes A and B and the sums between them on a GPU. Every sum is made of partial sums per job, added in the order of the table in
// double: no atomics on floating point, the same bits in every run.
#pragma once

#include "cuda_platform.cuh"
#include "cuda_tables.h"

namespace pylo_dist {
namespace gpu {

// A table or a part of it on its way to the device, as the argument of a kernel: it needs no memory on the host that would have to
// live on, and a CUDA graph keeps its copy.
constexpr int UPLOAD_WORDS = 4000;
struct Upload {
  int64_t words[UPLOAD_WORDS];
};

__global__ void upload(const __grid_constant__ Upload from, int64_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.words[i];
}

__device__ __forceinline__ bool is_active(const Live& live) { return live.types >> 4 & 1; }
__device__ __forceinline__ int value_type(const Live& live) { return static_cast<int>(live.types & 3); }
__device__ __forceinline__ int grad_type(const Live& live) { return static_cast<int>(live.types >> 2 & 3); }

// Pointers into the workspace.
struct Tables {
  Live* live;
  unsigned* counters;
  const Item* items;
  const Box* boxes;
  const Job* jobs;
  const SideJob* side_jobs;
  const int64_t* side_at;
  const EntryJob* entry_jobs;
  const LeadJob* lead_jobs;
  const ItemRange* ranges;
  const int64_t* normalisers_at;
  float* normalisers;
  uint32_t* networks;
  double* partials;
  int64_t num_items, num_jobs, num_side_jobs, num_entry_jobs, num_lead_jobs;
};

// What changes from call to call, as an argument of the first kernel of a pass: a word per item, its gradient with the types in the upper
// byte (0: not active), then, if the pass writes directions, a word per item with that pointer. Words that do not fit in are in
// `further` already. All else about an item is in the workspace since it last changed.
struct Head {
  Upload upload;
  int64_t items, directions;  // how many words of each kind
  const int64_t* further;
};

__device__ __forceinline__ int64_t head_word(const Head& head, int64_t at) {
  return at < UPLOAD_WORDS ? head.upload.words[at] : head.further[at - UPLOAD_WORDS];
}

__device__ __forceinline__ Live live_at(const Head& head, const Tables& tables, int64_t i) {
  const int64_t word = head_word(head, i);
  Live live = tables.live[i];
  live.grad = reinterpret_cast<const void*>(word & GRAD_BITS);
  live.types = word >> GRAD_SHIFT;
  live.direction = i < head.directions ? reinterpret_cast<float*>(head_word(head, head.items + i)) : nullptr;
  return live;
}

// Item i's words to its row, for the kernels after the first, by a thread.
__device__ __forceinline__ void keep_live(const Head& head, const Tables& tables, int64_t i) {
  if (threadIdx.x != 0) return;
  const Live now = live_at(head, tables, i);
  tables.live[i].grad = now.grad;
  tables.live[i].types = now.types;
  tables.live[i].direction = now.direction;
}

// ------------------------------------------------------------------------------------------------ pass A

struct GradientArgs {
  Tables tables;
  const double* limits;  // (items, 2)
  bool replace;
};

// In `partials`: the audits of all side jobs, two numbers each, then what the sides of the boxes sum, (chunks, outputs).
__device__ __forceinline__ double* side_partials(const Tables& tables, int64_t box, int64_t side) {
  return tables.partials + 2 * tables.num_side_jobs + (side == NEITHER ? 0 : tables.side_at[2 * box + side]);
}

struct GradientSums {
  double squares = 0.0, beyond = 0.0;
};

// g^2 as the factors see it; the audit counts what came.
__device__ __forceinline__ double square_of(float g, float limit, double clamp_square, bool replace, int type, GradientSums& sums) {
  const float size = fabsf(g);
  sums.beyond += size <= limit ? 0.0 : 1.0;
  if (replace && !(size < INFINITY)) g = g != g ? 0.0f : type == FLOAT32 ? 3.402823466e38f : type == BFLOAT16 ? 3.389531390e38f : 65504.0f;
  const double square = static_cast<double>(g) * static_cast<double>(g);
  sums.squares += square;
  return min_(square, clamp_square);
}

__global__ void __launch_bounds__(256) gradient_kernel(const __grid_constant__ Head head, const GradientArgs args) {
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.tables;
  for (int64_t i = blockIdx.x; i < tables.num_items; i += gridDim.x) keep_live(head, tables, i);
  for (int64_t j = blockIdx.x; j < tables.num_side_jobs; j += gridDim.x) {
    const SideJob job = tables.side_jobs[j];
    const Box& box = tables.boxes[job.box];
    const Live live = live_at(head, tables, box.item);
    if (!is_active(live)) continue;
    const float limit = static_cast<float>(args.limits[2 * box.item]);
    const double clamp = args.limits[2 * box.item + 1], clamp_square = clamp * clamp;
    const int type = grad_type(live), dim = summed_dim(box, job.side);
    const int64_t length = along(box, dim), first = job.chunk * chunk_length(dim);
    const int64_t last = first + chunk_length(dim) < length ? first + chunk_length(dim) : length;
    const int64_t outputs = box_numel(box) / length, step = dim < 0 ? 0 : box.local[dim];
    double* to = side_partials(tables, job.box, job.side) + job.chunk * outputs;
    GradientSums sums;
    if (dim == INNER) {  // a warp per output
      const int lane = threadIdx.x & 31;
      for (int64_t o = job.first_output + (threadIdx.x >> 5); o < job.last_output; o += blockDim.x >> 5) {
        const int64_t at = find_run(box, o).local;
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = first + lane; i < last; i += 32) {
          sum += square_of(load_as_float(live.grad, type, at + i), limit, clamp_square, args.replace, type, sums);
        }
        sum = warp_sum(sum);
        if (lane == 0 && job.side != NEITHER) to[o] = sum;
      }
    } else {  // a thread per output
      for (int64_t o = job.first_output + threadIdx.x; o < job.last_output; o += blockDim.x) {
        const int64_t at = output_at(box, dim, o);
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = first; i < last; ++i) {
          sum += square_of(load_as_float(live.grad, type, at + i * step), limit, clamp_square, args.replace, type, sums);
        }
        to[o] = sum;
      }
    }
    if (job.side != COLUMN) {  // the other sides go over every element once
      const double beyond = block_sum(sums.beyond, scratch), squares = block_sum(sums.squares, scratch);
      if (threadIdx.x == 0) {
        tables.partials[2 * j] = beyond;
        tables.partials[2 * j + 1] = squares;
      }
    }
  }
}

// Second stage: the sums of an item from those of its jobs.
__global__ void __launch_bounds__(256) entry_kernel(const GradientArgs args) {
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.tables;
  const EntryJob job = tables.entry_jobs[blockIdx.x];
  const Live& live = tables.live[job.item];
  if (!is_active(live)) return;
  const Item& item = tables.items[job.item];
  if (job.side == NEITHER) {
    const ItemRange range = tables.ranges[job.item];
    double beyond = 0.0, squares = 0.0;
    for (int64_t j = range.first_side_job + threadIdx.x; j < range.last_side_job; j += blockDim.x) {
      if (tables.side_jobs[j].side == COLUMN) continue;
      beyond += tables.partials[2 * j];
      squares += tables.partials[2 * j + 1];
    }
    beyond = block_sum(beyond, scratch);
    squares = block_sum(squares, scratch);
    if (threadIdx.x == 0) {
      live.a[item.a_audit + AUDIT_NONFINITE] += beyond;
      live.a[item.a_audit + AUDIT_SQUARES] += squares;
    }
    return;
  }
  double* to = live.a + item.a_at + (job.side == ROW ? 0 : item.rows);
  for (int64_t entry = job.first + threadIdx.x; entry < job.last; entry += blockDim.x) {
    double sum = 0.0;
    for (int64_t b = item.first_box; b < item.first_box + item.num_boxes; ++b) {
      const Box& box = tables.boxes[b];
      if (box_numel(box) == 0) continue;
      const int dim = summed_dim(box, job.side);
      const int64_t o = output_of_entry(box, job.side, dim, entry);
      if (o < 0) continue;
      const int64_t outputs = box_numel(box) / along(box, dim), chunks = num_chunks(box, dim);
      const double* from = side_partials(tables, b, job.side) + o;
#pragma unroll 8
      for (int64_t c = 0; c < chunks; ++c) sum += from[c * outputs];
    }
    to[entry] += sum;
  }
}

// ------------------------------------------------------- VeLO's moments, of items that pass B leaves out

__global__ void __launch_bounds__(256) moment_kernel(
    const __grid_constant__ Head head, const Tables tables, const int64_t* first_job, unsigned* counters, double* partials) {
  __shared__ double scratch[MOST_WARPS];
  const int num_items = static_cast<int>(tables.num_items);
  for (int64_t j = blockIdx.x; j < first_job[num_items]; j += gridDim.x) {
    int low = 0, high = num_items;  // first_job[low] <= j < first_job[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_job[middle] <= j) low = middle;
      else high = middle;
    }
    const Live it = live_at(head, tables, low);
    if (!is_active(it)) continue;
    const int64_t numel = tables.items[low].numel, first = (j - first_job[low]) * MOMENT_JOB;
    const int64_t last = first + MOMENT_JOB < numel ? first + MOMENT_JOB : numel;
    double sums[NUM_MOMENTS] = {};
    for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
      const double p = load_as_float(it.value, value_type(it), i), v = it.rms[i];
      sums[0] += p * p;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const double m = it.momentum[k * numel + i];
        sums[1 + k] += m;
        sums[4 + k] += m * m;
      }
      sums[7] += v;
      sums[8] += v * v;
    }
#pragma unroll
    for (int s = 0; s < NUM_MOMENTS; ++s) {
      const double sum = block_sum(sums[s], scratch);
      if (threadIdx.x == 0) partials[NUM_MOMENTS * j + s] = sum;
    }
    if (is_last(&counters[low], static_cast<unsigned>(first_job[low + 1] - first_job[low]))) {
      if (threadIdx.x < NUM_MOMENTS) {
        double sum = 0.0;
        for (int64_t i = first_job[low]; i < first_job[low + 1]; ++i) sum += partials[NUM_MOMENTS * i + threadIdx.x];
        it.b[tables.items[low].moments_at + threadIdx.x] += sum;
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ pass B

struct PassArgs {
  Tables tables;
  RuleConstants rule;
  const bool* keep;
  const double* scale;
  float* factors;
  double* squares;
};

// The mean over the middle of row (outer, middle, inner), and from it the row's scale. `lanes` threads share a mean.
__device__ __forceinline__ void scale_rows(const Item& item, const float* row, float* to, int64_t group, int thread, int threads, double* scratch) {
  const int64_t at = group / item.row_inner * item.size_d1 * item.row_inner + group % item.row_inner;
  double sum = 0.0;
  for (int64_t i = thread; i < item.size_d1; i += threads) sum += row[at + i * item.row_inner];
  sum = scratch ? block_sum(sum, scratch) : warp_sum(sum);
  const float mean = static_cast<float>(sum / static_cast<double>(item.size_d1));
  for (int64_t i = thread; i < item.size_d1; i += threads) {
    to[at + i * item.row_inner] = row_scale_of(row[at + i * item.row_inner], mean);
  }
}

// Sum over the elements of a lead of the squares of a factor, by one warp.
__device__ __forceinline__ double lead_square(const Item& item, const float* x, bool is_row, int64_t lead, int lane) {
  const int64_t* strides = is_row ? item.lead_row : item.lead_col;
  const int64_t* matrix = is_row ? item.matrix_row : item.matrix_col;
  int64_t at = 0;
  for (int d = MAX_LEAD_DIMS - 1; d >= 0; --d) {
    at += lead % item.lead_sizes[d] * strides[d];
    lead /= item.lead_sizes[d];
  }
  const int64_t rows = matrix[0] ? item.matrix_sizes[0] : 1, cols = matrix[1] ? item.matrix_sizes[1] : 1;
  double sum = 0.0;
  for (int64_t i = lane; i < rows * cols; i += 32) {
    const double value = x[at + i / cols * matrix[0] + i % cols * matrix[1]];
    sum += value * value;
  }
  return warp_sum(sum) * (static_cast<double>(item.lead_numel) / static_cast<double>(rows * cols));
}

// One block per item: the factors' new state, and everything the passes read of them.
__global__ void __launch_bounds__(512, 1) factor_kernel(const __grid_constant__ Head head, const PassArgs args) {
  __shared__ double scratch[MOST_WARPS];
  const int64_t i = blockIdx.x;
  keep_live(head, args.tables, i);
  const Live live = live_at(head, args.tables, i);
  const Item& item = args.tables.items[i];
  if (!is_active(live) || !item.factored) return;
  float *row = live.row_or_diag, *col = live.col;
  float* row_scale = args.factors + item.factors_at;
  float *col_scale = row_scale + K * item.rows, *row_rsqrt = col_scale + K * item.cols, *col_rsqrt = row_rsqrt + K * item.rows;
  const double *row_sums = live.a + item.a_at, *col_sums = row_sums + item.rows;
  const double by = args.scale[i] * args.scale[i];
  const double row_by = by / static_cast<double>(item.size_d0), col_by = by / static_cast<double>(item.size_d1);
  const bool keep = args.keep[i];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  double* squares = args.squares + item.squares_at;
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    float *row_k = row + k * item.rows, *col_k = col + k * item.cols;
    double row_square = 0.0, row_rsqrt_square = 0.0, col_square = 0.0, col_rsqrt_square = 0.0;
    for (int64_t r = threadIdx.x; r < item.rows; r += blockDim.x) {
      float x = row_k[r];
      if (keep) row_k[r] = x = update_factor(x, row_sums[r] * row_by, k, args.rule);
      const float rsqrt = factor_rsqrt_of(x);
      row_rsqrt[k * item.rows + r] = rsqrt;
      row_square += static_cast<double>(x) * x;
      row_rsqrt_square += static_cast<double>(rsqrt) * rsqrt;
    }
    for (int64_t c = threadIdx.x; c < item.cols; c += blockDim.x) {
      float x = col_k[c];
      if (keep) col_k[c] = x = update_factor(x, col_sums[c] * col_by, k, args.rule);
      const float rsqrt = factor_rsqrt_of(x);
      col_rsqrt[k * item.cols + c] = rsqrt;
      col_scale[k * item.cols + c] = col_scale_of(x);
      col_square += static_cast<double>(x) * x;
      col_rsqrt_square += static_cast<double>(rsqrt) * rsqrt;
    }
    if (item.leads == 1) {
      const double row_times = static_cast<double>(item.lead_numel) / static_cast<double>(item.rows);
      const double col_times = static_cast<double>(item.lead_numel) / static_cast<double>(item.cols);
      const double sums[4] = {
          block_sum(row_square, scratch) * row_times, block_sum(col_square, scratch) * col_times,
          block_sum(row_rsqrt_square, scratch) * row_times, block_sum(col_rsqrt_square, scratch) * col_times};
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
      for (int64_t g = warp; g < groups; g += warps) scale_rows(item, row_k, row_scale + k * item.rows, g, lane, 32, nullptr);
    }
    if (item.leads > 1) {
      for (int64_t l = warp; l < 4 * item.leads; l += warps) {
        const int s = static_cast<int>(l / item.leads);
        const bool is_row = s % 2 == 0;
        const float* x = is_row ? (s == 0 ? row_k : row_rsqrt + k * item.rows) : (s == 1 ? col_k : col_rsqrt + k * item.cols);
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
__device__ __forceinline__ void read_element(
    Element<float, Extended>& e, const Live& live, const Item& item, const Factors& factors, const Place& at, float scale,
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

__device__ __forceinline__ Factors factors_on_device(const Item& item, const Live& live, const float* factors) {
  const float* at = factors + item.factors_at;
  const int64_t r = K * item.rows, c = K * item.cols;
  return Factors{live.row_or_diag, live.col, at, at + r, at + r + c, at + 2 * r + c, item.rows, item.cols};
}

// sums[s] += squares of what pass B sums, in its order.
template <bool Extended, bool Diag, int N>
__device__ __forceinline__ void add_squares(double (&sums)[N], const Element<float, Extended>& e) {
  using L = Layout<Extended>;
  const auto add = [&](int s, float x) { sums[s] += static_cast<double>(x) * static_cast<double>(x); };
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
  for (int k = 0; k < K; ++k) add(L::FIRST_FACTOR + (Diag ? 2 * K : 0) + k, e.x[L::FIRST_FACTOR + k]);
}

// Element `index` of a job: its run and column, without a division where a run of the job has a power of two of them.
struct JobShape {
  int64_t first_run, first;
  uint32_t columns;
  int shift;

  __device__ __forceinline__ explicit JobShape(const Job& job)
      : first_run(job.first_run), first(job.first), columns(static_cast<uint32_t>(job.last - job.first)), shift(0) {
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
__device__ __forceinline__ void add_old(double (&sums)[N], const Live& live, const Item& item, int64_t at) {
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
__device__ __forceinline__ void sum_job(
    const PassArgs& args, const Job& job, const Box& box, const Item& item, const Live& live, double (&sums)[N]) {
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

// The same of those sums alone. Vectors take a turn of their own for them, since the registers are full without.
__device__ __forceinline__ void sum_old(
    const Job& job, const Box& box, const Item& item, const Live& live, double (&sums)[NUM_MOMENTS - 1]) {
  const JobShape shape(job);
  const uint32_t numel = job_numel(job);
  for (uint32_t i = threadIdx.x; i < numel; i += blockDim.x) add_old<0>(sums, live, item, shape.place(box, i, nullptr).local);
}

// The sums of a block to rows first .. first + num of the partial sums of a job.
template <int N>
__device__ __forceinline__ void store_sums(
    const double (&sums)[N], double (*warp_sums)[8], const Tables& tables, int64_t job, int first, int num) {
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

// The sums over the groups of an item's jobs, box after box, by the block that finished the last of them.
template <bool Extended, bool Moments>
__device__ __forceinline__ void sum_groups(
    const PassArgs& args, const Item& item, const Live& live, const ItemRange& range, int num, int features) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t jobs = args.tables.num_jobs;
  double* to = live.b + item.b_at;
  int64_t j = range.first_job;
  while (j < range.last_job) {
    const int64_t box = args.tables.jobs[j].box;
    int64_t turn = 0;
    for (; j < range.last_job && args.tables.jobs[j].box == box; j = args.tables.jobs[j].group_end) {
      const Job& group = args.tables.jobs[j];
      for (int s = 0; s < num; ++s, ++turn) {
        if (turn % warps != warp) continue;
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = j + lane; i < group.group_end; i += 32) sum += args.tables.partials[s * jobs + i];
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
      for (int s = 0; s < Layout<Extended>::SUMS_FACTORED; ++s) live.b[item.b_at + s * item.leads + lead] += sums[s];
    }
  }
}

template <bool Extended, bool Moments>
__global__ void __launch_bounds__(256) feature_kernel(const PassArgs args) {
  constexpr int further = Moments ? NUM_MOMENTS - 1 : 0;
  constexpr int factored = num_feature_sums<Extended, false>(), diag = num_feature_sums<Extended, true>();
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
    if (is_last(&tables.counters[box.item], static_cast<unsigned>(range.last_job - range.first_job))) {
      sum_groups<Extended, Moments>(args, item, live, range, num, features);
    }
  }
  if constexpr (!Moments) sum_small_leads<Extended>(args);  // moments are of whole tensors
}

}  // namespace gpu
}  // namespace pylo_dist
