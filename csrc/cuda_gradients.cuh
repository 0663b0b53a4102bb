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
  const FactorJob* factor_jobs;
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

template <bool Double>
struct GradientSums {
  Sum<Double> squares;
  double beyond = 0.0;
};

// What the audit makes of an item's elements. `usual`: up to here they are neither counted nor
// replaced nor clamped, and their squares fit in the sums.
struct Limits {
  float finite, usual;
  double clamp_square;
  bool replace;
};

template <bool Double>
__device__ __forceinline__ Limits limits_of(const GradientArgs& args, int64_t item) {
  const float finite = static_cast<float>(args.limits[2 * item]);
  const double clamp = args.limits[2 * item + 1];
  const float most = args.replace ? min_(finite, 3.402823466e38f) : finite;
  float clamped = static_cast<float>(clamp);
  if (clamped > clamp) clamped *= 0.9999999f;
  const float usual = min_(most, clamped);
  return Limits{finite, Double ? usual : min_(usual, LARGE), clamp * clamp, args.replace};
}

// g^2 as the factors see it; the audit counts what came. Of any g.
template <bool Double>
__device__ __forceinline__ double square_of(float g, const Limits& limits, int type,
                                            GradientSums<Double>& sums) {
  const float size = fabsf(g);
  sums.beyond += size <= limits.finite ? 0.0 : 1.0;
  if (limits.replace && !(size < INFINITY))
    g = g != g             ? 0.0f
        : type == FLOAT32  ? 3.402823466e38f
        : type == BFLOAT16 ? 3.389531390e38f
                           : 65504.0f;
  const double square = static_cast<double>(g) * static_cast<double>(g);
  sums.squares.add_large(square);
  return min_(square, limits.clamp_square);
}

// The same added to the sums that an element belongs to.
template <bool Double, class... Sums>
__device__ __forceinline__ void add_gradient(float g, const Limits& limits, int type,
                                             GradientSums<Double>& sums, Sums&... to) {
  if (!Double && fabsf(g) <= limits.usual) {
    const auto square = Sum<Double>::square(g);
    sums.squares.add(square);
    (to.add(square), ...);
  } else {
    const double square = square_of(g, limits, type, sums);
    (to.add_large(square), ...);
  }
}

// Four sums over the warp, in a third of the instructions that they take one by one. Lane 8 i gets
// that of x[i].
__device__ __forceinline__ double four_sums(const double (&x)[4], int lane) {
  double two[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const double mine = lane & 16 ? x[2 + i] : x[i], others = lane & 16 ? x[i] : x[2 + i];
    two[i] = mine + __shfl_xor_sync(ALL, others, 16);
  }
  const double mine = lane & 8 ? two[1] : two[0], others = lane & 8 ? two[0] : two[1];
  double sum = mine + __shfl_xor_sync(ALL, others, 8);
#pragma unroll
  for (int step = 4; step > 0; step >>= 1) sum += __shfl_xor_sync(ALL, sum, step);
  return sum;
}

constexpr int TILE_WARPS = 8;

// A tile: the sums along its rows to row_sums, those along its columns to column_sums. The element
// in row r and column c is at + r * step + c of the gradient. A warp has four rows on their way, as
// fours of neighbours unless their Type is ANY_TYPE. Rows in which something is beyond `usual` are
// read again, with care.
template <int Type, bool Double>
__device__ __forceinline__ void sum_tile(const void* grad, int type, int64_t at, int64_t step,
                                         int rows, int columns, const Limits& limits,
                                         double* row_sums, int64_t row_step, double* column_sums,
                                         double* scratch, GradientSums<Double>& sums) {
  constexpr bool fours = Type != ANY_TYPE;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const auto column_of = [&](int j) { return fours ? 4 * lane + j : lane + 32 * j; };
  const char* from =
      static_cast<const char*>(grad) + (at + 4 * warp * step + column_of(0)) * size_of(type);
  Sum<Double> column[4];
#pragma unroll 1
  for (int row = 4 * warp; row < rows; row += 4 * TILE_WARPS) {
    const char* const of_rows = from;
    from += 4 * TILE_WARPS * step * size_of(type);
    if constexpr (fours) {
      Four<Type> x[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < rows && column_of(0) < columns) x[i].load(of_rows, Type, i * step);
      }
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) largest = larger(largest, fabsf(x[i].get(j, Type)));
      }
      if (__all_sync(ALL, largest <= limits.usual)) {
        double of_row[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Sum<Double> of_four;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const auto square = Sum<Double>::square(x[i].get(j, Type));
            of_four.add(square);
            column[j].add(square);
          }
          of_row[i] = of_four.get();
        }
        const double sum = four_sums(of_row, lane);
        if ((lane & 7) == 0 && row + lane / 8 < rows) {
          row_sums[(row + lane / 8) * row_step] = sum;
          sums.squares.add_large(sum);
        }
        continue;
      }
    }
