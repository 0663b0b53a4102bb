// Pass B on a CPU: sums of squares of the element features; and VeLO's moments.
#pragma once

#include "cpu_tiles.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

static void moments(const Tensors& t, int64_t state_type, int64_t numel, int64_t first,
                    int64_t last, double* out) {
  RawWide sums[NUM_MOMENTS] = {};
  alignas(64) float p_buffer[TILE], buffers[4][TILE];
  for (int64_t at = first; at < last; at += TILE) {
    const int count = static_cast<int>(last - at < TILE ? last - at : TILE);
    const float* p = static_cast<const float*>(t.value) + at;
    const float* state[4] = {t.momentum + at, t.momentum + numel + at, t.momentum + 2 * numel + at,
                             t.rms + at};
    if (count < TILE || t.value_type != FLOAT32) {
      __builtin_memset(p_buffer, 0, sizeof p_buffer);
      read(p_buffer, t.value, t.value_type, at, count);
      p = p_buffer;
    }
    if (count < TILE || state_type != FLOAT32) {
      __builtin_memset(buffers, 0, sizeof buffers);
      for (int k = 0; k < 4; ++k) {
        const float* from = k < K ? t.momentum : t.rms;
        read(buffers[k], from, state_type, k < K ? k * numel + at : at, count);
        state[k] = buffers[k];
      }
    }
    for (int o = 0; o < TILE; o += W) {
      add_square(sums[0], load(p + o));
      for (int k = 0; k < 4; ++k) {
        const Vec x = load(state[k] + o);
        RawWide& sum = k < K ? sums[1 + k] : sums[7];
        sum += low_half(x);
        sum += high_half(x);
        add_square(k < K ? sums[4 + k] : sums[8], x);
      }
    }
  }
  for (int s = 0; s < NUM_MOMENTS; ++s) out[s] += total(sums[s]);
}

// Sums of squares of the features, in double: so exact that the normalisers' float bits do not
// depend on the cut. With `Moments` VeLO's sums of the old accumulators too (m, m^2, v, v^2; that
// of p^2 is a feature's), which are at hand here.
template <bool Extended, bool Diag, bool Moments>
struct FeatureSums {
  using L = Layout<Extended>;
  static constexpr int FEATURES = Diag ? L::SUMS_DIAG : L::SUMS_FACTORED;
  static constexpr int NUM = FEATURES + (Moments ? NUM_MOMENTS - 1 : 0);
  static constexpr int M = FEATURES, M_SQUARES = M + K, V_ = M + 2 * K, V_SQUARES = V_ + 1;
  RawWide sums[NUM] = {};

  // Below two dims: feature by feature. (There, as above, whatever box an element lies in: see
  // add_tile.)
  PYLO_HD void add(const Element<Vec, Extended>& e, int count) {
    for (int f = 0; f < L::ELEMENT; ++f) {
      add_square(sums[f < L::FIRST_FACTOR ? f : f + SIDE],
                 count < W ? first_of(e.x[f], count) : e.x[f]);
    }
    for (int k = 0; k < K; ++k) {
      const Vec d = e.d[k], q = factor_rsqrt_of(d);
      add_square(sums[L::FIRST_FACTOR + k], count < W ? first_of(d, count) : d);
      add_square(sums[L::FIRST_FACTOR + K + k], count < W ? first_of(q, count) : q);
    }
  }

  PYLO_HD void add_old(int sum, int square, Vec x) {
    const RawWide low = low_half(x), high = high_half(x);
    sums[sum] += low + high;
    sums[square] = fma_(low, low, fma_(high, high, sums[square]));
  }

  PYLO_HD void add_diag_tile(const Tile& tile, float scale, const RuleConstants& rule,
                             const Scales& scales) {
    for (int o = 0; o < tile.count; o += W) {
      add(features_at<Extended, true, false>(tile, o, scale, rule, scales),
          tile.count - o < W ? tile.count - o : W);
      if constexpr (Moments) {
        for (int k = 0; k < K; ++k) add_old(M + k, M_SQUARES + k, load(tile.m[k] + o));
        add_old(V_, V_SQUARES, load(tile.v + o));
      }
    }
  }

