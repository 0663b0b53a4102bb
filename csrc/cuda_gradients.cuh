// Pass A on a GPU, VeLO's moments of tensors at rest, and what all first kernels of a pass are
// told. Every sum is made of partial sums per job, added in the order of the table in double: no
// atomics on floating point, the same bits in every run.
#pragma once

#include "cuda_platform.cuh"
#include "cuda_tables.h"

namespace pylo_dist {
namespace gpu {

// A table or a part of it on its way to the device, as the argument of a kernel: it needs no memory
// on the host that would have to live on, and a CUDA graph keeps its copy.
constexpr int UPLOAD_WORDS = 4000;
struct Upload {
  int64_t words[UPLOAD_WORDS];
};

__global__ void upload(const __grid_constant__ Upload from, int64_t* to, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.words[i];
}

__device__ __forceinline__ bool is_active(const Live& live) { return live.types >> 4 & 1; }
__device__ __forceinline__ int value_type(const Live& live) {
  return static_cast<int>(live.types & 3);
}
__device__ __forceinline__ int grad_type(const Live& live) {
  return static_cast<int>(live.types >> 2 & 3);
}

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

// What changes from call to call, as an argument of the first kernel of a pass: a word per item,
// its gradient with the types in the upper byte (0: not active), then, if the pass writes
// directions, a word per item with that pointer. Words that do not fit in are in `further` already.
// All else about an item is in the workspace since it last changed.
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
  live.direction =
      i < head.directions ? reinterpret_cast<float*>(head_word(head, head.items + i)) : nullptr;
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

// ------------------------------------------------------------------------------------------ pass A

struct GradientArgs {
  Tables tables;
  const double* limits;  // (items, 2)
  bool replace;
};

// In `partials`: the audits of all side jobs, two numbers each, then what the sides of the boxes
// sum, (chunks, outputs).
__device__ __forceinline__ double* side_partials(const Tables& tables, int64_t box, int64_t side) {
  return tables.partials + 2 * tables.num_side_jobs +
         (side == NEITHER ? 0 : tables.side_at[2 * box + side]);
}

struct GradientSums {
  double squares = 0.0, beyond = 0.0;
};

// g^2 as the factors see it; the audit counts what came.
__device__ __forceinline__ double square_of(float g, float limit, double clamp_square, bool replace,
                                            int type, GradientSums& sums) {
  const float size = fabsf(g);
  sums.beyond += size <= limit ? 0.0 : 1.0;
  if (replace && !(size < INFINITY))
    g = g != g             ? 0.0f
        : type == FLOAT32  ? 3.402823466e38f
        : type == BFLOAT16 ? 3.389531390e38f
                           : 65504.0f;
  const double square = static_cast<double>(g) * static_cast<double>(g);
  sums.squares += square;
  return min_(square, clamp_square);
}

__global__ void __launch_bounds__(256)
    gradient_kernel(const __grid_constant__ Head head, const GradientArgs args) {
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
      for (int64_t o = job.first_output + (threadIdx.x >> 5); o < job.last_output;
           o += blockDim.x >> 5) {
        const int64_t at = find_run(box, o).local;
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = first + lane; i < last; i += 32) {
          sum += square_of(load_as_float(live.grad, type, at + i), limit, clamp_square,
                           args.replace, type, sums);
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
          sum += square_of(load_as_float(live.grad, type, at + i * step), limit, clamp_square,
                           args.replace, type, sums);
        }
        to[o] = sum;
      }
    }
    if (job.side != COLUMN) {  // the other sides go over every element once
      const double beyond = block_sum(sums.beyond, scratch),
                   squares = block_sum(sums.squares, scratch);
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

// ------------------------------------------------- VeLO's moments, of items that pass B leaves out

__global__ void __launch_bounds__(256)
    moment_kernel(const __grid_constant__ Head head, const Tables tables, const int64_t* first_job,
                  unsigned* counters, double* partials) {
  __shared__ double scratch[MOST_WARPS];
  const int num_items = static_cast<int>(tables.num_items);
  for (int64_t j = blockIdx.x; j < first_job[num_items]; j += gridDim.x) {
    int low = 0, high = num_items;  // first_job[low] <= j < first_job[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_job[middle] <= j)
        low = middle;
      else
        high = middle;
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
        for (int64_t i = first_job[low]; i < first_job[low + 1]; ++i)
          sum += partials[NUM_MOMENTS * i + threadIdx.x];
        it.b[tables.items[low].moments_at + threadIdx.x] += sum;
      }
    }
  }
}

}  // namespace gpu
}  // namespace pylo_dist