#pragma unroll 1
    for (int i = 0; i < 4 && row + i < rows; ++i) {
      Sum<Double> of_row;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (column_of(j) >= columns) continue;
        const float g = load_as_float(of_rows, type, i * step + column_of(j) - column_of(0));
        add_gradient(g, limits, type, sums, of_row, column[j]);
      }
      const double sum = warp_sum(of_row.get());
      if (lane == 0) row_sums[(row + i) * row_step] = sum;
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) scratch[warp * TILE_COLUMNS + column_of(j)] = column[j].get();
  __syncthreads();
  for (int c = threadIdx.x; c < columns; c += blockDim.x) {
    double sum = 0.0;
#pragma unroll
    for (int w = 0; w < TILE_WARPS; ++w) sum += scratch[w * TILE_COLUMNS + c];
    column_sums[c] = sum;
  }
}

// A job of both sides.
template <bool Double>
__device__ __forceinline__ void sum_both(const Tables& tables, const SideJob& job, const Box& box,
                                         const Live& live, const Limits& limits, double* scratch,
                                         GradientSums<Double>& sums) {
  const int dim = tiled_dim(box), type = grad_type(live);
  const int64_t inner_side = summed_dim(box, ROW) == INNER ? ROW : COLUMN;
  const int64_t first = job.chunk * TILE_ROWS, length = box.sizes[dim];
  const int rows = static_cast<int>(first + TILE_ROWS < length ? TILE_ROWS : length - first),
            columns = static_cast<int>(job.last - job.first);
  // the output of a row among those of the inner side, that of a column among those of the other
  int64_t at = box.local_at + first * box.local[dim] + job.first, row = 0, row_step = 0, runs = 1,
          column = job.first, others = box.sizes[INNER], outer = job.outer;
  for (int d = INNER - 1; d >= 0; --d) {
    if (d == dim) {
      row_step = runs;
      row += first * runs;
    } else if (box.sizes[d] > 1) {
      int64_t j;
      outer = divide(outer, box.sizes[d], j);
      at += j * box.local[d];
      row += j * runs;
      column += j * others;
      others *= box.sizes[d];
    }
    runs *= box.sizes[d];
  }
  double* row_sums =
      side_partials(tables, job.box, inner_side) + job.first / TILE_COLUMNS * runs + row;
  double* column_sums = side_partials(tables, job.box, inner_side == ROW ? COLUMN : ROW) +
                        job.chunk * others + column;
  const int64_t step = box.local[dim];
  const bool fours =
      in_fours(static_cast<const char*>(live.grad) + at * size_of(type), type, columns) &&
      step % 4 == 0;
  const auto sum = [&](auto of_type) {
    sum_tile<decltype(of_type)::value, Double>(live.grad, type, at, step, rows, columns, limits,
                                               row_sums, row_step, column_sums, scratch, sums);
  };
  if (!fours)
    sum(std::integral_constant<int, ANY_TYPE>{});
  else if (type == FLOAT32)
    sum(std::integral_constant<int, FLOAT32>{});
  else if (type == BFLOAT16)
    sum(std::integral_constant<int, BFLOAT16>{});
  else
    sum(std::integral_constant<int, FLOAT16>{});
}

