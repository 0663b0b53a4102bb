// What one core can do at most: twelve independent chains of fused multiply-adds in registers.
// bench_step.py compiles and calls it.
#include <cstdint>

namespace {

constexpr int CHAINS =
    12;  // latency times throughput of today's cores, and no more than there are registers

template <class V>
__attribute__((always_inline)) inline float run(int64_t rounds) {
  V sums[CHAINS], by = V{} + 0.9999f, more = V{} + 1e-3f;
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) sums[i] = V{} + 0.1f * static_cast<float>(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * by + more;  // contracted: see the flags
  }
  float total = 0.0f;
#pragma GCC unroll 12
  for (int i = 0; i < CHAINS; ++i) total += sums[i][0];
  return total;
}

typedef float Vec4 __attribute__((vector_size(16)));

}  // namespace

#if defined(__x86_64__)
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));
__attribute__((target("avx512f"))) static float run_avx512(int64_t rounds) {
  return run<Vec16>(rounds);
}
__attribute__((target("avx2,fma"))) static float run_avx2(int64_t rounds) {
  return run<Vec8>(rounds);
}
#endif

// Runs that many rounds and gives the floating-point operations they took; `out` keeps the compiler
// honest.
extern "C" double fma_flops(int64_t rounds, float* out) {
  double width = 4;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) {
    *out = run_avx512(rounds);
    width = 16;
  } else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    *out = run_avx2(rounds);
    width = 8;
  } else
#endif
    *out = run<Vec4>(rounds);
  return 2.0 * width * CHAINS * static_cast<double>(rounds);
}
