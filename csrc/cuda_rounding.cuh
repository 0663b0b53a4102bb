// How pass C on a GPU writes momentum and rms: as float32, or in bfloat16, rounded with the random
// bits of rounding.h. `State` is the dtype that a kernel is made for.
#pragma once

#include "cuda_runs.cuh"
#include "pylo_dist/rounding.h"

namespace pylo_dist {
namespace gpu {

__device__ __forceinline__ uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// Element i of a state; random: the 16 bits that it is rounded with where it is.
template <int State>
__device__ __forceinline__ void store_state(void* to, int64_t i, float x, uint32_t random) {
  if constexpr (State == FLOAT32)
    static_cast<float*>(to)[i] = x;
  else
    static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(round_to_bfloat16(bits_of(x), random));
}

// Of the runs of a job, which elements of their whole tensor they are, where state is rounded.
template <int State>
struct Draws {
  __device__ __forceinline__ bool are_neighbours() const { return true; }
};

template <>
struct Draws<BFLOAT16> {
  const Item* item;
  uint32_t key, of_pairs[2];  // of seed and step, and of the pairs of slots
  bool together;              // whether a run's are, and those keys are right for all runs
  uint32_t first[MOST_RUNS];  // number of a run's first element, its lower word

  __device__ __forceinline__ bool are_neighbours() const { return together; }

  // The word of a pair for the element in a column of a run, where they are.
  __device__ __forceinline__ uint32_t word(int pair, int run, int column) const {
    return mix(first[run] + of_pairs[pair] + static_cast<uint32_t>(column));
  }
  // The same wherever elements are; at: where it lies in local memory.
  __device__ __forceinline__ uint32_t word_at(int pair, int64_t at) const {
    const int64_t index = global_index(*item, at);
    return mix(static_cast<uint32_t>(index) + key_of(key, static_cast<uint32_t>(pair), index));
  }
};

// The runs of a job of pass C, in shared memory.
template <int N, int State>
struct UpdateRuns : Runs<N>, Draws<State> {
  // By a whole block, as that of `Runs`. keys: of the items, where state is rounded.
  template <class Number>
  __device__ __forceinline__ void set(const Live& live, const Item& item, const Box& box,
                                      const Job& job, const Factors& factors, float of_item,
                                      const int64_t* keys, const Number& number) {
    Runs<N>::template set<State>(live, item, box, job, factors, of_item, number);
    if constexpr (State == BFLOAT16) {
      const int64_t begin = global_index(item, this->at[0].local);
      bool apart = false;
      for (int r = threadIdx.x; r < this->count; r += blockDim.x) {
        const int64_t local = this->at[r].local, index = global_index(item, local);
        this->first[r] = static_cast<uint32_t>(index);
        apart |= !share_a_key(begin, index) || !neighbours(item, local, this->columns);
      }
      apart = __syncthreads_or(apart);
      if (threadIdx.x == 0) {
        this->item = &item;
        this->key = static_cast<uint32_t>(keys[box.item]);
        this->together = !apart;
        for (uint32_t pair = 0; pair < 2; ++pair)
          this->of_pairs[pair] = key_of(this->key, pair, begin);
      }
      __syncthreads();
    }
  }
};

// The half of a word that an even or an odd slot takes.
__device__ __forceinline__ uint32_t half_of(uint32_t word, bool odd) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(word, 0, odd ? 0x4432 : 0x4410);
#else
  return odd ? random_of(word, 1) : random_of(word, 0);
#endif
}

// What is below this is rounded by adding and cutting off alone; NaN is not.
constexpr float LARGEST_BFLOAT = 3.38953139e38f;

__device__ __forceinline__ bool is_usual(float x) { return fabsf(x) < LARGEST_BFLOAT; }

// Two numbers in bfloat16, rounded with 16 random bits each; `Usual`: they are.
template <bool Usual>
__device__ __forceinline__ uint32_t round_two(float x, float y, uint32_t of_x, uint32_t of_y) {
  const uint32_t a = bits_of(x), b = bits_of(y);
  if (!Usual) return round_to_bfloat16(a, of_x) | round_to_bfloat16(b, of_y) << 16;
#if defined(__CUDA_ARCH__)
  return __byte_perm(a + of_x, b + of_y, 0x7632);
#else
  return (a + of_x) >> 16 | ((b + of_y) & 0xffff0000u);
#endif
}

// New momenta and mean squares, in the order of their slots, of the four elements of a run from a
// column on, which lie from `at` on.
template <bool Usual, int N>
__device__ __forceinline__ void store_rounded(const UpdateRuns<N, BFLOAT16>& runs, int run,
                                              int column, int64_t at, const float (&x)[K + 1][4]) {
  uint32_t words[2][4];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
    for (int j = 0; j < 4; ++j) words[pair][j] = runs.word(pair, run, column + j);
  }
#pragma unroll
  for (int slot = 0; slot <= K; ++slot) {
    const uint32_t (&word)[4] = words[slot / 2];
    Four<BFLOAT16> four;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      four.words[j / 2] = round_two<Usual>(x[slot][j], x[slot][j + 1], random_of(word[j], slot),
                                           random_of(word[j + 1], slot));
    }
    four.store(runs.means[slot], BFLOAT16, at);
  }
}

template <int State, int N>
__device__ __forceinline__ void store_means(const UpdateRuns<N, State>& runs, int run, int column,
                                            int64_t at, const float (&x)[K + 1][4]) {
  if constexpr (State == FLOAT32) {
#pragma unroll
    for (int slot = 0; slot <= K; ++slot) {
      Four<FLOAT32> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.set(j, x[slot][j], FLOAT32);
      four.store(runs.means[slot], FLOAT32, at);
    }
  } else {
    keep_in_memory();  // words are made when they are used
    bool usual = true;
#pragma unroll
    for (int i = 0; i < 4 * (K + 1); ++i) usual &= is_usual(x[i / 4][i % 4]);
    if (usual)
      store_rounded<true>(runs, run, column, at, x);
    else
      store_rounded<false>(runs, run, column, at, x);
  }
}

}  // namespace gpu
}  // namespace pylo_dist
