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

// Columns whose squares lie in the first-level cache beside what is read.
constexpr int COLUMNS = 512;
// Elements that are worked on together: as long as nothing has to be kept of them, a whole block.
constexpr int STRETCH = W == 16 ? COLUMNS : TILE;

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

  // Sums of the old accumulators, and of their squares.
  PYLO_HD void add_old(const Tile& in) {
    const float* const x[K + 1] = {in.m[0], in.m[1], in.m[2], in.v};
    RawWide sum[K + 1] = {}, square[K + 1] = {};
#pragma GCC unroll 2
    for (int o = 0; o < in.count; o += W) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 4
        for (int k = 0; k < K + 1; ++k) {
          const RawWide x_ = load_wide(x[k] + o + i * (W / 2));
          sum[k] += x_;
          square[k] = fma_(x_, x_, square[k]);
        }
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < K + 1; ++k) {
      sums[k < K ? M + k : V_] += sum[k];
      sums[k < K ? M_SQUARES + k : V_SQUARES] += square[k];
    }
  }

  PYLO_HD void add_diag_tile(const Tile& tile, float scale, const RuleConstants& rule,
                             const Scales& scales) {
    for (int o = 0; o < tile.count; o += W) {
      add(features_at<Extended, true, false>(tile, o, scale, rule, scales),
          tile.count - o < W ? tile.count - o : W);
    }
    if constexpr (Moments) add_old(tile);
  }

  // Two dims and more; of `in` the pointers and the count. A feature that is a product is squared
  // as the product of squares, in double: a conversion costs more than a multiplication. As many
  // sums are formed at once as registers hold; `Factor` gives F_k^2, see below.
  template <class Factor>
  PYLO_HD void add_elements(const Tile& in, float scale, const RuleConstants& rule,
                            const Factor& factor) {
    if constexpr (Moments) add_old(in);
    Shared shared;
    add_decays<0>(in, scale, rule, factor, shared);
    if constexpr (DECAYS < 2) add_decays<1>(in, scale, rule, factor, shared);
    if constexpr (DECAYS < 3) add_decays<2>(in, scale, rule, factor, shared);
  }

  // Decays whose sums are formed at once, and what of the first ones the others need.
  static constexpr int DECAYS = W == 16 ? K : 1;
  struct Shared {
    alignas(64) float g[STRETCH];
    RawWide g2[2 * STRETCH / W], q2[2 * STRETCH / W];
  };

  // What an element's features of no decay are made of.
  struct Base {
    Vec g, v, q;
  };

  PYLO_HD static Base base_of(const Tile& in, int o, float scale, const RuleConstants& rule) {
    const Vec g = used_gradient(load(in.g + o), scale, rule), v = new_rms(g, load(in.v + o), rule),
              q = rms_rsqrt(v, rule);
    if (in.count - o >= W) return Base{g, v, q};
    return Base{g, v, first_of(q, in.count - o)};  // all else is zero there
  }

  // Sums of the features of decays FIRST .. FIRST + DECAYS - 1; with the first ones those of
  // features of no decay.
  template <int FIRST, class Factor>
  PYLO_HD void add_decays(const Tile& in, float scale, const RuleConstants& rule,
                          const Factor& factor, Shared& shared) {
    constexpr bool BASE = FIRST == 0;
    constexpr double bound =
        static_cast<double>(CLIPPED_GRADIENT) * static_cast<double>(CLIPPED_GRADIENT);
    const RuleConstants c = rule;
    RawWide g_sum{}, p_sum{}, v_sum{}, q_sum{}, clipped{}, gq{};
    RawWide m_sum[DECAYS] = {}, mq[DECAYS] = {}, fg[DECAYS] = {}, fm[DECAYS] = {};
    Base next{};  // one vector ahead, so that nobody waits for its root
    if constexpr (BASE) next = base_of(in, 0, scale, c);
    for (int o = 0; o < in.count; o += W) {
      const int h = o / (W / 2);
      Vec g;
      RawWide g2[2], q2[2];
      if constexpr (BASE) {
        g = next.g;
        const Vec v = next.v, q = next.q;
        next = base_of(in, o + W < in.count ? o + W : o, scale, c);
        prefetch_later(in, o);
        const RawWide g_[2] = {low_half(g), high_half(g)}, v_[2] = {low_half(v), high_half(v)},
                      q_[2] = {low_half(q), high_half(q)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const RawWide p_ = load_wide(in.p + o + i * (W / 2));
          g2[i] = g_[i] * g_[i];
          q2[i] = q_[i] * q_[i];
          g_sum += g2[i];
          q_sum += q2[i];
          p_sum = fma_(p_, p_, p_sum);
          v_sum = fma_(v_[i], v_[i], v_sum);
          if constexpr (Extended) {
            clipped += min_(g2[i], bound);
            gq = fma_(g2[i], q2[i], gq);
          }
          if constexpr (DECAYS < K) {
            shared.g2[h + i] = g2[i];
            shared.q2[h + i] = q2[i];
          }
        }
        if constexpr (DECAYS < K) store(shared.g + o, g);
      } else {
        g = load(shared.g + o);
        for (int i = 0; i < 2; ++i) {
          g2[i] = shared.g2[h + i];
          q2[i] = shared.q2[h + i];
        }
      }
#pragma GCC unroll 3
      for (int k = 0; k < DECAYS; ++k) {
        const Vec m = new_momentum(g, load(in.m[FIRST + k] + o), FIRST + k, c);
        const RawWide m_[2] = {low_half(m), high_half(m)};
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const RawWide m2 = m_[i] * m_[i], f = factor.square(FIRST + k, o + i * (W / 2));
          m_sum[k] += m2;
          mq[k] = fma_(m2, q2[i], mq[k]);
          fg[k] = fma_(g2[i], f, fg[k]);
          fm[k] = fma_(m2, f, fm[k]);
        }
      }
    }
    if constexpr (BASE) {
      sums[0] += g_sum;
      sums[L::P] += p_sum;
      sums[L::P + 4] += v_sum;
      sums[L::P + 8] += q_sum;
      if constexpr (Extended) {
        sums[1] += clipped;
        sums[L::FIRST_FACTOR - 1] += gq;
      }
    }
