// What the GPU kernels need of their platform: CUDA, or (PYLO_FIBERS) the emulation in
// tests/maths/fibers.h, which runs blocks one after the other and the threads of a block as fibers,
// so that the same kernels and launchers run on a CPU.
#pragma once

#if defined(PYLO_FIBERS)
#include "fibers.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "pylo_dist/lanes.h"
#include "pylo_dist/mlp.h"

namespace pylo_dist {
namespace gpu {

constexpr unsigned ALL = 0xffffffffu;

__device__ __forceinline__ float from_bfloat(uint16_t x) {
  return __bfloat162float(__ushort_as_bfloat16(x));
}
__device__ __forceinline__ uint16_t to_bfloat(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ __forceinline__ float from_half(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t to_half(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

// Element i of a tensor of one of the three dtypes.
__device__ __forceinline__ float load_as_float(const void* from, int type, int64_t i) {
  if (type == FLOAT32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return type == BFLOAT16 ? from_bfloat(bits) : from_half(bits);
}

__device__ __forceinline__ void store_float(void* to, int type, int64_t i, float x) {
  if (type == FLOAT32) {
    static_cast<float*>(to)[i] = x;
  } else {
    static_cast<uint16_t*>(to)[i] = type == BFLOAT16 ? to_bfloat(x) : to_half(x);
  }
}

// The sum over a warp, the same bits in every run; all lanes get it.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(ALL, x, step);
  return x;
}

constexpr int MOST_WARPS = 16;

// The sum over a block, the same bits in every run; all threads get it. `scratch` (MOST_WARPS) may
// be used again at once.
__device__ __forceinline__ double block_sum(double x, double* scratch) {
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = x;
  __syncthreads();
  double sum = 0.0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Whether this block is the last of `count` to get here; what the others wrote before is then
// visible. `counter` is 0 before the first and after the last. The same answer in all threads.
__device__ __forceinline__ bool is_last(unsigned* counter, unsigned count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) + 1 == count;
    if (last) *counter = 0;
  }
  __syncthreads();
  const bool answer = last;
  __syncthreads();
  if (answer) __threadfence();
  return answer;
}

}  // namespace gpu
}  // namespace pylo_dist