// A job of one side, or of none.
template <bool Double>
__device__ __forceinline__ void sum_side(const Tables& tables, const SideJob& job, const Box& box,
                                         const Live& live, const Limits& limits,
                                         GradientSums<Double>& sums) {
  const int type = grad_type(live), dim = summed_dim(box, job.side);
  const int64_t length = along(box, dim), most = chunk_length(box, dim), first = job.chunk * most;
  const int64_t last = first + most < length ? first + most : length;
  const int64_t outputs = box_numel(box) / length, step = dim < 0 ? 0 : box.local[dim];
  double* to = side_partials(tables, job.box, job.side) + job.chunk * outputs;
  if (dim == INNER) {  // a warp per output
    const int lane = threadIdx.x & 31;
    for (int64_t o = job.first + (threadIdx.x >> 5); o < job.last; o += blockDim.x >> 5) {
      const int64_t at = find_run(box, o).local;
      Sum<Double> of_lane;
#pragma unroll 4
      for (int64_t i = first + lane; i < last; i += 32)
        add_gradient(load_as_float(live.grad, type, at + i), limits, type, sums, of_lane);
      const double sum = warp_sum(of_lane.get());
      if (lane == 0 && job.side != NEITHER) to[o] = sum;
    }
  } else {  // a thread per output
    for (int64_t o = job.first + threadIdx.x; o < job.last; o += blockDim.x) {
      const int64_t at = output_at(box, dim, o);
      Sum<Double> sum;
#pragma unroll 4
      for (int64_t i = first; i < last; ++i)
        add_gradient(load_as_float(live.grad, type, at + i * step), limits, type, sums, sum);
      to[o] = sum.get();
    }
  }
}

__global__ void __launch_bounds__(256, 3)
    gradient_kernel(const __grid_constant__ Head head, const GradientArgs args) {
  __shared__ double scratch[MOST_WARPS], columns[TILE_WARPS * TILE_COLUMNS];
  const Tables& tables = args.tables;
  for (int64_t i = blockIdx.x; i < tables.num_items; i += gridDim.x) keep_live(head, tables, i);
  for (int64_t j = blockIdx.x; j < tables.num_side_jobs; j += gridDim.x) {
    const SideJob job = tables.side_jobs[j];
    const Box& box = tables.boxes[job.box];
    const Live live = live_at(head, tables, box.item);
    if (!is_active(live)) continue;
    make_sums([&](auto is_double) {
      constexpr bool Double = decltype(is_double)::value;
      const Limits limits = limits_of<Double>(args, box.item);
      GradientSums<Double> sums;
      if (job.side == BOTH)
        sum_both<Double>(tables, job, box, live, limits, columns, sums);
      else
        sum_side<Double>(tables, job, box, live, limits, sums);
      if (job.side != COLUMN) {  // the other sides go over every element once
        const double beyond = block_sum(sums.beyond, scratch),
                     squares = block_sum(sums.squares.get(), scratch);
        if (threadIdx.x == 0) {
          tables.partials[2 * j] = beyond;
          tables.partials[2 * j + 1] = squares;
        }
      }
      return true;  // what is large is added in double
    });
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

// Of the old accumulators, to sums[first] and on: m_k, m_k^2, v, v^2.
template <int first, bool Double, int N>
__device__ __forceinline__ void add_old(Sum<Double> (&sums)[N], const float (&m)[K], float v) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    sums[first + k].add(m[k]);
    sums[first + K + k].add_square(m[k]);
  }
  sums[first + 2 * K].add(v);
  sums[first + 2 * K + 1].add_square(v);
}

template <int State>
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
    make_sums([&](auto is_double) {
      constexpr bool Double = decltype(is_double)::value;
      Sum<Double> sums[NUM_MOMENTS];
      for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) {
        float m[K];
#pragma unroll
        for (int k = 0; k < K; ++k) m[k] = load_as_float(it.momentum, State, k * numel + i);
        sums[0].add_square(load_as_float(it.value, value_type(it), i));
        add_old<1>(sums, m, load_as_float(it.rms, State, i));
#pragma unroll
        for (int s = 0; s < NUM_MOMENTS; ++s) sums[s].settle();
      }
      if (!Double && __syncthreads_or(!are_good(sums))) return false;
#pragma unroll
      for (int s = 0; s < NUM_MOMENTS; ++s) {
        const double sum = block_sum(sums[s].get(), scratch);
        if (threadIdx.x == 0) partials[NUM_MOMENTS * j + s] = sum;
      }
      return true;
    });
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
