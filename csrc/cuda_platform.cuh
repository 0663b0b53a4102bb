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

#include <type_traits>

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

constexpr int ANY_TYPE = -1;

// Whole accesses, which must be aligned to their size. What they bring is not needed before long,
// nor soon again.
__device__ __forceinline__ void load_words(uint32_t (&to)[2], const void* from) {
#if defined(PYLO_FIBERS)
  fibers::copy_aligned(to, from, from, 8);
#else
  const uint2 x = __ldcs(static_cast<const uint2*>(from));
  to[0] = x.x;
  to[1] = x.y;
#endif
}
__device__ __forceinline__ void load_words(uint32_t (&to)[4], const void* from) {
#if defined(PYLO_FIBERS)
  fibers::copy_aligned(to, from, from, 16);
#else
  const uint4 x = __ldcs(static_cast<const uint4*>(from));
  to[0] = x.x;
  to[1] = x.y;
  to[2] = x.z;
  to[3] = x.w;
#endif
}
__device__ __forceinline__ void store_words(const uint32_t (&from)[2], void* to) {
#if defined(PYLO_FIBERS)
  fibers::copy_aligned(to, from, to, 8);
#else
  __stcs(static_cast<uint2*>(to), make_uint2(from[0], from[1]));
#endif
}
__device__ __forceinline__ void store_words(const uint32_t (&from)[4], void* to) {
#if defined(PYLO_FIBERS)
  fibers::copy_aligned(to, from, to, 16);
#else
  __stcs(static_cast<uint4*>(to), make_uint4(from[0], from[1], from[2], from[3]));
#endif
}

__device__ __forceinline__ constexpr int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

// Four neighbours in memory as one access, of a type known here or (ANY_TYPE) only when it runs.
// They become floats when they are used, so that further accesses can be on their way.
template <int Type>
struct Four {
  uint32_t words[Type == BFLOAT16 || Type == FLOAT16 ? 2 : 4];

  __device__ __forceinline__ static int type_of(int type) { return Type == ANY_TYPE ? type : Type; }
  // from element `at` of a tensor on
  __device__ __forceinline__ void load(const void* tensor, int type, int64_t at) {
    const char* from = static_cast<const char*>(tensor) + at * size_of(type_of(type));
    if constexpr (Type == ANY_TYPE) {
      if (type == FLOAT32) {
        load_words(words, from);
      } else {
        uint32_t two[2];
        load_words(two, from);
        words[0] = two[0];
        words[1] = two[1];
      }
    } else {
      load_words(words, from);
    }
  }
  __device__ __forceinline__ void store(void* tensor, int type, int64_t at) const {
    char* to = static_cast<char*>(tensor) + at * size_of(type_of(type));
    if constexpr (Type == ANY_TYPE) {
      if (type == FLOAT32) {
        store_words(words, to);
      } else {
        const uint32_t two[2] = {words[0], words[1]};
        store_words(two, to);
      }
    } else {
      store_words(words, to);
    }
  }
  __device__ __forceinline__ float get(int j, int type) const {
    if (type_of(type) == FLOAT32) {
      float x;
      memcpy(&x, &words[j], 4);
      return x;
    }
    if constexpr (Type == BFLOAT16) {  // the number is one half of the float
      const uint32_t whole = j & 1 ? words[j >> 1] & 0xffff0000u : words[j >> 1] << 16;
      float x;
      memcpy(&x, &whole, 4);
      return x;
    }
    const uint16_t bits = static_cast<uint16_t>(words[j >> 1] >> (j & 1) * 16);
    return type_of(type) == BFLOAT16 ? from_bfloat(bits) : from_half(bits);
  }
  // one after the other, from the first on
  __device__ __forceinline__ void set(int j, float x, int type) {
    if (type_of(type) == FLOAT32) {
      memcpy(&words[j], &x, 4);
    } else {
      const uint32_t bits = type_of(type) == BFLOAT16 ? to_bfloat(x) : to_half(x);
      words[j >> 1] = j & 1 ? words[j >> 1] | bits << 16 : bits;
    }
  }
};

// A sum over elements, of a thread, as the card computes it: in double where that is at half the
// rate of float (QUICK_DOUBLE), else in two floats, of which an addition is ten instructions and
// not one that takes the time of sixty-four.
template <bool Double>
struct Sum;

template <>
struct Sum<true> {
  double whole = 0.0;

  __device__ __forceinline__ static double square(float x) {
    return static_cast<double>(x) * static_cast<double>(x);
  }
  __device__ __forceinline__ void add(double x) { whole += x; }
  __device__ __forceinline__ void add_square(float x) { whole += square(x); }
  __device__ __forceinline__ void add_large(double x) { whole += x; }
  __device__ __forceinline__ void settle() {}
  __device__ __forceinline__ bool is_good() const { return true; }
  __device__ __forceinline__ double get() const { return whole; }
};

