// AdamW's step of many tensors on a GPU, and sums of squares: one launch for ADAMW_ENTRIES tensors,
// which travel with their pointers as its argument.
#pragma once

#include "cuda_platform.cuh"
#include "pylo_dist/adamw.h"

namespace pylo_dist {
namespace gpu {

#if defined(PYLO_SMALL_JOBS)
constexpr int64_t ADAMW_JOB = 700;
constexpr int ADAMW_ENTRIES = 6;
#else
constexpr int64_t ADAMW_JOB = 16384;  // elements
constexpr int ADAMW_ENTRIES = 300;    // of a launch
#endif

struct AdamWEntry {
  AdamWTensors t;
  int64_t item, entry;  // of the batch; of the call
  int64_t first_job;
};

// A launch: jobs of ADAMW_JOB elements, at least one of every entry.
struct AdamWHead {
  AdamWEntry entries[ADAMW_ENTRIES];
  int64_t num_entries, num_jobs;
};

// What is alike in all launches of a call; the partial sums and counters of one are those of the
// next.
struct AdamWArgs {
  AdamWRule rule;
  const AdamWNumbers* numbers;
  const bool* moves;
  const double* scale;
  const int64_t* keys;
  double* sums;  // of an item: of (p_new - p)^2; of an entry: of p^2
  double* partials;
  unsigned* counters;
};

inline int64_t adamw_jobs(int64_t numel) {
  return numel > ADAMW_JOB ? (numel + ADAMW_JOB - 1) / ADAMW_JOB : 1;
}

inline int64_t adamw_bytes(int64_t jobs) { return 8 * jobs + 4 * ADAMW_ENTRIES; }

// Sums of work(entry, first, last), the part of a thread, over the jobs of every entry, to
// args.sums[place(entry)]: in the order of threads and jobs, so that bits do not depend on the
// number of blocks.
template <class Place, class Work>
__device__ __forceinline__ void sum_jobs(const AdamWHead& head, const AdamWArgs& args,
                                         const Place& place, const Work& work) {
  __shared__ double scratch[MOST_WARPS];
  for (int64_t j = blockIdx.x; j < head.num_jobs; j += gridDim.x) {
    int low = 0, high = static_cast<int>(head.num_entries);  // first_job of low <= j < of high
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (head.entries[middle].first_job <= j)
        low = middle;
      else
        high = middle;
    }
    const AdamWEntry& entry = head.entries[low];
    const int64_t begin = entry.first_job,
                  end = high < head.num_entries ? head.entries[high].first_job : head.num_jobs;
    const int64_t first = (j - begin) * ADAMW_JOB;
    const int64_t last = first + ADAMW_JOB < entry.t.numel ? first + ADAMW_JOB : entry.t.numel;
    const double sum = block_sum(work(entry, first, last), scratch);
    if (threadIdx.x == 0) args.partials[j] = sum;
    if (!is_last(&args.counters[low], static_cast<unsigned>(end - begin))) continue;
    double whole = 0.0;
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) whole += args.partials[i];
    whole = block_sum(whole, scratch);
    if (threadIdx.x == 0) args.sums[place(entry)] = whole;
  }
}

__device__ __forceinline__ uint16_t rounded(float x, uint32_t random) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(round_to_bfloat16(bits, random));
}

