// The features of small_fc (28) and of VeLO and CELO2 (30), and the accumulators they are made of:
// pylo_dist/maths/reference.py, FeatureSet and _fill_features. No torch, no CUDA include. T is
// float, or a vector of floats on the CPU.
//
// Feature order: g, [clip(g, -0.1, 0.1)], p, m x3, v, m q x3, q, F(g) x3, [g q] | row x3, col x3,
// rsqrt(row) x3, rsqrt(col) x3 | F(m) x3, with q = rsqrt(v + eps_rms); those in brackets only where
// `extended`. The features between the bars depend on a row or column alone (12 "factor features");
// the others are the 16 or 18 "element features", numbered without a gap here: an element feature e
// is network input e below FIRST_FACTOR, e + 12 from there on.
#pragma once

#include "geometry.h"

namespace pylo_dist {

// A rule's numbers that do not change over a run (reference.FeatureSet and the decays), by
// name: pylo_dist/maths/tables.py fills them.
// clang-format off
#define PYLO_DIST_RULE_FIELDS(ONE, MANY)                             \
  MANY(momentum_decays, K)                                           \
  ONE(rms_decay)                                                     \
  MANY(factor_decays, K)                                             \
  ONE(eps_diag) ONE(eps_rms) ONE(eps_normalise)                      \
  ONE(clamp)
// clang-format on

#define PYLO_DIST_DOUBLE_ONE(name) double name;
#define PYLO_DIST_DOUBLE_MANY(name, count) double name[count];

struct RuleNumbers {
  PYLO_DIST_RULE_FIELDS(PYLO_DIST_DOUBLE_ONE, PYLO_DIST_DOUBLE_MANY)
};
constexpr int64_t RULE_WIDTH = PYLO_DIST_RULE_FIELDS(PYLO_DIST_COUNT_ONE, PYLO_DIST_COUNT_MANY);
static_assert(sizeof(RuleNumbers) == 8 * RULE_WIDTH, "the numbers are the fields and nothing else");

// The same as the passes use them: x <- old x + now y with now = 1 - old, taken in double.
struct RuleConstants {
  float momentum_old[K], momentum_new[K];
  float rms_old, rms_new;
  double factor_old[K], factor_new[K];
  float eps_diag, eps_rms;
  double eps_normalise;
  float clamp;  // of the gradient; inf for none
};
inline namespace PYLO_ISA {

// Each epsilon once, named as in reference.py.
// added to g^2 before it enters a factor (for row and col: in double, see update_factor)
constexpr float EPS_SQUARE = 1e-30f;
constexpr float EPS_FACTOR = 1e-9f;   // floor of safe_rsqrt, and added to the row mean and to D
constexpr float EPS_FEATURE = 1e-8f;  // rsqrt of a factor as a feature
constexpr float CLIPPED_GRADIENT = 0.1f;

template <bool Extended>
struct Layout {
  static constexpr int P = 1 + Extended;  // feature of the parameter
  // element features below it, then 12 factor features
  static constexpr int FIRST_FACTOR = 13 + 2 * Extended;
  static constexpr int ELEMENT = FIRST_FACTOR + K;      // element features: 16 or 18
  static constexpr int INPUTS = FIRST_FACTOR + 12 + K;  // 28 or 30
  static constexpr int SUMS_FACTORED = ELEMENT;         // sums of pass B of a factored tensor
  // the same below two dims: D x3 and rsqrt(D) x3 as well, before F(m)
  static constexpr int SUMS_DIAG = FIRST_FACTOR + 6 + K;
  static PYLO_HD constexpr int input_of(int e) { return e < FIRST_FACTOR ? e : e + 12; }
};

PYLO_HD RuleConstants rule_constants(const RuleNumbers& x) {
  RuleConstants c;
  for (int k = 0; k < K; ++k) {
    c.momentum_old[k] = static_cast<float>(x.momentum_decays[k]);
    c.momentum_new[k] = static_cast<float>(1.0 - x.momentum_decays[k]);
    c.factor_old[k] = x.factor_decays[k];
    c.factor_new[k] = 1.0 - x.factor_decays[k];
  }
  c.rms_old = static_cast<float>(x.rms_decay);
  c.rms_new = static_cast<float>(1.0 - x.rms_decay);
  c.eps_diag = static_cast<float>(x.eps_diag);
  c.eps_rms = static_cast<float>(x.eps_rms);
  c.eps_normalise = x.eps_normalise;
  c.clamp = static_cast<float>(x.clamp);
  return c;
}

// 1 / sqrt(max(x, 1e-9))
template <class T>
PYLO_HD T safe_rsqrt(T x) {
  return rsqrt_(max_(x, EPS_FACTOR));
}

// The gradient as all formulas read it: scaled by what clipping says, then clamped.
template <class T>
PYLO_HD T used_gradient(T g, float scale, const RuleConstants& c) {
  return clamp_(g * scale, c.clamp);
}

// state_k <- c_k state_k + (1 - c_k) (mean g^2 + 1e-30), in double; `mean` is of the scaled
// gradient.
PYLO_HD float update_factor(float state, double mean, int k, const RuleConstants& c) {
  return static_cast<float>(c.factor_old[k] * static_cast<double>(state) +
                            c.factor_new[k] * (mean + 1e-30));
}

PYLO_HD float row_scale_of(float row, float row_mean) {
  return safe_rsqrt(row / (row_mean + EPS_FACTOR));
}

PYLO_HD float col_scale_of(float col) { return safe_rsqrt(col); }

template <class T>
PYLO_HD T factor_rsqrt_of(T factor) {
  return rsqrt_(factor + EPS_FEATURE);
}

// The new accumulators of an element and its features, unnormalised.
template <class T, bool Extended>
struct Element {
  T m[K], v;                       // new momentum and rms
  T d[K];                          // new diag, below two dims only
  T x[Layout<Extended>::ELEMENT];  // element features in order
};

// m_k <- a_k m_k + (1 - a_k) g
template <class T>
PYLO_HD T new_momentum(T g, T m, int k, const RuleConstants& c) {
  return fma_(g, splat_<T>(c.momentum_new[k]), m * c.momentum_old[k]);
}

// v <- b v + (1 - b) g^2
template <class T>
PYLO_HD T new_rms(T g, T v, const RuleConstants& c) {
  return fma_(g * c.rms_new, g, v * c.rms_old);
}

template <class T>
PYLO_HD T rms_rsqrt(T v, const RuleConstants& c) {
  return rsqrt_(v + c.eps_rms);
}

// m, v and the features that need no factor.
// g: as `used_gradient` gives it.
template <bool Extended, class T>
PYLO_HD void common_features(Element<T, Extended>& out, T g, T p, const T (&m)[K], T v,
                             const RuleConstants& c) {
  using L = Layout<Extended>;
  for (int k = 0; k < K; ++k) out.m[k] = new_momentum(g, m[k], k, c);
  out.v = new_rms(g, v, c);
  const T q = rms_rsqrt(out.v, c);
  out.x[0] = g;
  if constexpr (Extended) {
    out.x[1] = clamp_(g, CLIPPED_GRADIENT);
    out.x[L::FIRST_FACTOR - 1] = g * q;
  }
  out.x[L::P] = p;
  for (int k = 0; k < K; ++k) {
    out.x[L::P + 1 + k] = out.m[k];
    out.x[L::P + 5 + k] = out.m[k] * q;
  }
  out.x[L::P + 4] = out.v;
  out.x[L::P + 8] = q;
}

// Two dims and more: F_k(x) = x row_scale_k col_scale_k.
template <bool Extended, class T>
PYLO_HD void factored_features(Element<T, Extended>& out, const T (&row_scale)[K],
                               const T (&col_scale)[K]) {
  using L = Layout<Extended>;
  for (int k = 0; k < K; ++k) {
    const T f = row_scale[k] * col_scale[k];
    out.x[L::P + 9 + k] = f * out.x[0];
    out.x[L::FIRST_FACTOR + k] = f * out.m[k];
  }
}

// Below two dims: D_k <- c_k D_k + (1 - c_k) (g^2 + 1e-30); F(g) = g safe_rsqrt(D + 1e-9), F(m) = m
// rsqrt(D + eps_diag). row = col = D, and both rsqrt features are factor_rsqrt_of(D).
template <bool Extended, class T>
PYLO_HD void diag_features(Element<T, Extended>& out, const T (&d)[K], const RuleConstants& c) {
  using L = Layout<Extended>;
  const T square = fma_(out.x[0], out.x[0], splat_<T>(EPS_SQUARE));
  for (int k = 0; k < K; ++k) {
    out.d[k] = fma_(square, splat_<T>(static_cast<float>(c.factor_new[k])),
                    d[k] * static_cast<float>(c.factor_old[k]));
    out.x[L::P + 9 + k] = out.x[0] * safe_rsqrt(out.d[k] + EPS_FACTOR);
    out.x[L::FIRST_FACTOR + k] = out.m[k] * rsqrt_(out.d[k] + c.eps_diag);
  }
}

// 1 / sqrt(mean x^2 + eps): what a feature is multiplied by.
PYLO_HD float normaliser(double square_sum, double numel, double eps) {
  return static_cast<float>(1.0 / __builtin_sqrt(square_sum / numel + eps));
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