#pragma GCC unroll 3
    for (int k = 0; k < DECAYS; ++k) {
      sums[L::P + 1 + FIRST + k] += m_sum[k];
      sums[L::P + 5 + FIRST + k] += mq[k];
      sums[L::P + 9 + FIRST + k] += fg[k] * factor.by[FIRST + k];
      sums[L::FIRST_FACTOR + FIRST + k] += fm[k] * factor.by[FIRST + k];
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

// F_k^2 of the elements of a tile, element by element.
struct ElementSquares {
  const Scales& scales;
  double by[K] = {1.0, 1.0, 1.0};
  PYLO_HD RawWide square(int k, int at) const {
    const RawWide v = load_wide(scales.vector[k] + at), c = load_wide(scales.constant[k] + at);
    return v * v * (c * c);
  }
};

// The same along a run: the vector side's squares, made once for many runs; the constant side's are
// multiplied in once a tile.
struct RunSquares {
  const double* vector[K];
  double by[K];
  PYLO_HD RawWide square(int k, int at) const { return load_doubles(vector[k] + at); }
};

template <bool Extended, bool Moments>
static void features_of_runs(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  const Tensors& t = args.tensors[box.item];
  const float scale = static_cast<float>(args.scale[box.item]);
  const RuleConstants rule = args.rule;
  const Factors factors = factors_of(item, t, args.factors);
  const Side vector = side_of(factors, item.vector_is_row),
             constant = side_of(factors, !item.vector_is_row);
  FeatureSums<Extended, false, Moments> sums;
  Buffers buffers;
  alignas(64) double squares[K][COLUMNS];
  Run runs[ROWS];
  Tile tile;
  tile.pieces = 1;
  const bool floats = all_floats(t, args.state_type);
  const bool whole = job.last - job.first <= COLUMNS;  // the next run lies behind this one
  for (int64_t first_run = job.first_run; first_run < job.last_run;) {
    const int rows = runs_alike(item, box, job, first_run, runs);
    const int64_t vector_at = item.vector_is_row ? runs[0].row : runs[0].col;
    for (int64_t block = job.first; block < job.last; block += COLUMNS) {
      const int64_t end = job.last - block < COLUMNS ? job.last : block + COLUMNS;
      const int count = static_cast<int>(end - block);
      for (int k = 0; k < K; ++k) {
        const float* from = vector.scale + k * vector.size + vector_at + block;
        for (int i = 0; i < count; ++i) {
          const double x = from[i];
          squares[k][i] = x * x;
        }
        for (int i = count; i % TILE; ++i) squares[k][i] = 0.0;
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t constant_at = item.vector_is_row ? runs[r].col : runs[r].row;
        const int64_t below = whole          ? runs[r].local + AHEAD
                              : r + 1 < rows ? runs[r + 1].local
                                             : runs[0].local + end - block;
        RunSquares factor;
        for (int k = 0; k < K; ++k) {
          const double x = constant.scale[k * constant.size + constant_at];
          factor.by[k] = x * x;
        }
        const int64_t at = runs[r].local + block;
        const auto squares_from = [&](int64_t j) {
          for (int k = 0; k < K; ++k) factor.vector[k] = squares[k] + j;
        };
        int64_t j = 0;
        tile.later = below - runs[r].local;
        for (; floats && j + W <= count; j += tile.count) {
          const int64_t whole = (count - j) / W * W;
          tile.count = static_cast<int>(whole < STRETCH ? whole : STRETCH);
          point(tile, t, item.numel, at + j);
          squares_from(j);
          sums.add_elements(tile, scale, rule, factor);
        }
        tile.later = 0;
        for (; j < count; j += TILE) {
          tile.count = static_cast<int>(count - j < TILE ? count - j : TILE);
          tile.piece[0] = Piece{at + j, runs[r].row, runs[r].col, 0, tile.count};
          if (!floats) prefetch(t, args.state_type, item.numel, below + block + j);
          stage(tile, t, args.state_type, item.numel, buffers);
          squares_from(j);
          sums.add_elements(tile, scale, rule, factor);
        }
      }
    }
    sums.flush(out, leads.size, runs[0].lead - leads.first);
    first_run += rows;
  }
}

template <bool Extended, bool Diag, bool Moments>
static void features_of_elements(const PassArgs& args, const Job& job, IndexRange leads,
                                 double* out) {
  const float scale = static_cast<float>(args.scale[args.boxes[job.box].item]);
  const RuleConstants rule = args.rule;
  FeatureSums<Extended, Diag, Moments> sums;
  int64_t lead = -1;
  for_tiles<Diag>(args, job, [&](const Tile& tile, const Scales& scales) {
    if (lead >= 0 && tile.lead != lead) sums.flush(out, leads.size, lead - leads.first);
    lead = tile.lead;
    if constexpr (Diag) {
      sums.add_diag_tile(tile, scale, rule, scales);
    } else {
      sums.add_elements(tile, scale, rule, ElementSquares{scales});
    }
  });
  if (lead >= 0) sums.flush(out, leads.size, lead - leads.first);
}

template <bool Extended, bool Moments>
static void features_of_job(const PassArgs& args, const Job& job, IndexRange leads, double* out) {
  const Box& box = args.boxes[job.box];
  const Item& item = args.items[box.item];
  if (is_dense(item, box)) return features_of_runs<Extended, Moments>(args, job, leads, out);
  if (item.factored) return features_of_elements<Extended, false, Moments>(args, job, leads, out);
  return features_of_elements<Extended, true, Moments>(args, job, leads, out);
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
