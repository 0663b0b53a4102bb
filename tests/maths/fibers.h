// CUDA's execution model on a CPU, as much of it as csrc/*.cuh uses: blocks one after the other,
// the threads of a block as fibers that give way at barriers and warp operations. Exact in what is
// computed, but for the sums inside tensor cores (EmulatedWarp of emulated_warp.h).
#pragma once

#include <csetjmp>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "half.h"

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace pylo_dist {
namespace lanes {
struct Accumulator;
struct Left;
struct Right;
}  // namespace lanes
}  // namespace pylo_dist

namespace fibers {

// What lanes.h asks of a warp; defined in fibers.cpp.
void mma(pylo_dist::lanes::Accumulator&, const pylo_dist::lanes::Left&,
         const pylo_dist::lanes::Right&);

struct Dim {
  unsigned x = 0;
};

struct Thread {
  ucontext_t start;  // used once; later switches are jumps, which ask the kernel for nothing
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
};

struct Barrier {
  int arrived = 0, waiting_for = 0;
  int64_t generation = 0;
};

constexpr int STACK = 1 << 18, WARP = 32;

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  jmp_buf scheduler;
  int running = 0;
  std::function<void()> body;
  double slots[1024];  // what the lanes of a warp show each other
  void* operands[1024][3];
};

inline Block* block = nullptr;
inline int64_t launches = 0;  // since the library was loaded
// Which machine this is: blocks that it runs at a time, and whether it is slow in double.
inline int most_blocks = 3;
inline bool two_floats = false;

inline void yield() {
  if (_setjmp(block->threads[block->running].context) == 0) _longjmp(block->scheduler, 1);
}

inline void resume(Thread& thread) {
  if (_setjmp(block->scheduler) != 0) return;
  if (thread.started) _longjmp(thread.context, 1);
  thread.started = true;
  setcontext(&thread.start);
}

inline void wait(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.waiting_for) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void warp_wait() { wait(block->warps[block->running / WARP]); }

}  // namespace fibers

inline fibers::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {

inline void run_thread() {
  block->body();
  block->threads[block->running].done = true;
  _longjmp(block->scheduler, 1);
}

inline void launch(int blocks, int threads, const std::function<void()>& body) {
  if (threads % WARP != 0 || threads > 1024) std::abort();
  ++launches;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  static Block the_block;
  block = &the_block;
  block->threads.resize(static_cast<size_t>(threads));
  block->body = body;
  for (int b = 0; b < blocks; ++b) {
    blockIdx.x = static_cast<unsigned>(b);
    block->all = Barrier{0, threads, 0};
    block->warps.assign(static_cast<size_t>(threads / WARP), Barrier{0, WARP, 0});
    for (Thread& thread : block->threads) {
      if (!thread.stack) thread.stack.reset(new char[STACK]);
      thread.started = thread.done = false;
      getcontext(&thread.start);
      thread.start.uc_stack.ss_sp = thread.stack.get();
      thread.start.uc_stack.ss_size = STACK;
      thread.start.uc_link = nullptr;
      makecontext(&thread.start, run_thread, 0);
    }
    for (int left = threads; left > 0;) {
      for (int t = 0; t < threads; ++t) {
        if (block->threads[t].done) continue;
        block->running = t;
        threadIdx.x = static_cast<unsigned>(t);
        resume(block->threads[t]);
        left -= block->threads[t].done;
      }
    }
  }
}

// An access of a whole vector: a GPU stops at one that is not aligned to its size.
inline void copy_aligned(void* to, const void* from, const void* memory, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) std::abort();
  std::memcpy(to, from, bytes);
}

// x of another lane of the warp
template <class T>
T exchange(T x, int lane) {
  static_assert(sizeof(T) <= sizeof(double), "a slot is a double");
  Block& b = *block;
  const int me = b.running, first = me / WARP * WARP;
  std::memcpy(&b.slots[me], &x, sizeof(T));
  warp_wait();
  T other;
  std::memcpy(&other, &b.slots[first + lane], sizeof(T));
  warp_wait();
  return other;
}

}  // namespace fibers

inline void __syncthreads() { fibers::wait(fibers::block->all); }
inline void __syncwarp() { fibers::warp_wait(); }
inline int __syncthreads_or(int x) {
  static int any;
  any = 0;
  __syncthreads();
  if (x) any = 1;
  __syncthreads();
  const int answer = any;
  __syncthreads();
  return answer;
}
inline void __threadfence() {}
// Blocks run one after the other: one that waits for another has got ahead of it.
inline void __nanosleep(unsigned) { std::abort(); }

template <class T>
T __shfl_xor_sync(unsigned, T x, int mask) {
  return fibers::exchange(x, static_cast<int>(threadIdx.x % 32) ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return fibers::exchange(x, lane);
}

inline unsigned __ballot_sync(unsigned, bool x) {
  unsigned all = x ? 1u << threadIdx.x % 32 : 0;
  for (int step = 16; step > 0; step >>= 1) all |= __shfl_xor_sync(0, all, step);
  return all;
}

inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned atomicAdd(unsigned* at, unsigned by) {
  const unsigned old = *at;
  *at += by;
  return old;
}

inline unsigned atomicMax(unsigned* at, unsigned x) {
  const unsigned old = *at;
  if (x > old) *at = x;
  return old;
}

// The 16 bits of a number as a number of that type, and back; the types are their bits here.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return __half{bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return half::from_half(x.bits); }
inline __half __float2half_rn(float x) { return __half{half::to_half(x)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return __nv_bfloat16{bits}; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline float __bfloat162float(__nv_bfloat16 x) { return half::from_bfloat(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16{half::to_bfloat(x)}; }