  // Two dims and more. A feature that is a product is squared as the product of squares, in double:
  // a conversion costs more than a multiplication. What depends on no decay goes first, then one
  // decay after the other, so that all sums stay in registers.
  template <bool Dense>
  PYLO_HD void add_tile(const Tile& tile, float scale, const RuleConstants& rule,
                        const Scales& scales) {
    alignas(64) float g_used[TILE];
    RawWide g2[TILE / W][2], q2[TILE / W][2];
    const int vectors = (tile.count + W - 1) / W;
    {
      RawWide g_sum = sums[0], p_sum = sums[L::P], v_sum = sums[L::P + 4], q_sum = sums[L::P + 8];
      RawWide clipped = sums[Extended ? 1 : 0], gq = sums[L::FIRST_FACTOR - 1],
              old = sums[Moments ? V_ : 0];
      RawWide old_square = sums[Moments ? V_SQUARES : 0];
      constexpr double bound =
          static_cast<double>(CLIPPED_GRADIENT) * static_cast<double>(CLIPPED_GRADIENT);
      for (int i = 0; i < vectors; ++i) {
        const int o = i * W;
        const Vec g = used_gradient(load(tile.g + o), scale, rule),
                  v = new_rms(g, load(tile.v + o), rule);
        Vec q = rms_rsqrt(v, rule);
        if (tile.count - o < W) q = first_of(q, tile.count - o);  // all else is zero beyond the end
        store(g_used + o, g);
        const auto half = [&](int h, RawWide g_, RawWide v_, RawWide q_) {
          const int at = o + h * (W / 2);
          const RawWide g_square = g_ * g_, q_square = q_ * q_, p_ = load_wide(tile.p + at);
          g2[i][h] = g_square;
          q2[i][h] = q_square;
          g_sum += g_square;
          q_sum += q_square;
          p_sum = fma_(p_, p_, p_sum);
          v_sum = fma_(v_, v_, v_sum);
          if constexpr (Extended) {
            clipped += min_(g_square, bound);
            gq = fma_(g_square, q_square, gq);
          }
          if constexpr (Moments) {
            const RawWide old_ = load_wide(tile.v + at);
            old += old_;
            old_square = fma_(old_, old_, old_square);
          }
        };
        half(0, low_half(g), low_half(v), low_half(q));
        half(1, high_half(g), high_half(v), high_half(q));
      }
      sums[0] = g_sum;
      sums[L::P] = p_sum;
      sums[L::P + 4] = v_sum;
      sums[L::P + 8] = q_sum;
      if constexpr (Extended) {
        sums[1] = clipped;
        sums[L::FIRST_FACTOR - 1] = gq;
      }
      if constexpr (Moments) {
        sums[V_] = old;
        sums[V_SQUARES] = old_square;
      }
    }
    for (int k = 0; k < K; ++k) {
      RawWide m_sum = sums[L::P + 1 + k], mq = sums[L::P + 5 + k], old = sums[Moments ? M + k : 0];
      RawWide old_square = sums[Moments ? M_SQUARES + k : 0], fg{}, fm{};
      for (int i = 0; i < vectors; ++i) {
        const int o = i * W;
        const Vec m = new_momentum(load(g_used + o), load(tile.m[k] + o), k, rule);
        const auto half = [&](int h, RawWide m_) {
          const int at = o + h * (W / 2);
          const RawWide m_square = m_ * m_, vector = load_wide(scales.vector[k] + at);
          RawWide f = vector * vector;
          if constexpr (!Dense) {
            const RawWide constant = load_wide(scales.constant[k] + at);
            f *= constant * constant;
          }
          m_sum += m_square;
          mq = fma_(m_square, q2[i][h], mq);
          fg = fma_(g2[i][h], f, fg);
          fm = fma_(m_square, f, fm);
          if constexpr (Moments) {
            const RawWide old_ = load_wide(tile.m[k] + at);
            old += old_;
            old_square = fma_(old_, old_, old_square);
          }
        };
        half(0, low_half(m));
        half(1, high_half(m));
      }
      if constexpr (Dense) {
        const double constant = *scales.constant[k];
        fg *= constant * constant;
        fm *= constant * constant;
      }
      sums[L::P + 1 + k] = m_sum;
      sums[L::P + 5 + k] = mq;
      sums[L::P + 9 + k] += fg;
      sums[L::FIRST_FACTOR + k] += fm;
      if constexpr (Moments) {
        sums[M + k] = old;
        sums[M_SQUARES + k] = old_square;
      }
    }
  }

  // Adds to out (NUM, leads) and starts anew.
  PYLO_HD void flush(double* out, int64_t leads, int64_t lead) {
    for (int f = 0; f < NUM; ++f) {
      out[f * leads + lead] += total(sums[f]);
      sums[f] = RawWide{};
    }
  }
};

template <bool Extended, bool Diag, bool Dense, bool Moments>
static void features_of(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const float scale = static_cast<float>(args.scale[args.boxes[job.box].item]);
  const RuleConstants rule = args.rule;
  FeatureSums<Extended, Diag, Moments> sums;
  int64_t lead = -1;
  for_tiles<Diag, Dense>(args, job, [&](const Tile& tile, const Scales& scales) {
    if (lead >= 0 && tile.lead != lead) sums.flush(out, leads.size, lead - leads.first);
    lead = tile.lead;
    if constexpr (Diag) {
      sums.add_diag_tile(tile, scale, rule, scales);
    } else {
      sums.template add_tile<Dense>(tile, scale, rule, scales);
    }
  });
  if (lead >= 0) sums.flush(out, leads.size, lead - leads.first);
}

template <bool Extended, bool Moments>
static void features_of_job(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  if (is_dense(item, box))
    return features_of<Extended, false, true, Moments>(args, job, leads, out);
  if (item.factored) return features_of<Extended, false, false, Moments>(args, job, leads, out);
  return features_of<Extended, true, false, Moments>(args, job, leads, out);
}

static void features(const PassArgs& args, const Job& job, bool extended, IndexRange leads,
                     double* out) {
  if (!extended) return features_of_job<false, false>(args, job, leads, out);
  if (args.items[args.boxes[job.box].item].moments_at < 0)
    return features_of_job<true, false>(args, job, leads, out);
  return features_of_job<true, true>(args, job, leads, out);
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