// Elements first .. last of a tensor by a block, N = 1 or 4 neighbours a thread; what does not fill
// N is left. State, Type: dtype of the state, of value and gradient (ANY_TYPE: known when it runs).
template <int N, int State, int Type>
__device__ __forceinline__ void move_elements(const AdamWTensors& t, const AdamWRule& rule,
                                              const AdamWNumbers& numbers, float scale,
                                              AdamWWords& words, int64_t first, int64_t last,
                                              LastingSum& sum) {
  const int value_type = static_cast<int>(t.value_type), grad_type = static_cast<int>(t.grad_type);
#pragma unroll 1
  for (int64_t i = first + N * threadIdx.x; i + N <= last; i += N * blockDim.x) {
    Four<Type> g4, p4;
    Four<State> m4, v4;
    if constexpr (N == 4) {
      g4.load(t.grad, grad_type, i);
      p4.load(t.value, value_type, i);
      m4.load(t.mean, State, i);
      v4.load(t.square, State, i);
    }
    Four<Type> new_p;
    Four<State> new_m, new_v;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float p = N == 4 ? p4.get(j, value_type) : load_as_float(t.value, value_type, i),
                  g = N == 4 ? g4.get(j, grad_type) : load_as_float(t.grad, grad_type, i),
                  m = N == 4 ? m4.get(j, State) : load_as_float(t.mean, State, i),
                  v = N == 4 ? v4.get(j, State) : load_as_float(t.square, State, i);
      const AdamWElement<float> e = adamw_of(p, g, m, v, scale, rule, numbers);
      sum.add_square(e.value - p);
      if constexpr (N == 4) {
        new_p.set(j, e.value, value_type);
      } else {
        store_float(t.value, value_type, i, e.value);
      }
      if constexpr (State == FLOAT32) {
        if constexpr (N == 4) {
          new_m.set(j, e.mean, FLOAT32);
          new_v.set(j, e.square, FLOAT32);
        } else {
          static_cast<float*>(t.mean)[i] = e.mean;
          static_cast<float*>(t.square)[i] = e.square;
        }
      } else {
        const uint32_t word = words.get(number_of(t.shard, i + j));
        const uint16_t mean = rounded(e.mean, word & 0xffffu),
                       square = rounded(e.square, word >> 16);
        if constexpr (N == 4) {
          const auto put = [j](uint32_t (&to)[2], uint32_t bits) {
            to[j >> 1] = j & 1 ? to[j >> 1] | bits << 16 : bits;
          };
          put(new_m.words, mean);
          put(new_v.words, square);
        } else {
          static_cast<uint16_t*>(t.mean)[i] = mean;
          static_cast<uint16_t*>(t.square)[i] = square;
        }
      }
    }
    if constexpr (N == 4) {
      new_p.store(t.value, value_type, i);
      new_m.store(t.mean, State, i);
      new_v.store(t.square, State, i);
    }
  }
}

template <int State>
__global__ void __launch_bounds__(256)
    adamw_kernel(const __grid_constant__ AdamWHead head, const AdamWArgs args) {
  const auto place = [](const AdamWEntry& entry) { return entry.item; };
  sum_jobs(head, args, place, [&](const AdamWEntry& entry, int64_t first, int64_t last) {
    const AdamWTensors& t = entry.t;
    LastingSum sum;
    if (!args.moves[entry.item]) return sum.get();
    const AdamWNumbers numbers = args.numbers[entry.entry];
    const float scale = static_cast<float>(args.scale[entry.item]);
    AdamWWords words(State == FLOAT32 ? 0u : static_cast<uint32_t>(args.keys[entry.item]));
    const int value_type = static_cast<int>(t.value_type),
              grad_type = static_cast<int>(t.grad_type);
    const bool fours = in_fours(t.value, value_type, 0) && in_fours(t.grad, grad_type, 0) &&
                       in_fours(t.mean, State, 0) && in_fours(t.square, State, 0);
    int64_t rest = first;
    if (fours) {
      rest = last - (last - first) % 4;
      if (value_type == FLOAT32 && grad_type == FLOAT32)
        move_elements<4, State, FLOAT32>(t, args.rule, numbers, scale, words, first, rest, sum);
      else
        move_elements<4, State, ANY_TYPE>(t, args.rule, numbers, scale, words, first, rest, sum);
    }
    move_elements<1, State, ANY_TYPE>(t, args.rule, numbers, scale, words, rest, last, sum);
    return sum.get();
  });
}

__global__ void __launch_bounds__(256)
    square_kernel(const __grid_constant__ AdamWHead head, const AdamWArgs args) {
  const auto place = [](const AdamWEntry& entry) { return entry.entry; };
  sum_jobs(head, args, place, [](const AdamWEntry& entry, int64_t first, int64_t last) {
    const AdamWTensors& t = entry.t;
    const int type = static_cast<int>(t.value_type);
    LastingSum sum;
    int64_t rest = first;
    if (in_fours(t.value, type, 0)) {
      rest = last - (last - first) % 4;
#pragma unroll 1
      for (int64_t i = first + 4 * threadIdx.x; i < rest; i += 4 * blockDim.x) {
        Four<ANY_TYPE> x;
        x.load(t.value, type, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.add_square(x.get(j, type));
      }
    }
    for (int64_t i = rest + threadIdx.x; i < last; i += blockDim.x)
      sum.add_square(load_as_float(t.value, type, i));
    return sum.get();
  });
}

}  // namespace gpu
}  // namespace pylo_dist