// With u = 2^-24: a square is high + low to the last bit unless it is below 2^-102 (then to
// 2^-149), and high + low of a sum lose nothing but in `low`, which is rounded: of n additions,
// settled after every four at most, 8 n u^2 of the sum of all sizes (n^2 u^2 where it never is),
// 2^-38 for the 128 of a thread in pass B, 2^-40 for the 16 in a tile of A. What does not fit in a
// float leaves a sum that is not good, which must be made again in double, or goes to `large`.
template <>
struct Sum<false> {
  float high = 0.0f, low = 0.0f;
  double large = 0.0;

  struct Square {
    float high, low;
  };
  __device__ __forceinline__ static Square square(float x) {
    const float high = __fmul_rn(x, x);
    return Square{high, __fmaf_rn(x, x, -high)};
  }
  // never contracted, or the errors were of other sums
  __device__ __forceinline__ void add(Square x) {
    const float sum = __fadd_rn(high, x.high), part = __fsub_rn(sum, high),
                error = __fadd_rn(__fsub_rn(high, __fsub_rn(sum, part)), __fsub_rn(x.high, part));
    high = sum;
    low = __fadd_rn(low, __fadd_rn(error, x.low));
  }
  __device__ __forceinline__ void add(float x) { add(Square{x, 0.0f}); }
  __device__ __forceinline__ void add_square(float x) { add(square(x)); }
  __device__ __forceinline__ void add_large(double x) { large += x; }
  __device__ __forceinline__ void settle() {
    const float sum = __fadd_rn(high, low);
    low = __fsub_rn(low, __fsub_rn(sum, high));
    high = sum;
  }
  __device__ __forceinline__ bool is_good() const { return fabsf(high + low) <= 3.402823466e38f; }
  __device__ __forceinline__ double get() const {
    return large + (static_cast<double>(high) + static_cast<double>(low));
  }
};
constexpr float LARGE = 3.6028797e16f;  // 2^55: so many squares of smaller ones fit in a float

#if defined(__CUDA_ARCH__)
constexpr bool QUICK_DOUBLE = __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000;
#else
constexpr bool QUICK_DOUBLE = true;
#endif

// attempt(Double) makes sums and says whether they are good; those in double are.
template <class Attempt>
__device__ __forceinline__ void make_sums(const Attempt& attempt) {
#if defined(PYLO_FIBERS)
  if (fibers::two_floats && attempt(std::false_type{})) return;
#else
  if constexpr (!QUICK_DOUBLE) {
    if (attempt(std::false_type{})) return;
  }
#endif
  attempt(std::true_type{});
}

// A thread's sum of squares that cannot be made again.
struct LastingSum {
  Sum<true> whole;
  Sum<false> pair;

  __device__ __forceinline__ void add_square(float x) {
#if defined(PYLO_FIBERS)
    const bool in_floats = fibers::two_floats;
#else
    constexpr bool in_floats = !QUICK_DOUBLE;
#endif
    if (in_floats && fabsf(x) <= LARGE) {
      pair.add_square(x);
      pair.settle();
    } else {
      whole.add_square(x);
    }
  }
  __device__ __forceinline__ double get() const { return whole.get() + pair.get(); }
};

template <bool Double, int N>
__device__ __forceinline__ bool are_good(const Sum<Double> (&sums)[N]) {
  bool good = true;
#pragma unroll
  for (int s = 0; s < N; ++s) good = good && sums[s].is_good();
  return good;
}

// Whether all of count elements from `from` on can be taken as fours.
__device__ __forceinline__ bool in_fours(const void* from, int type, int64_t count) {
  return reinterpret_cast<uintptr_t>(from) % (4 * size_of(type)) == 0 && count % 4 == 0;
}

// The larger; NaN if one is NaN.
__device__ __forceinline__ float larger(float x, float y) {
#if defined(__CUDA_ARCH__)
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x != x || x > y ? x : y;
#endif
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

// Which job this block does: the next that none has taken, of `count`, one for every block. A job
// that waits for others comes after them; so whoever waits, the others have begun, on blocks that
// wait for nobody, however many blocks the device holds at a time and in whatever order they begin.
__device__ __forceinline__ int64_t take_turn(unsigned* queue, unsigned count) {
  __shared__ unsigned turn;
  if (threadIdx.x == 0) {
    turn = atomicAdd(queue, 1u);
    if (turn == count - 1) *queue = 0;
  }
  __syncthreads();
  return turn;
}

// Waits until `count` jobs have arrived at a counter; what they wrote before is then visible.
__device__ __forceinline__ void wait_for(unsigned* counter, unsigned count) {
  if (threadIdx.x == 0) {
    while (atomicAdd(counter, 0u) < count) __nanosleep(100);
  }
  __syncthreads();
  __threadfence();
}

// One of `all` jobs is done; the last leaves the counter at 0.
__device__ __forceinline__ void arrive(unsigned* counter, unsigned all) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(counter, 1u) + 1 == all) *counter = 0;
}

}  // namespace gpu
}  // namespace pylo_dist
