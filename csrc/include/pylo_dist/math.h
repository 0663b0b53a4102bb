// Arithmetic shared by host and device: float here, the CPU's vectors in csrc/vector.h. No torch,
// no CUDA include.
//
// Nothing is contracted behind our back (-ffp-contract=off): where a product and a sum are rounded
// once, fma_ says so. So one formula has one sequence of roundings on a given machine. NaN goes
// through max_, min_ and clamp_ as it does through torch's clamp: write no fmaxf, which drops it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYLO_HD __host__ __device__ __forceinline__
#else
#define PYLO_HD inline __attribute__((always_inline))
#endif

// The same inline functions are compiled for several instruction sets and linked together: each has
// its own namespace.
#ifndef PYLO_ISA
#define PYLO_ISA portable
#endif

namespace pylo_dist {
inline namespace PYLO_ISA {

// a * b + c, rounded once where the machine can (always on a GPU, emulated ones too, and with AVX2
// or AVX-512; twice on a baseline CPU, where the fused operation would be a library call).
PYLO_HD float fma_(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(PYLO_FIBERS) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// x in every lane of T.
template <class T>
PYLO_HD T splat_(float x);

template <>
PYLO_HD float splat_<float>(float x) {
  return x;
}

PYLO_HD float sqrt_(float x) { return __builtin_sqrtf(x); }

// x, but at least floor; NaN stays NaN.
PYLO_HD float max_(float x, float floor) { return x < floor ? floor : x; }

// x, but at most ceiling; NaN stays NaN.
PYLO_HD float min_(float x, float ceiling) { return x > ceiling ? ceiling : x; }

PYLO_HD double min_(double x, double ceiling) { return x > ceiling ? ceiling : x; }

template <class T>
PYLO_HD T clamp_(T x, float bound) {
  return max_(min_(x, bound), -bound);
}

template <class T>
PYLO_HD T relu_(T x) {
  return max_(x, 0.0f);
}

// 1 / sqrt(x), both correctly rounded: torch's rsqrt on a CPU.
template <class T>
PYLO_HD T rsqrt_(T x) {
  return 1.0f / sqrt_(x);
}
#if defined(__CUDA_ARCH__)
// To 2 ulp, as torch's rsqrt on a GPU; the correctly rounded one takes some thirty instructions and
// a branch.
PYLO_HD float rsqrt_(float x) { return rsqrtf(x); }
#endif

// exp(x) to 1 ulp or so: 2^n e^r, |r| <= log(2)/2, a Taylor polynomial of degree 7 (its remainder
// is 5e-9 of the result). Overflows to inf and underflows through the subnormals to 0; NaN stays
// NaN.
constexpr float ROUND_TO_INTEGER = 12582912.0f;  // 1.5 * 2^23: a float of this size has no fraction
constexpr uint32_t ROUND_TO_INTEGER_BITS = 0x4B400000u;

// y * 2^n, n = rounded - ROUND_TO_INTEGER an integer within -200 .. 200 (anything where y is NaN).
// In two factors, so that each is a normal number.
PYLO_HD float scale2_(float y, float rounded) {
  uint32_t bits;
  __builtin_memcpy(&bits, &rounded, 4);
  const int32_t n = static_cast<int32_t>(bits - ROUND_TO_INTEGER_BITS), half = n >> 1;
  const uint32_t first = static_cast<uint32_t>(half + 127) << 23,
                 second = static_cast<uint32_t>(n - half + 127) << 23;
  float powers[2];  // one by one: as a whole it would be in memory on a GPU
  __builtin_memcpy(&powers[0], &first, 4);
  __builtin_memcpy(&powers[1], &second, 4);
  return y * powers[0] * powers[1];
}

template <class T>
PYLO_HD T exp_(T x) {
  const T bounded = max_(min_(x, 90.0f), -106.0f);  // e^90 is inf, e^-106 is 0 in float
  const T rounded = fma_(bounded, splat_<T>(1.44269504088896341f), splat_<T>(ROUND_TO_INTEGER));
  const T n = rounded - ROUND_TO_INTEGER;
  // log 2 in two parts, the first exact in 10 bits
  T r = fma_(n, splat_<T>(-0.693359375f), bounded);
  r = fma_(n, splat_<T>(2.12194440e-4f), r);
  T y = splat_<T>(1.98412698e-4f);  // 1/7!
  y = fma_(y, r, splat_<T>(1.38888889e-3f));
  y = fma_(y, r, splat_<T>(8.33333333e-3f));
  y = fma_(y, r, splat_<T>(4.16666667e-2f));
  y = fma_(y, r, splat_<T>(1.66666667e-1f));
  y = fma_(y, r, splat_<T>(0.5f));
  y = fma_(y, r, splat_<T>(1.0f));
  y = fma_(y, r, splat_<T>(1.0f));
  return scale2_(y, rounded);
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
