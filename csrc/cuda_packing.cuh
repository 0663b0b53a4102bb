// Gradients copied into a bucket on a GPU, with the least and the largest number of each in the
// same reading. The order of a minimum does not matter: these are the same bits in every run.
#pragma once

#include "cuda_platform.cuh"
#include "packing.h"

namespace pylo_dist {
namespace gpu {

constexpr int COPY_JOB = 1 << 14;  // elements of a row that a block copies before it looks again
constexpr int COPY_THREADS = 256;
constexpr int MOST_PAIRS = 440;

// Of a launch, as the argument of its kernel.
struct Copies {
  Pair pairs[MOST_PAIRS];
  int64_t first_job[MOST_PAIRS + 1];
  int64_t count;
  unsigned* ends;     // two per pair, 0 before, see `rank_of`; `Ends` after the launch
  unsigned* counter;  // 0 before and after
};

inline int64_t jobs_of_row(const Pair& pair) { return (pair.columns + COPY_JOB - 1) / COPY_JOB; }

// A whole number that is larger for a larger float, and largest for NaN; 0 for none.
__device__ __forceinline__ unsigned rank_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  if (x != x) return ~0u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float of_rank(unsigned rank) {
  const unsigned bits = rank == ~0u ? 0x7fffffffu : rank >> 31 ? rank & 0x7fffffffu : ~rank;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// The smaller; NaN if one is NaN.
__device__ __forceinline__ float smaller(float x, float y) {
#if defined(__CUDA_ARCH__)
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x != x || x < y ? x : y;
#endif
}

// As `store_words`, of what is read again at once: by the network.
__device__ __forceinline__ void store_to_send(const uint32_t (&from)[4], void* to) {
#if defined(PYLO_FIBERS)
  fibers::copy_aligned(to, from, to, 16);
#else
  *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
#endif
}

// Eight neighbours, in accesses of 128 bits.
template <int Type>
struct Eight {
  static constexpr int ACCESSES = Type == FLOAT32 ? 2 : 1;
  uint32_t words[ACCESSES][4];

  __device__ __forceinline__ void load(const void* from) {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a)
      load_words(words[a], static_cast<const char*>(from) + 16 * a);
  }
  __device__ __forceinline__ void store(void* to) const {
#pragma unroll
    for (int a = 0; a < ACCESSES; ++a) store_to_send(words[a], static_cast<char*>(to) + 16 * a);
  }
  __device__ __forceinline__ float get(int j) const {
    if constexpr (Type == FLOAT32) {
      float x;
      memcpy(&x, &words[j >> 2][j & 3], 4);
      return x;
    } else {
      const uint16_t bits = static_cast<uint16_t>(words[0][j >> 1] >> (j & 1) * 16);
      return Type == BFLOAT16 ? from_bfloat(bits) : from_half(bits);
    }
  }
  // one after the other, from the first on
  __device__ __forceinline__ void set(int j, float x) {
    if constexpr (Type == FLOAT32) {
      memcpy(&words[j >> 2][j & 3], &x, 4);
    } else {
      const uint32_t bits = Type == BFLOAT16 ? to_bfloat(x) : to_half(x);
      words[0][j >> 1] = j & 1 ? words[0][j >> 1] | bits << 16 : bits;
    }
  }
};

constexpr int COPIES_AT_ONCE = 4;  // of eights, of a thread: 64 or 128 bytes are on their way

// Copies `count` elements; their ends join `lowest` and `highest` of the threads.
template <int From, int To>
__device__ __forceinline__ void copy_run(const void* from_, void* to_, int count, float& lowest,
                                         float& highest) {
  const char* const from = static_cast<const char*>(from_);
  char* const to = static_cast<char*>(to_);
  constexpr int FROM = static_cast<int>(size_of(From)), TO = static_cast<int>(size_of(To));
  // elements before the first at which a store of 128 bits is aligned
  const int ahead = static_cast<int>((16 - reinterpret_cast<uintptr_t>(to) % 16) % 16) / TO;
  const int head = ahead < count ? ahead : count;
  const bool aligned = reinterpret_cast<uintptr_t>(from + head * FROM) % 16 == 0;
  const int eights = aligned ? (count - head) / 8 : 0;
  const auto note = [&](float x) {
    lowest = smaller(lowest, x);
    highest = larger(highest, x);
  };
  const auto copy_eight = [&](const Eight<From>& read, int e) {
    Eight<To> written;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float x = read.get(j);
      note(x);
      if constexpr (From != To) written.set(j, x);
    }
    char* const at = to + (head + int64_t{8} * e) * TO;
    if constexpr (From == To) {
      read.store(at);  // bit by bit, NaN too
    } else {
      written.store(at);
    }
  };
  const char* const first = from + head * FROM;
  int e = static_cast<int>(threadIdx.x);
  for (; e + (COPIES_AT_ONCE - 1) * COPY_THREADS < eights; e += COPIES_AT_ONCE * COPY_THREADS) {
    Eight<From> read[COPIES_AT_ONCE];
#pragma unroll
    for (int k = 0; k < COPIES_AT_ONCE; ++k)
      read[k].load(first + (e + k * COPY_THREADS) * int64_t{8} * FROM);
#pragma unroll
    for (int k = 0; k < COPIES_AT_ONCE; ++k) copy_eight(read[k], e + k * COPY_THREADS);
  }
  for (; e < eights; e += COPY_THREADS) {
    Eight<From> read;
    read.load(first + e * int64_t{8} * FROM);
    copy_eight(read, e);
  }
  const int rest = count - 8 * eights;  // some at the head, some at the tail
  for (int i = static_cast<int>(threadIdx.x); i < rest; i += COPY_THREADS) {
    const int64_t at = i < head ? i : i + int64_t{8} * eights;
    const float x = load_as_float(from, From, at);
    note(x);
    if constexpr (From == To && From != FLOAT32) {
      reinterpret_cast<uint16_t*>(to)[at] = reinterpret_cast<const uint16_t*>(from)[at];
    } else {
      store_float(to, To, at, x);
    }
  }
}

template <int From>
__device__ __forceinline__ void copy_run_to(const void* from, void* to, int to_type, int count,
                                            float& lowest, float& highest) {
  if (to_type == FLOAT32) {
    copy_run<From, FLOAT32>(from, to, count, lowest, highest);
  } else if (to_type == BFLOAT16) {
    copy_run<From, BFLOAT16>(from, to, count, lowest, highest);
  } else {
    copy_run<From, FLOAT16>(from, to, count, lowest, highest);
  }
}

__global__ void __launch_bounds__(COPY_THREADS) copy_kernel(const __grid_constant__ Copies copies) {
  for (int64_t job = blockIdx.x; job < copies.first_job[copies.count]; job += gridDim.x) {
    int64_t p = 0, beyond = copies.count;  // the last pair that begins at this job or before it
    while (beyond - p > 1) {
      const int64_t middle = (p + beyond) / 2;
      if (copies.first_job[middle] <= job) {
        p = middle;
      } else {
        beyond = middle;
      }
    }
    const Pair& pair = copies.pairs[p];
    const int64_t each = (pair.columns + COPY_JOB - 1) / COPY_JOB, here = job - copies.first_job[p];
    const int64_t row = here / each, column = (here - row * each) * COPY_JOB;
    const int count =
        static_cast<int>(pair.columns - column < COPY_JOB ? pair.columns - column : COPY_JOB);
    const void* const from = static_cast<const char*>(pair.from) +
                             (row * pair.from_pitch + column) * size_of(pair.from_type);
    void* const to =
        static_cast<char*>(pair.to) + (row * pair.to_pitch + column) * size_of(pair.to_type);
    float lowest = INFINITY, highest = -INFINITY;
    if (pair.from_type == FLOAT32) {
      copy_run_to<FLOAT32>(from, to, pair.to_type, count, lowest, highest);
    } else if (pair.from_type == BFLOAT16) {
      copy_run_to<BFLOAT16>(from, to, pair.to_type, count, lowest, highest);
    } else {
      copy_run_to<FLOAT16>(from, to, pair.to_type, count, lowest, highest);
    }
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) {
      lowest = smaller(lowest, __shfl_xor_sync(ALL, lowest, step));
      highest = larger(highest, __shfl_xor_sync(ALL, highest, step));
    }
    if (threadIdx.x % 32 == 0) {
      atomicMax(copies.ends + 2 * p, rank_of(-lowest));
      atomicMax(copies.ends + 2 * p + 1, rank_of(highest));
    }
  }
  if (!is_last(copies.counter, gridDim.x)) return;
  for (int64_t i = threadIdx.x; i < 2 * copies.count; i += COPY_THREADS) {
    const float x = of_rank(copies.ends[i]), end = i % 2 == 0 ? -x : x;
    memcpy(copies.ends + i, &end, 4);
  }
}

}  // namespace gpu
}  // namespace pylo_dist
