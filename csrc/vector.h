// One CPU register of floats, Vec, with the functions that the shared headers ask of a float. Its
// width is that of the instruction set this file is compiled for; without AVX it is plain C++ that
// any compiler turns into what the machine has.
#pragma once

#include <cstring>

#include "pylo_dist/mlp.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pylo_dist {
inline namespace PYLO_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float RawVec __attribute__((vector_size(4 * W)));
typedef int32_t RawInt __attribute__((vector_size(4 * W)));
typedef uint32_t RawUint __attribute__((vector_size(4 * W)));
typedef uint16_t RawHalf __attribute__((vector_size(2 * W)));
typedef double RawWide __attribute__((vector_size(4 * W)));  // half as many doubles

struct Vec {
  RawVec raw;
};

PYLO_HD Vec operator+(Vec a, Vec b) { return {a.raw + b.raw}; }
PYLO_HD Vec operator-(Vec a, Vec b) { return {a.raw - b.raw}; }
PYLO_HD Vec operator*(Vec a, Vec b) { return {a.raw * b.raw}; }
PYLO_HD Vec operator/(Vec a, Vec b) { return {a.raw / b.raw}; }

template <>
PYLO_HD Vec splat_<Vec>(float x) {
#if defined(__AVX512F__)
  return {(RawVec)_mm512_set1_ps(x)};
#elif defined(__AVX2__)
  return {(RawVec)_mm256_set1_ps(x)};
#else
  return {RawVec{x, x, x, x}};
#endif
}

PYLO_HD Vec operator+(Vec a, float b) { return a + splat_<Vec>(b); }
PYLO_HD Vec operator-(Vec a, float b) { return a - splat_<Vec>(b); }
PYLO_HD Vec operator*(Vec a, float b) { return a * splat_<Vec>(b); }
PYLO_HD Vec operator/(float a, Vec b) { return splat_<Vec>(a) / b; }

PYLO_HD Vec load(const float* at) {
  Vec x;
  __builtin_memcpy(&x.raw, at, sizeof x.raw);
  return x;
}
PYLO_HD RawWide load_doubles(const double* at) {
  RawWide x;
  __builtin_memcpy(&x, at, sizeof x);
  return x;
}
PYLO_HD void store(float* at, Vec x) { __builtin_memcpy(at, &x.raw, sizeof x.raw); }

#if defined(__AVX512F__)
PYLO_HD Vec fma_(Vec a, Vec b, Vec c) {
  return {(RawVec)_mm512_fmadd_ps((__m512)a.raw, (__m512)b.raw, (__m512)c.raw)};
}
PYLO_HD Vec sqrt_(Vec x) { return {(RawVec)_mm512_sqrt_ps((__m512)x.raw)}; }
// the machine's max and min give their second operand where either is NaN
PYLO_HD Vec max_(Vec x, float floor) {
  return {(RawVec)_mm512_max_ps(_mm512_set1_ps(floor), (__m512)x.raw)};
}
PYLO_HD Vec min_(Vec x, float ceiling) {
  return {(RawVec)_mm512_min_ps(_mm512_set1_ps(ceiling), (__m512)x.raw)};
}
PYLO_HD RawWide load_wide(const float* at) { return (RawWide)_mm512_cvtps_pd(_mm256_loadu_ps(at)); }
PYLO_HD RawWide low_half(Vec x) {
  return (RawWide)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x.raw));
}
PYLO_HD RawWide high_half(Vec x) {
  return (RawWide)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x.raw, 1));
}
PYLO_HD RawWide fma_(RawWide a, RawWide b, RawWide c) {
  return (RawWide)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
PYLO_HD RawWide min_(RawWide x, double ceiling) {
  return (RawWide)_mm512_min_pd(_mm512_set1_pd(ceiling), (__m512d)x);
}
#elif defined(__AVX2__)
PYLO_HD Vec fma_(Vec a, Vec b, Vec c) {
  return {(RawVec)_mm256_fmadd_ps((__m256)a.raw, (__m256)b.raw, (__m256)c.raw)};
}
PYLO_HD Vec sqrt_(Vec x) { return {(RawVec)_mm256_sqrt_ps((__m256)x.raw)}; }
PYLO_HD Vec max_(Vec x, float floor) {
  return {(RawVec)_mm256_max_ps(_mm256_set1_ps(floor), (__m256)x.raw)};
}
PYLO_HD Vec min_(Vec x, float ceiling) {
  return {(RawVec)_mm256_min_ps(_mm256_set1_ps(ceiling), (__m256)x.raw)};
}
PYLO_HD RawWide load_wide(const float* at) { return (RawWide)_mm256_cvtps_pd(_mm_loadu_ps(at)); }
PYLO_HD RawWide low_half(Vec x) {
  return (RawWide)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.raw));
}
PYLO_HD RawWide high_half(Vec x) {
  return (RawWide)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.raw, 1));
}
PYLO_HD RawWide fma_(RawWide a, RawWide b, RawWide c) {
  return (RawWide)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
PYLO_HD RawWide min_(RawWide x, double ceiling) {
  return (RawWide)_mm256_min_pd(_mm256_set1_pd(ceiling), (__m256d)x);
}
#else
PYLO_HD Vec fma_(Vec a, Vec b, Vec c) { return a * b + c; }
PYLO_HD Vec sqrt_(Vec x) {
  for (int i = 0; i < W; ++i) x.raw[i] = __builtin_sqrtf(x.raw[i]);
  return x;
}
PYLO_HD Vec max_(Vec x, float floor) { return {x.raw < floor ? splat_<Vec>(floor).raw : x.raw}; }
PYLO_HD Vec min_(Vec x, float ceiling) {
  return {x.raw > ceiling ? splat_<Vec>(ceiling).raw : x.raw};
}
PYLO_HD RawWide load_wide(const float* at) { return RawWide{at[0], at[1]}; }
PYLO_HD RawWide low_half(Vec x) { return RawWide{x.raw[0], x.raw[1]}; }
PYLO_HD RawWide high_half(Vec x) { return RawWide{x.raw[2], x.raw[3]}; }
PYLO_HD RawWide fma_(RawWide a, RawWide b, RawWide c) { return a * b + c; }
PYLO_HD RawWide min_(RawWide x, double ceiling) { return x > ceiling ? RawWide{} + ceiling : x; }
#endif

PYLO_HD Vec scale2_(Vec y, Vec rounded) {
  RawUint bits;
  __builtin_memcpy(&bits, &rounded.raw, sizeof bits);
  const RawInt n = (RawInt)(bits - ROUND_TO_INTEGER_BITS), half = n >> 1;
  const RawUint low = (RawUint)(half + 127) << 23, high = (RawUint)(n - half + 127) << 23;
  return {y.raw * (RawVec)low * (RawVec)high};
}

// V vectors that the functions of math.h and mlp.h take as one number, step by step: while one
// vector waits for its result, the others go on.
template <int V>
struct Vecs {
  Vec v[V];
};

template <int V, class Work>
PYLO_HD Vecs<V> each(const Work& work) {
  Vecs<V> to;
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) to.v[i] = work(i);
  return to;
}

