// Pass C on a CPU: features again, the network, new accumulators and values.
#pragma once

#include "cpu_network.h"

namespace pylo_dist {
inline namespace PYLO_ISA {

constexpr int ROWS = 16;  // runs that share the vector side's first layer

template <bool Extended, int H>
struct Updater {
  using L = Layout<Extended>;
  const Box& box;
  const Item& item;
  const Tensors& t;
  const RuleConstants rule;
  const PassArgs& args;
  const Step step;
  const float scale;
  const float* normalisers;
  const Network<Extended, H>& net;
  RawWide squares{};
  Buffers buffers;
  const float* folded_for = nullptr;
  alignas(64) float folded[L::ELEMENT][H];
  alignas(64) float x[L::ELEMENT][TILE];
  alignas(64) float first[H][TILE];
  alignas(64) float out[2][TILE];

  Updater(const PassArgs& args, const Job& job)
      : box(args.boxes[job.box]),
        item(args.items[box.item]),
        t(args.tensors[box.item]),
        rule(args.rule),
        args(args),
        step(args.steps[box.item]),
        scale(static_cast<float>(args.scale[box.item])),
        normalisers(args.normalisers + args.normalisers_at[box.item]),
        net(*reinterpret_cast<const Network<Extended, H>*>(
            args.networks + args.network_of[box.item] * args.network_bytes)) {}

  // The normaliser of a side's feature.
  PYLO_HD float side_normaliser(const float* norm, bool vector, int s) const {
    return norm[side_input<Extended>(vector == static_cast<bool>(item.vector_is_row), s)];
  }

  // The weights of the element features, times their normalisers.
  PYLO_HD void fold(const float* norm) {
    if (norm == folded_for) return;
    folded_for = norm;
    for (int e = 0; e < L::ELEMENT; ++e) {
      for (int h = 0; h < H; ++h) folded[e][h] = net.element[e][h] * norm[L::input_of(e)];
    }
  }

  // What of the new momenta and mean square of a vector is stored. In bfloat16 it is the same
  // on every machine: where fma_ rounds twice they are computed once more.
  PYLO_HD void store_means(const Element<Vec, Extended>& e, const Tile& tile, int o) {
    Vec m[K] = {e.m[0], e.m[1], e.m[2]}, v = e.v;
    if constexpr (!FUSED) {
      if (args.state_type != FLOAT32) {
        const Vec g = used_gradient(load(tile.g + o), scale, rule);
        for (int k = 0; k < K; ++k) {
          m[k] = fused_(g, splat_<Vec>(rule.momentum_new[k]),
                        load(tile.m[k] + o) * rule.momentum_old[k]);
        }
        v = fused_(g * rule.rms_new, g, load(tile.v + o) * rule.rms_old);
      }
    }
    for (int k = 0; k < K; ++k) store(tile.new_m[k] + o, m[k]);
    store(tile.new_v + o, v);
  }

  // New accumulators, and the element features to x.
  template <bool Diag, bool Dense>
  PYLO_HD void fill(const Tile& tile, const Scales& scales) {
    const RuleConstants constants = rule;
    for (int o = 0; o < tile.count; o += W) {
      const Element<Vec, Extended> e =
          features_at<Extended, Diag, Dense>(tile, o, scale, constants, scales);
      store_means(e, tile, o);
      if constexpr (Diag) {
        for (int k = 0; k < K; ++k) store(tile.new_d[k] + o, e.d[k]);
      }
      for (int f = 0; f < L::ELEMENT; ++f) store(x[f] + o, e.x[f]);
    }
  }

  // Small networks, but for tensors below two dims, take a vector of elements from its features to
  // its first layer in registers.
  static constexpr bool IN_REGISTERS = H <= 8;

  template <bool Dense>
  PYLO_HD void fill_first(const Tile& tile, const Scales& scales, const float (*u)[TILE],
                          const float* r) {
    const RuleConstants constants = rule;
    for (int o = 0; o < tile.count; o += W) {
      const Element<Vec, Extended> e =
          features_at<Extended, false, Dense>(tile, o, scale, constants, scales);
      store_means(e, tile, o);
      Vec sums[H];
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) sums[h] = load(u[h] + o) + splat_<Vec>(r[h]);
#pragma GCC unroll 18
      for (int f = 0; f < L::ELEMENT; ++f) {
#pragma GCC unroll 8
        for (int h = 0; h < H; ++h) sums[h] = fma_(e.x[f], splat_<Vec>(folded[f][h]), sums[h]);
      }
#pragma GCC unroll 8
      for (int h = 0; h < H; ++h) store(first[h] + o, relu_(sums[h]));
    }
  }

  // The network for the vectors from o on, `Vectors` or, near the end, fewer at a time; its first
  // layer too if that comes from x.
  template <int Vectors, bool FromX>
  PYLO_HD void networks(int o, int count, const float (*u)[TILE], const float* r) {
    for (; count - o > (Vectors - 1) * W; o += Vectors * W) {
      if constexpr (FromX) first_layer<Vectors, H>(L::ELEMENT, x, folded, u, r, o, first);
      outputs_of<Vectors>(net, first, o, out);
    }
    if constexpr (Vectors > 1) networks<Vectors - 1, FromX>(o, count, u, r);
  }

  // The network, and from its outputs to the new values, or the direction.
  template <bool FromX>
  PYLO_HD void finish(const Tile& tile, const float (*u)[TILE], const float* r) {
    networks<BLOCK_VECTORS, FromX>(0, tile.count, u, r);
    if (t.direction) {
      alignas(64) float s[TILE];
      for (int o = 0; o < tile.count; o += W) {
        store(s + o,
              direction_of(load(out[0] + o), load(out[1] + o), step.exp_mult) * step.step_size);
      }
      scatter(tile, t.direction, FLOAT32, 0, s);
    } else {
      RawWide sum = squares;
      for (int o = 0; o < tile.count; o += W) {
        const Vec p = load(tile.p + o);
        const Vec now =
            moved(p, direction_of(load(out[0] + o), load(out[1] + o), step.exp_mult), step);
        const int count = tile.count - o;
        add_square(sum, count < W ? first_of(now - p, count) : now - p);
        store(tile.new_p + o, now);
      }
      squares = sum;
    }
    unstage(tile, t, args, box.item, !t.direction);
  }

  // Tiles side by side whose u is kept for the next rows: as much as the caches have room for. A
  // small network reads memory row by row then; a large one goes down the rows, and fetches the row
  // below.
  static constexpr int BLOCK = H == 32 ? 1 : 32;

  void dense(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row),
               constant = side_of(factors, !item.vector_is_row);
    alignas(64) float u[BLOCK][H][TILE], side[SIDE][TILE], padded[K][TILE];
    alignas(64) float r[ROWS][H];
    Run runs[ROWS];
    Tile tile;
    tile.pieces = 1;
    for (int64_t first_run = job.first_run; first_run < job.last_run;) {
      int rows = 0;
      for (; rows < ROWS && first_run + rows < job.last_run; ++rows) {
        runs[rows] = run_of(box, first_run + rows);
        const bool same =
            item.vector_is_row ? runs[rows].row == runs[0].row : runs[rows].col == runs[0].col;
        if (!same || runs[rows].lead != runs[0].lead) break;
      }
      const float* norm = normalisers + runs[0].lead * L::INPUTS;
      fold(norm);
      for (int i = 0; i < rows; ++i) {
        const int64_t at = item.vector_is_row ? runs[i].col : runs[i].row;
        float of_row[SIDE];
        for (int s = 0; s < SIDE; ++s) {
          const float* from = s < K ? constant.factor : constant.rsqrt;
          of_row[s] = from[s % K * constant.size + at] * side_normaliser(norm, false, s);
        }
        for (int h = 0; h < H; ++h) {
          float sum = 0.0f;
          for (int s = 0; s < SIDE; ++s) sum = fma_(of_row[s], net.constant[s][h], sum);
          r[i][h] = sum;
        }
      }
      const int64_t vector_at = item.vector_is_row ? runs[0].row : runs[0].col;
      for (int64_t block = job.first; block < job.last; block += BLOCK * TILE) {
        const int64_t end = job.last - block < BLOCK * TILE ? job.last : block + BLOCK * TILE;
        for (int64_t j = block; j < end; j += TILE) {
          const int count = static_cast<int>(end - j < TILE ? end - j : TILE);
          for (int s = 0; s < SIDE; ++s) {
            const float* from =
                (s < K ? vector.factor : vector.rsqrt) + s % K * vector.size + vector_at + j;
            const float by = side_normaliser(norm, true, s);
            for (int i = 0; i < count; ++i) side[s][i] = from[i] * by;
            for (int i = count; i < TILE; ++i) side[s][i] = 0.0f;
          }
          side_layer<H>(net.input_bias, side, net.vector, u[(j - block) / TILE]);
        }
        for (int i = 0; i < rows; ++i) {
          const int64_t constant_at = item.vector_is_row ? runs[i].col : runs[i].row;
          Scales scales;
          for (int k = 0; k < K; ++k)
            scales.constant[k] = constant.scale + k * constant.size + constant_at;
          for (int64_t j = block; j < end; j += TILE) {
            tile.count = static_cast<int>(end - j < TILE ? end - j : TILE);
            vector_scales(scales, vector, vector_at + j, tile.count, padded);
            const int64_t later = BLOCK > 1      ? runs[i].local + j + AHEAD
                                  : i + 1 < rows ? runs[i + 1].local + j
                                                 : runs[0].local + end;
            prefetch(t, args.state_type, item.numel, later);
            tile.piece[0] = Piece{runs[i].local + j, runs[i].row, runs[i].col, 0, tile.count};
            stage(tile, t, args.state_type, item.numel, buffers);
            const float (*start)[TILE] = u[(j - block) / TILE];
            if constexpr (IN_REGISTERS) {
              fill_first<true>(tile, scales, start, r[i]);
            } else {
              fill<false, true>(tile, scales);
            }
            finish<!IN_REGISTERS>(tile, start, r[i]);
          }
        }
      }
      first_run += rows;
    }
  }

