// How warps of passes B and C go over the runs of a job, four elements a lane, in boxes whose runs
// are long and have one factor along them.
#pragma once

#include "cuda_gradients.cuh"

namespace pylo_dist {
namespace gpu {

// What is in memory stays there: without this all that a loop reads is loaded before it, and
// spilled.
__device__ __forceinline__ void keep_in_memory() { asm volatile("" ::: "memory"); }

// threadIdx.x, read anew: where registers are full it is not kept for this.
__device__ __forceinline__ unsigned thread_again() {
#if defined(__CUDA_ARCH__)
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
#else
  return threadIdx.x;
#endif
}

// K numbers of the four columns of every lane of a warp, out of the registers' way: two neighbours
// are one access. Of the scales the squares, where sums are in double.
using KeptNumber = std::conditional_t<QUICK_DOUBLE, double, float>;
struct Kept {
  alignas(16) KeptNumber pairs[K][2][32][2];
  int64_t vectors[32];  // what they are of

  __device__ __forceinline__ int64_t& vector() { return vectors[threadIdx.x & 31]; }

  __device__ __forceinline__ KeptNumber& at(int k, int j) {
    return pairs[k][j >> 1][threadIdx.x & 31][j & 1];
  }
};

// A lane's column j of the 128 that a warp takes of a run: neighbours where it takes them together.
template <bool Fours>
__device__ __forceinline__ int lane_column(int j) {
  const int lane = threadIdx.x & 31;
  return Fours ? 4 * lane + j : lane + 32 * j;
}

// What the warps of a block read of a job with long runs, in shared memory: where the tensors and
// the runs are, and N numbers of every run. More than registers would hold beside a pass's own.
template <int N>
struct Runs {
  const void* grad;
  void* value;
  void* means[K + 1];  // momenta, and last the mean square
  float* direction;
  // the factor that changes along a run, from the job's first column on, and the other: scales, and
  // the features of a side
  const float *vector[K], *constant[K], *vector_side[2 * K], *constant_side[2 * K];
  int64_t vector_step;
  float scale;
  int grad_type, value_type, columns, count;
  struct {
    int64_t local, vector;  // its first element of the job, and the factor that changes along it
  } at[MOST_RUNS];
  alignas(16) float numbers[MOST_RUNS][N];

  // The scale of decay k in a lane's column j, of a run whose vector begins there.
  template <bool Fours>
  __device__ __forceinline__ float along(int k, int j, int64_t begin) const {
    const int column = lane_column<Fours>(j);
    return column < columns ? vector[k][begin + column * vector_step] : 0.0f;
  }

  // By a whole block. number(constant, numbers): those of a run, from where its constant factor is.
  template <int State, class Number>
  __device__ __forceinline__ void set(const Live& live, const Item& item, const Box& box,
                                      const Job& job, const Factors& factors, float of_item,
                                      const Number& number) {
    const bool row_varies = box.row[INNER] != 0;
    __syncthreads();  // nobody reads the last job's
    if (threadIdx.x == 0) {
      grad = live.grad;
      value = live.value;
      means[K] = live.rms;
      direction = live.direction;
      vector_step = row_varies ? box.row[INNER] : box.col[INNER];
      scale = of_item;
      grad_type = pylo_dist::gpu::grad_type(live);
      value_type = pylo_dist::gpu::value_type(live);
      columns = static_cast<int>(job.last - job.first);
      count = static_cast<int>(job.last_run - job.first_run);
      for (int k = 0; k < K; ++k) {
        const int64_t row = k * factors.rows, col = k * factors.cols;
        const auto sides = [&](const float*& along, const float*& across, const float* of_row,
                               const float* of_col) {
          along = (row_varies ? of_row + row : of_col + col) + job.first * vector_step;
          across = row_varies ? of_col + col : of_row + row;
        };
        means[k] = static_cast<char*>(live.momentum) + k * item.numel * size_of(State);
        sides(vector[k], constant[k], factors.row_scale, factors.col_scale);
        sides(vector_side[k], constant_side[k], factors.row, factors.col);
        sides(vector_side[K + k], constant_side[K + k], factors.row_rsqrt, factors.col_rsqrt);
      }
    }
    __syncthreads();
    for (int r = threadIdx.x; r < count; r += blockDim.x) {
      const Run run = find_run(box, job.first_run + r);
      at[r].local = run.local + job.first;
      at[r].vector = row_varies ? run.row : run.col;
      number(row_varies ? run.col : run.row, numbers[r]);
    }
    __syncthreads();
  }
};

// What a lane reads of four neighbours.
template <int Type, int State>
struct ElementFours {
  Four<Type> g, p;
  Four<State> v, m[K];

  // from element `at` on
  template <int N>
  __device__ __forceinline__ void load(const Runs<N>& runs, int g_type, int p_type, int64_t at) {
    g.load(runs.grad, g_type, at);
    p.load(runs.value, p_type, at);
    v.load(runs.means[K], State, at);
#pragma unroll
    for (int k = 0; k < K; ++k) m[k].load(runs.means[k], State, at);
  }
};

// Whether all four-element accesses of a job are aligned, in state and, of their types, value and
// gradient.
template <int State>
__device__ __forceinline__ bool in_fours(const Live& live, const Item& item, const Box& box,
                                         const Job& job) {
  int64_t all = item.numel | (box.local_at + job.first) | (job.last - job.first);
  for (int d = 0; d < INNER; ++d) all |= box.sizes[d] > 1 ? box.local[d] : 0;
  return in_fours(live.value, value_type(live), all) && in_fours(live.grad, grad_type(live), all) &&
         in_fours(live.momentum, State, all) && in_fours(live.rms, State, all);
}

}  // namespace gpu
}  // namespace pylo_dist