template <int V>
PYLO_HD Vecs<V> load(const float* at) {
  return each<V>([&](int i) { return load(at + i * W); });
}
template <int V>
PYLO_HD void store(float* at, Vecs<V> x) {
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) store(at + i * W, x.v[i]);
}
template <int V>
PYLO_HD Vecs<V> operator-(Vecs<V> a, Vecs<V> b) {
  return each<V>([&](int i) { return a.v[i] - b.v[i]; });
}
template <int V>
PYLO_HD Vecs<V> operator*(Vecs<V> a, Vecs<V> b) {
  return each<V>([&](int i) { return a.v[i] * b.v[i]; });
}
template <int V>
PYLO_HD Vecs<V> operator-(Vecs<V> a, float b) {
  return each<V>([&](int i) { return a.v[i] - b; });
}
template <int V>
PYLO_HD Vecs<V> operator*(Vecs<V> a, float b) {
  return each<V>([&](int i) { return a.v[i] * b; });
}
template <int V>
PYLO_HD Vecs<V> fma_(Vecs<V> a, Vecs<V> b, Vecs<V> c) {
  return each<V>([&](int i) { return fma_(a.v[i], b.v[i], c.v[i]); });
}
template <>
PYLO_HD Vecs<1> splat_<Vecs<1>>(float x) {
  return each<1>([&](int) { return splat_<Vec>(x); });
}
template <>
PYLO_HD Vecs<2> splat_<Vecs<2>>(float x) {
  return each<2>([&](int) { return splat_<Vec>(x); });
}
template <>
PYLO_HD Vecs<3> splat_<Vecs<3>>(float x) {
  return each<3>([&](int) { return splat_<Vec>(x); });
}
template <>
PYLO_HD Vecs<4> splat_<Vecs<4>>(float x) {
  return each<4>([&](int) { return splat_<Vec>(x); });
}
template <int V>
PYLO_HD Vecs<V> max_(Vecs<V> x, float floor) {
  return each<V>([&](int i) { return max_(x.v[i], floor); });
}
template <int V>
PYLO_HD Vecs<V> min_(Vecs<V> x, float ceiling) {
  return each<V>([&](int i) { return min_(x.v[i], ceiling); });
}
template <int V>
PYLO_HD Vecs<V> scale2_(Vecs<V> y, Vecs<V> rounded) {
  return each<V>([&](int i) { return scale2_(y.v[i], rounded.v[i]); });
}

// Whether fma_ rounds once.
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

// As fma_, rounded once on every machine.
PYLO_HD Vec fused_(Vec a, Vec b, Vec c) {
  if constexpr (FUSED) return fma_(a, b, c);
  for (int i = 0; i < W; ++i) c.raw[i] = __builtin_fmaf(a.raw[i], b.raw[i], c.raw[i]);
  return c;
}

// How many entries are not within [-limit, limit], NaN among them.
PYLO_HD int count_beyond(Vec x, float limit) {
#if defined(__AVX512F__)
  return __builtin_popcount(
      _mm512_cmp_ps_mask(_mm512_abs_ps((__m512)x.raw), _mm512_set1_ps(limit), _CMP_NLE_UQ));
#else
  const RawInt inside = (x.raw <= limit) & (x.raw >= -limit);
  int count = W;
  for (int i = 0; i < W; ++i) count += inside[i];
  return count;
#endif
}

// 0, 1, 2, ...
PYLO_HD RawUint counting() {
  RawUint x;
  for (int i = 0; i < W; ++i) x[i] = static_cast<uint32_t>(i);
  return x;
}

// The first `count` entries of x, zeros after them.
PYLO_HD Vec first_of(Vec x, int count) {
  for (int i = 0; i < W; ++i) x.raw[i] = i < count ? x.raw[i] : 0.0f;
  return x;
}

// sum += x^2, in double.
PYLO_HD void add_square(RawWide& sum, Vec x) {
  const RawWide low = low_half(x), high = high_half(x);
  sum = fma_(low, low, sum);
  sum = fma_(high, high, sum);
}

PYLO_HD double total(RawWide x) {
  double sum = 0.0;
  for (int i = 0; i < W / 2; ++i) sum += x[i];
  return sum;
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