  template <bool Diag>
  void anywhere(const PassArgs& args, const Job& job) {
    const Factors factors = factors_of(item, t, args.factors);
    const Side vector = side_of(factors, item.vector_is_row),
               constant = side_of(factors, !item.vector_is_row);
    alignas(64) float vector_side[SIDE][TILE], constant_side[SIDE][TILE], u[H][TILE], r[H][TILE];
    const float zeros[H] = {};
    for_tiles<Diag, false>(args, job, [&](const Tile& tile, const Scales& scales) {
      const float* norm = normalisers + tile.lead * L::INPUTS;
      fold(norm);
      if constexpr (!Diag) {
        fill_side(tile, box, item.vector_is_row, vector.factor, vector.size, vector_side);
        fill_side(tile, box, item.vector_is_row, vector.rsqrt, vector.size, vector_side + K);
        fill_side(tile, box, !item.vector_is_row, constant.factor, constant.size, constant_side);
        fill_side(tile, box, !item.vector_is_row, constant.rsqrt, constant.size, constant_side + K);
      }
      if constexpr (Diag || !IN_REGISTERS) fill<Diag, false>(tile, scales);
      for (int s = 0; s < SIDE; ++s) {
        const float vector_norm = side_normaliser(norm, true, s),
                    constant_norm = side_normaliser(norm, false, s);
        for (int o = 0; o < TILE; o += W) {
          if constexpr (Diag) {
            Vec d = load(tile.new_d[s % K] + o);
            if (s >= K) d = factor_rsqrt_of(d);
            store(vector_side[s] + o, d * vector_norm);
            store(constant_side[s] + o, d * constant_norm);
          } else {
            store(vector_side[s] + o, load(vector_side[s] + o) * vector_norm);
            store(constant_side[s] + o, load(constant_side[s] + o) * constant_norm);
          }
        }
      }
      side_layer<H>(net.input_bias, vector_side, net.vector, u);
      side_layer<H>(nullptr, constant_side, net.constant, r);
      for (int h = 0; h < H; ++h) {
        for (int o = 0; o < TILE; o += W) store(u[h] + o, load(u[h] + o) + load(r[h] + o));
      }
      if constexpr (!Diag && IN_REGISTERS) fill_first<false>(tile, scales, u, zeros);
      finish<Diag || !IN_REGISTERS>(tile, u, zeros);
    });
  }

  double run(const PassArgs& args, const Job& job) {
    if (is_dense(item, box)) {
      dense(args, job);
    } else if (item.factored) {
      anywhere<false>(args, job);
    } else {
      anywhere<true>(args, job);
    }
    return total(squares);
  }
};

static int64_t network_bytes(int hidden) {
  switch (hidden) {
    case 32:
      return sizeof(Network<false, 32>);
    case 8:
      return sizeof(Network<true, 8>);
    default:
      return sizeof(Network<true, 4>);
  }
}

static void pack(const float* packed, bool vector_is_row, int hidden, void* to) {
  switch (hidden) {
    case 32:
      *static_cast<Network<false, 32>*>(to) = Network<false, 32>(packed, vector_is_row);
      break;
    case 8:
      *static_cast<Network<true, 8>*>(to) = Network<true, 8>(packed, vector_is_row);
      break;
    default:
      *static_cast<Network<true, 4>*>(to) = Network<true, 4>(packed, vector_is_row);
  }
}

static double updates(const PassArgs& args, const Job& job, int hidden) {
  switch (hidden) {
    case 32:
      return Updater<false, 32>(args, job).run(args, job);
    case 8:
      return Updater<true, 8>(args, job).run(args, job);
    default:
      return Updater<true, 4>(args, job).run(args, job);
  }
}

}  // namespace PYLO_ISA
}  // namespace pylo_dist
