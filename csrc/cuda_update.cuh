// Pass C on a GPU: normalise, run the network, write momentum, rms, diag and the value.
//
// small_fc has two paths in one kernel. Boxes with long runs go through tensor cores (lanes.h): a
// warp keeps a strip of 32 columns for many runs, the weights in registers. All others, and
// "highest", are computed in float32 with the weights in shared memory, an order of additions as
// mlp.h has it. VeLO and CELO2, whose networks are small, always are; of long runs four columns a
// lane, what is constant along a column in shared memory.
#pragma once

#include "cuda_rounding.cuh"
#include "cuda_sums.cuh"

namespace pylo_dist {
namespace gpu {

struct UpdateArgs {
  PassArgs pass;
  const float* networks;
  const int64_t* network_of;
  const Step* steps;
  double *param_squares, *update_squares;
  const double* squares;
  const int64_t* keys;  // of the items, where state is rounded
};

// ------------------------------------------------------------------------------------------ before

constexpr int SLICES = 4;  // blocks that share an item

// A network as the lanes of a warp keep it, by a warp.
template <int kParts>
__device__ __forceinline__ void pack_network(const float* net, uint32_t* packed) {
  using P = PackedNetwork<false, 32>;
  using Weights = lanes::LaneWeights<kParts>;
  static_assert(sizeof(Weights) % 4 == 0 && sizeof(Weights) * 32 <= NETWORK_WORDS * 4,
                "NETWORK_WORDS is too small");
  const lanes::NetworkPointers from{net,
                                    P::INPUTS,
                                    net + P::INPUT_BIAS,
                                    net + P::HIDDEN,
                                    net + P::HIDDEN_BIAS,
                                    net + P::OUTPUT,
                                    net + P::OUTPUT_BIAS};
  lanes::DeviceWarp::Each<Weights> weights;
  lanes::Scales<lanes::DeviceWarp> scales;
  lanes::load_network<lanes::DeviceWarp, kParts>(weights, scales, from, false);
  uint32_t words[sizeof(Weights) / 4];
  memcpy(words, &weights[threadIdx.x], sizeof(Weights));
#pragma unroll
  for (unsigned w = 0; w < sizeof(Weights) / 4; ++w) packed[w * 32 + threadIdx.x] = words[w];
}

// Normalisers (leads, inputs) of every item, its global sum of p^2, and 0 for what is summed next:
// SLICES blocks per item. Then, where kParts is not 0, a block per network that packs it.
template <bool Extended, int kParts>
__global__ void __launch_bounds__(128)
    prepare_kernel(const __grid_constant__ Head head, const UpdateArgs args) {
  using L = Layout<Extended>;
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.pass.tables;
  const int64_t i = blockIdx.x / SLICES, slice = blockIdx.x % SLICES;
  if constexpr (kParts > 0) {
    const int64_t network = static_cast<int64_t>(blockIdx.x) - SLICES * tables.num_items;
    if (network >= 0) {
      if (threadIdx.x < 32) {
        pack_network<kParts>(args.networks + network * PackedNetwork<false, 32>::SIZE,
                             tables.networks + network * NETWORK_WORDS);
      }
      return;
    }
  }
  if (slice == 0) keep_live(head, tables, i);
  const Live live = live_at(head, tables, i);
  if (!is_active(live)) return;
  const Item& item = tables.items[i];
  const double* sums = live.b + item.b_at;
  const int num = item.factored ? L::SUMS_FACTORED : L::SUMS_DIAG;
  float* to = tables.normalisers + tables.normalisers_at[i];
  for (int64_t at = slice * blockDim.x + threadIdx.x; at < item.leads * L::INPUTS;
       at += SLICES * blockDim.x) {
    const int64_t lead = at / L::INPUTS, f = at % L::INPUTS, factor = f - L::FIRST_FACTOR;
    double sum;
    if (factor >= 12) {
      sum = sums[(num - (L::INPUTS - f)) * item.leads + lead];
    } else if (factor < 0) {
      sum = sums[f * item.leads + lead];
    } else if (item.factored) {
      sum = args.squares[item.squares_at + factor * item.leads + lead];
    } else {  // D twice, then its rsqrt twice
      sum = sums[(L::FIRST_FACTOR + factor / 6 * K + factor % K) * item.leads + lead];
    }
    to[at] = normaliser(sum, static_cast<double>(item.lead_numel), args.pass.rule.eps_normalise);
  }
  if (slice != 0) return;
  double total = 0.0;
  for (int64_t l = threadIdx.x; l < item.leads; l += blockDim.x)
    total += sums[L::P * item.leads + l];
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    args.param_squares[i] = total;
    args.update_squares[i] = 0.0;
  }
}

template <int kParts>
__device__ __forceinline__ void unpack_weights(lanes::LaneWeights<kParts>& weights,
                                               const uint32_t* packed, int lane) {
  uint32_t words[sizeof(weights) / 4];
#pragma unroll
  for (unsigned w = 0; w < sizeof(weights) / 4; ++w) words[w] = packed[w * 32 + lane];
  memcpy(&weights, words, sizeof(weights));
}

// ------------------------------------------------------------------------------------------- after

// Writes where a job's elements went, and, in the block that finishes an item, their sum.
__device__ __forceinline__ void finish_job(const UpdateArgs& args, int64_t j, int64_t i,
                                           double change, double* scratch) {
  const Tables& tables = args.pass.tables;
  change = block_sum(change, scratch);
  if (threadIdx.x == 0) tables.partials[j] = change;
  const ItemRange range = tables.ranges[i];
  if (is_last(&tables.counters[i], static_cast<unsigned>(range.last_job - range.first_job))) {
    double sum = 0.0;
    for (int64_t at = range.first_job + threadIdx.x; at < range.last_job; at += blockDim.x)
      sum += tables.partials[at];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) args.update_squares[i] = sum;
  }
}

// The new value of an element, or its direction; to `change` the square of it.
__device__ __forceinline__ void move_element(const Live& live, int64_t at, float p, float o0,
                                             float o1, const Step& step, LastingSum& change) {
  const float direction = direction_of(o0, o1, step.exp_mult);
  if (live.direction) {
    live.direction[at] = direction * step.step_size;
    return;
  }
  const float now = moved(p, direction, step);
  store_float(live.value, value_type(live), at, now);
  change.add_square(now - p);
}

// ----------------------------------------------------------------------------------------- float32

// A network in shared memory, weights of an input beside each other, and the normalisers where an
// item has one set of them.
template <bool Extended, int H>
struct SharedNetwork {
  using P = PackedNetwork<Extended, H>;
  alignas(16) float input[P::INPUTS][H];
  alignas(16) float hidden[H][H];  // [unit][input]
  float output[H][2];
  float input_bias[H], hidden_bias[H], output_bias[2];

  // times: what the weights of an input are multiplied by, or null
  __device__ void load(const float* net, const float* times) {
    for (int i = threadIdx.x; i < H * P::INPUTS; i += blockDim.x) {
      const int f = i % P::INPUTS;
      input[f][i / P::INPUTS] = times ? net[i] * times[f] : net[i];
    }
    for (int i = threadIdx.x; i < H * H; i += blockDim.x) hidden[i / H][i % H] = net[P::HIDDEN + i];
    for (int i = threadIdx.x; i < 2 * H; i += blockDim.x) output[i % H][i / H] = net[P::OUTPUT + i];
    for (int i = threadIdx.x; i < H; i += blockDim.x) {
      input_bias[i] = net[P::INPUT_BIAS + i];
      hidden_bias[i] = net[P::HIDDEN_BIAS + i];
    }
    if (threadIdx.x < 2) output_bias[threadIdx.x] = net[P::OUTPUT_BIAS + threadIdx.x];
  }
};

// acc_h += x w_h
template <int H>
__device__ __forceinline__ void feed(float (&acc)[H], float x, const float* weights) {
#pragma unroll
  for (int h = 0; h < H; ++h) acc[h] = fma_(x, weights[h], acc[h]);
}

template <bool Extended, int H>
__device__ __forceinline__ void hidden_and_output(const SharedNetwork<Extended, H>& net,
                                                  float (&first)[H], float& o0, float& o1) {
#pragma unroll
  for (int h = 0; h < H; ++h) first[h] = relu_(first[h]);
  o0 = net.output_bias[0];
  o1 = net.output_bias[1];
#pragma unroll 1
  for (int h = 0; h < H; ++h) {
    float sum = net.hidden_bias[h];
#pragma unroll
    for (int i = 0; i < H; ++i) sum = fma_(first[i], net.hidden[h][i], sum);
    sum = relu_(sum);
    o0 = fma_(sum, net.output[h][0], o0);
    o1 = fma_(sum, net.output[h][1], o1);
  }
}

// One element of a job: features, network, new state and value. norm: normalisers of the element's
// lead.
template <bool Extended, int H, bool Diag, int State>
__device__ __forceinline__ void update_element(const UpdateArgs& args,
                                               const SharedNetwork<Extended, H>& net, int64_t i,
                                               const Item& item, const Live& live,
                                               const Factors& factors, const Place& at,
                                               const float* norm, float scale, const Step& step,
                                               LastingSum& change) {
  using L = Layout<Extended>;
  Element<float, Extended> e;
  read_element<Extended, Diag, State>(e, live, item, factors, at, scale, args.pass.rule);
  float acc[H], constant[H];
#pragma unroll
  for (int h = 0; h < H; ++h) {
    acc[h] = net.input_bias[h];
    constant[h] = 0.0f;
  }
  const bool vector_is_row = item.vector_is_row != 0;
#pragma unroll
  for (int s = 0; s < SIDE; ++s) {
    const int k = s % K, row = side_input<Extended>(true, s), col = side_input<Extended>(false, s);
    float of_row, of_col;
    if constexpr (Diag) {
      of_row = s < K ? e.d[k] : factor_rsqrt_of(e.d[k]);
      of_col = of_row;
    } else {
      of_row = (s < K ? factors.row : factors.row_rsqrt)[k * factors.rows + at.row];
      of_col = (s < K ? factors.col : factors.col_rsqrt)[k * factors.cols + at.col];
    }
    of_row *= norm[row];
    of_col *= norm[col];
    feed<H>(acc, vector_is_row ? of_row : of_col, net.input[vector_is_row ? row : col]);
    feed<H>(constant, vector_is_row ? of_col : of_row, net.input[vector_is_row ? col : row]);
  }
#pragma unroll
  for (int h = 0; h < H; ++h) acc[h] += constant[h];
#pragma unroll
  for (int f = 0; f < L::ELEMENT; ++f)
    feed<H>(acc, e.x[f] * norm[L::input_of(f)], net.input[L::input_of(f)]);
  const auto store = [&](const uint32_t (&words)[2]) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      store_state<State>(live.momentum, k * item.numel + at.local, e.m[k],
                         random_of(words[k / 2], k));
      if constexpr (Diag) live.row_or_diag[k * item.numel + at.local] = e.d[k];
    }
    store_state<State>(live.rms, at.local, e.v, random_of(words[K / 2], K));
  };
  if constexpr (State == FLOAT32) store({});
  float o0, o1;
  hidden_and_output<Extended, H>(net, acc, o0, o1);
  if constexpr (State == BFLOAT16) {  // when fewer registers are taken
    keep_in_memory();
    uint32_t words[2];
    Words(static_cast<uint32_t>(args.keys[i])).get(global_index(item, at.local), words);
    store(words);
  }
  move_element(live, at.local, e.x[L::P], o0, o1, step, change);
}

// What a lane keeps of its four columns, out of the registers' way: scales, and the share that the
// factor along the run has in the first layer.
template <int H>
struct KeptColumns {
  alignas(16) float of[K + H][32][4];
  int64_t vectors[32];  // what they are of

  __device__ __forceinline__ float* at(int i) { return of[i][threadIdx.x & 31]; }
  __device__ __forceinline__ int64_t& vector() { return vectors[threadIdx.x & 31]; }
};

// C elements of a lane: what was read, then what is written; means in the order of their slots.
template <int C>
struct Elements {
  float g[C], p[C], means[K + 1][C];
};

// From elements to their two outputs; x.means become new. numbers: of their run. The
// normalisers are in the weights.
template <int H, int C>
__device__ __forceinline__ void outputs_of(Elements<C>& x, float (&o0)[C], float (&o1)[C],
                                           const SharedNetwork<true, H>& net, const float* numbers,
                                           KeptColumns<H>& kept, int column, float scale,
                                           const RuleConstants& rule) {
  using L = Layout<true>;
  Element<float, true> e[C];
  float acc[C][H];
#pragma unroll
  for (int c = 0; c < C; ++c) {
    float m[K], row[K], col[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      m[k] = x.means[k][c];
      row[k] = numbers[k];
      col[k] = kept.at(k)[column + c];
    }
    common_features<true>(e[c], used_gradient(x.g[c], scale, rule), x.p[c], m, x.means[K][c], rule);
    factored_features<true>(e[c], row, col);
#pragma unroll
    for (int k = 0; k < K; ++k) x.means[k][c] = e[c].m[k];
    x.means[K][c] = e[c].v;
#pragma unroll
    for (int h = 0; h < H; ++h) acc[c][h] = kept.at(K + h)[column + c] + numbers[4 + h];
  }
#pragma unroll
  for (int f = 0; f < L::ELEMENT; ++f) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      const float weight = net.input[L::input_of(f)][h];
#pragma unroll
      for (int c = 0; c < C; ++c) acc[c][h] = fma_(e[c].x[f], weight, acc[c][h]);
    }
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    o0[c] = net.output_bias[0];
    o1[c] = net.output_bias[1];
#pragma unroll
    for (int h = 0; h < H; ++h) acc[c][h] = relu_(acc[c][h]);
  }
#pragma unroll
  for (int h = 0; h < H; ++h) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float sum = net.hidden_bias[h];
#pragma unroll
      for (int i = 0; i < H; ++i) sum = fma_(acc[c][i], net.hidden[h][i], sum);
      sum = relu_(sum);
      o0[c] = fma_(sum, net.output[h][0], o0[c]);
      o1[c] = fma_(sum, net.output[h][1], o1[c]);
    }
  }
}

// The elements of a job with long runs, by warps; gives the sum of the squares of the change.
template <int H, int State, int Type, bool Fours>
__device__ __forceinline__ double update_runs(const SharedNetwork<true, H>& net,
                                              const UpdateRuns<4 + H, State>& runs,
                                              KeptColumns<H>& kept, bool row_varies,
                                              bool bias_along, const Step& step,
                                              const RuleConstants& rule) {
  const int left = runs.columns - lane_column<Fours>(0);
  LastingSum change;
  if (left <= 0) return 0.0;
  const auto move = [&](float p, float o0, float o1) {
    const float now = moved(p, direction_of(o0, o1, step.exp_mult), step);
    change.add_square(now - p);
    return now;
  };
  kept.vector() = -1;
#pragma unroll 1
  for (int r = threadIdx.x >> 5; r < runs.count; r += blockDim.x >> 5) {
    keep_in_memory();
    if (runs.at[r].vector != kept.vector()) {
      const int64_t held = kept.vector() = runs.at[r].vector;
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        const int column = lane_column<Fours>(j);
        const int64_t at = column < runs.columns ? held + column * runs.vector_step : held;
#pragma unroll
        for (int k = 0; k < K; ++k) kept.at(k)[j] = runs.vector[k][at];
#pragma unroll
        for (int h = 0; h < H; ++h) {
          float sum = bias_along ? net.input_bias[h] : 0.0f;
#pragma unroll
          for (int s = 0; s < SIDE; ++s)
            sum = fma_(runs.vector_side[s][at], net.input[side_input<true>(row_varies, s)][h], sum);
          kept.at(K + h)[j] = sum;
        }
      }
    }
    const int64_t at = runs.at[r].local + lane_column<Fours>(0);
    const int g_type = runs.grad_type, p_type = runs.value_type;
    if constexpr (Fours) {
      ElementFours<Type, State> of;
      of.load(runs, g_type, p_type, at);
      Elements<4> x;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x.g[j] = of.g.get(j, g_type);
        x.p[j] = of.p.get(j, p_type);
#pragma unroll
        for (int k = 0; k < K; ++k) x.means[k][j] = of.m[k].get(j, State);
        x.means[K][j] = of.v.get(j, State);
      }
      float o0[4], o1[4];
      outputs_of<H, 4>(x, o0, o1, net, runs.numbers[r], kept, 0, runs.scale, rule);
      store_means(runs, r, lane_column<Fours>(0), at, x.means);
      if (runs.direction) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          runs.direction[at + j] = direction_of(o0[j], o1[j], step.exp_mult) * step.step_size;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) of.p.set(j, move(x.p[j], o0[j], o1[j]), p_type);
        of.p.store(runs.value, p_type, at);
      }
    } else {
#pragma unroll 1
      for (int j = 0; 32 * j < left; ++j) {
        const int64_t here = at + 32 * j;
        Elements<1> x{{load_as_float(runs.grad, g_type, here)},
                      {load_as_float(runs.value, p_type, here)},
                      {{load_as_float(runs.means[0], State, here)},
                       {load_as_float(runs.means[1], State, here)},
                       {load_as_float(runs.means[2], State, here)},
                       {load_as_float(runs.means[K], State, here)}}};
        float o0[1], o1[1];
        outputs_of<H, 1>(x, o0, o1, net, runs.numbers[r], kept, j, runs.scale, rule);
        uint32_t words[2] = {};
        if constexpr (State == BFLOAT16) {
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            words[pair] = runs.are_neighbours() ? runs.word(pair, r, lane_column<Fours>(j))
                                                : runs.word_at(pair, here);
          }
        }
#pragma unroll
        for (int s = 0; s <= K; ++s) {
          store_state<State>(runs.means[s], here, x.means[s][0], random_of(words[s / 2], s));
        }
        if (runs.direction)
          runs.direction[here] = direction_of(o0[0], o1[0], step.exp_mult) * step.step_size;
        else
          store_float(runs.value, p_type, here, move(x.p[0], o0[0], o1[0]));
      }
    }
  }
  return change.get();
}

template <bool Extended, int H>
struct ScalarShared {
  SharedNetwork<Extended, H> network;
  float norm[PackedNetwork<Extended, H>::INPUTS];
};

// What the small networks need beside, for long runs.
template <int H, int State>
struct RunsShared {
  UpdateRuns<4 + H, State> runs;
  KeptColumns<H> kept[4];
};
template <int State>
struct RunsShared<32, State> {};

// A job of a rule with a small network: the normalisers are folded into its weights.
template <int H, int State>
__device__ __forceinline__ double update_small(const UpdateArgs& args, const Job& job,
                                               const Box& box, const Item& item, const Live& live,
                                               const SharedNetwork<true, H>& net,
                                               RunsShared<H, State>& shared) {
  const bool row_varies = box.row[INNER] != 0, bias_along = row_varies == (item.vector_is_row != 0);
  UpdateRuns<4 + H, State>& runs = shared.runs;
  const Step step = args.steps[box.item];
  const auto number = [&](int64_t at, float (&numbers)[4 + H]) {
    for (int k = 0; k < K; ++k) numbers[k] = runs.constant[k][at];
    for (int h = 0; h < H; ++h) numbers[4 + h] = bias_along ? 0.0f : net.input_bias[h];
    for (int s = 0; s < SIDE; ++s) {
      const float x = runs.constant_side[s][at];
      const float* weights = net.input[side_input<true>(!row_varies, s)];
      for (int h = 0; h < H; ++h) numbers[4 + h] = fma_(x, weights[h], numbers[4 + h]);
    }
  };
  runs.set(live, item, box, job, factors_on_device(item, live, args.pass.factors),
           static_cast<float>(args.pass.scale[box.item]), args.keys, number);
  KeptColumns<H>& kept = shared.kept[threadIdx.x >> 5];
  const RuleConstants& rule = args.pass.rule;
  if (!in_fours<State>(live, item, box, job) || !runs.are_neighbours())
    return update_runs<H, State, ANY_TYPE, false>(net, runs, kept, row_varies, bias_along, step,
                                                  rule);
  if (runs.grad_type != FLOAT32 || runs.value_type != FLOAT32)
    return update_runs<H, State, ANY_TYPE, true>(net, runs, kept, row_varies, bias_along, step,
                                                 rule);
  return update_runs<H, State, FLOAT32, true>(net, runs, kept, row_varies, bias_along, step, rule);
}

template <bool Extended, int H, int State>
__device__ __forceinline__ void scalar_job(const UpdateArgs& args, int64_t j, const Job& job,
                                           ScalarShared<Extended, H>& shared,
                                           RunsShared<H, State>& of_runs, int64_t& loaded,
                                           double* scratch) {
  constexpr int INPUTS = PackedNetwork<Extended, H>::INPUTS;
  const Tables& tables = args.pass.tables;
  const Box& box = tables.boxes[job.box];
  const int64_t i = box.item;
  const Item& item = tables.items[i];
  const Live& live = tables.live[i];
  const float* norms = tables.normalisers + tables.normalisers_at[i];
  double change = 0.0;
  if (args.pass.moves[i]) {  // alike in all threads
    const int64_t network = args.network_of[i];
    __syncthreads();  // nobody reads the last job's
    // in the weights of the small networks, of which one more reading costs nothing
    const bool folded = Extended && !has_small_leads(item);
    if (network != loaded || Extended) {
      shared.network.load(args.networks + network * PackedNetwork<Extended, H>::SIZE,
                          folded ? norms + job.lead * INPUTS : nullptr);
    }
    loaded = network;
    for (int f = threadIdx.x; f < INPUTS; f += blockDim.x)
      shared.norm[f] = folded ? 1.0f : norms[f];
    __syncthreads();
    if constexpr (Extended) {
      if (folded && has_long_runs(item, box)) {
        change = update_small<H, State>(args, job, box, item, live, shared.network, of_runs);
        finish_job(args, j, i, change, scratch);
        return;
      }
    }
    const Factors of_item = factors_on_device(item, live, args.pass.factors);
    const float scale = static_cast<float>(args.pass.scale[i]);
    const Step step = args.steps[i];
    const JobShape shape(job);
    const uint32_t numel = job_numel(job);
    LastingSum sum;
#pragma unroll 1
    for (uint32_t e = threadIdx.x; e < numel; e += blockDim.x) {
      if constexpr (State == BFLOAT16) keep_in_memory();
      const Factors factors =
          State == FLOAT32 ? of_item : factors_on_device(item, live, args.pass.factors);
      const Place at = shape.place(box, e);
      const float* norm = item.leads > 1 && !folded ? norms + at.lead * INPUTS : shared.norm;
      if (item.factored)
        update_element<Extended, H, false, State>(args, shared.network, i, item, live, factors, at,
                                                  norm, scale, step, sum);
      else
        update_element<Extended, H, true, State>(args, shared.network, i, item, live, factors, at,
                                                 norm, scale, step, sum);
    }
    change = sum.get();
  }
  finish_job(args, j, i, change, scratch);
}

// What nvcc needs to be told, so that none of these spills (0: nothing).
constexpr int scalar_threads(int hidden) { return hidden == 32 ? 256 : 128; }
constexpr int scalar_blocks(int hidden) { return hidden == 32 ? 0 : hidden == 8 ? 3 : 4; }

template <bool Extended, int H, int State>
__global__ void __launch_bounds__(scalar_threads(H), scalar_blocks(H))
    scalar_kernel(const UpdateArgs args) {
  __shared__ ScalarShared<Extended, H> shared;
  __shared__ RunsShared<H, State> of_runs;
  __shared__ double scratch[MOST_WARPS];
  int64_t loaded = -1;
  const Tables& tables = args.pass.tables;
  for (int64_t j = blockIdx.x; j < tables.num_jobs; j += gridDim.x) {
    const Job& job = tables.jobs[j];
    if (!is_active(tables.live[tables.boxes[job.box].item])) continue;
    scalar_job<Extended, H, State>(args, j, job, shared, of_runs, loaded, scratch);
  }
}

// ------------------------------------------------------------------------------------ tensor cores

// A row or column side of one element: normalised factor and rsqrt in float16, and the scale.
template <int kParts>
struct LaneSide {
  uint32_t packed[kParts];
  float scale;
};

// What the constant side of decay k is for a run, as a lane with t == k + 1 takes it; nothing for
// t == 0.
template <int kParts>
struct RunSides {
  LaneSide<kParts> of[4];
};

template <int kParts, int State>
using LaneRuns = UpdateRuns<sizeof(RunSides<kParts>) / 4, State>;

// A lane's sides of its four columns, out of the registers' way: words, and last the scale.
template <int kParts>
struct KeptSides {
  alignas(16) uint32_t words[kParts + 1][32][4];
  int64_t vectors[32];  // what they are of
};

// What is alike in all quads. Where the accumulators of the hidden layers begin is read as they are
// laid out, so that no move is needed; then the normalisers of a lane's slots, and the step.
struct KeptNumbers {
  alignas(16) float of[2][lanes::kTiles][4][4];
  alignas(16) float norm[4][4];
  Step step;

  template <int kParts>
  __device__ __forceinline__ void set(const lanes::LaneWeights<kParts>& weights) {
    if (threadIdx.x >= 4) return;
#pragma unroll
    for (int i = 0; i < lanes::kTiles; ++i) {
#pragma unroll
      for (int layer = 0; layer < 2; ++layer) {
        const lanes::Accumulator x = lanes::bias_of<kParts>(weights, layer, i);
#pragma unroll
        for (int j = 0; j < 4; ++j) of[layer][i][threadIdx.x][j] = x.x[j];
      }
    }
  }
  __device__ __forceinline__ lanes::Accumulator get(int lane, int layer, int i) const {
    const float* x = of[layer][i][lane & 3];
    return lanes::Accumulator{{x[0], x[1], x[2], x[3]}};
  }
};

// The stream of a lane: p in lane 0 of a quad, m_k in lane k; lane 0 writes v.
struct Stream {
  int slot;
  const void* from;
  void* to;
  int type;

  template <int N>
  __device__ __forceinline__ Stream(const Runs<N>& runs, int t, int k, int state)
      : slot(t == 0 ? K : t - 1),
        from(t == 0 ? runs.value : runs.means[k]),
        to(t == 0 ? runs.means[K] : runs.means[k]),
        type(t == 0 ? runs.value_type : state) {}
};

// What a lane reads of four neighbours: its own stream, g and v; and of the one that it moves, p.
template <int Type, int State, bool Fours>
struct LaneElements {
  Four<Type> own, g;
  Four<State> v;
  float p;

  template <int N>
  __device__ __forceinline__ void load(const Runs<N>& runs, const Stream& stream, int64_t at, int t,
                                       int left) {
    const int g_type = runs.grad_type;
    if constexpr (Fours) {
      if (left > 0) {
        own.load(stream.from, stream.type, at);
        g.load(runs.grad, g_type, at);
        v.load(runs.means[K], State, at);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= left) continue;
        own.set(i, load_as_float(stream.from, stream.type, at + i), stream.type);
        g.set(i, load_as_float(runs.grad, g_type, at + i), g_type);
        v.set(i, load_as_float(runs.means[K], State, at + i), State);
      }
    }
    if (t < left) p = load_as_float(runs.value, Four<Type>::type_of(runs.value_type), at + t);
  }
  __device__ __forceinline__ float get(int i, const Stream& stream, int, int) const {
    return own.get(i, stream.type);
  }
  __device__ __forceinline__ float get_p(int, int) const { return p; }
};

// Fours of means in 16 bits are not read as those of values are: all lanes of a quad read p, and
// lane 0 what lane 1 does.
template <int Type>
struct LaneElements<Type, BFLOAT16, true> {
  Four<Type> p, g;
  Four<BFLOAT16> m, v;

  template <int N>
  __device__ __forceinline__ void load(const Runs<N>& runs, const Stream&, int64_t at, int t,
                                       int left) {
    if (left <= 0) return;
    p.load(runs.value, runs.value_type, at);
    g.load(runs.grad, runs.grad_type, at);
    m.load(runs.means[t > 0 ? t - 1 : 0], BFLOAT16, at);
    v.load(runs.means[K], BFLOAT16, at);
  }
  __device__ __forceinline__ float get(int i, const Stream&, int t, int p_type) const {
    const float of_p = p.get(i, p_type), of_m = m.get(i, BFLOAT16);
    return t > 0 ? of_m : of_p;
  }
  // value by value, so that they stay in registers
  __device__ __forceinline__ float get_p(int t, int p_type) const {
    float mine = p.get(0, p_type);
#pragma unroll
    for (int i = 1; i < 4; ++i) {
      const float other = p.get(i, p_type);
      mine = t == i ? other : mine;
    }
    return mine;
  }
};

// Quad q of a warp holds columns 4 q .. 4 q + 3 of a strip of 32: rows q and q + 8 of two products.
// Lane t of it moves column 4 q + t.
template <int kParts, int State, int Type, bool Fours>
__device__ __forceinline__ double tensor_core_runs(
    const LaneRuns<kParts, State>& runs, KeptSides<kParts>& kept_sides, const KeptNumbers& numbers,
    const float* norms, bool row_varies, const RuleConstants& rule,
    const lanes::DeviceWarp::Each<lanes::LaneWeights<kParts>>& weights) {
  const unsigned thread = State == FLOAT32 ? threadIdx.x : thread_again();
  const int lane = thread & 31, warp = thread >> 5, q = lane >> 2, t = lane & 3,
            k = t > 0 ? t - 1 : 0;
  const int strips = (runs.columns + 31) / 32, warps = blockDim.x >> 5;
  const int warps_per_strip = warps / strips > 0 ? warps / strips : 1, turn = warp / strips;
  const int column = 32 * (warp % strips) + 4 * q;
  const int left = turn < warps_per_strip ? runs.columns - column : 0;
  const Stream stream(runs, t, k, State);
  const float old = rule.momentum_old[k], now = rule.momentum_new[k];
  const auto read = [&](LaneElements<Type, State, Fours>& e, int64_t at) {
    e = LaneElements<Type, State, Fours>{};
    e.load(runs, stream, at, t, left);
  };

  LastingSum change;
  kept_sides.vectors[lane] = -1;
  LaneElements<Type, State, Fours> next;
  int r = turn < warps_per_strip ? turn : runs.count;
  if (r < runs.count) read(next, runs.at[r].local + column);
#pragma unroll 1
  for (; r < runs.count; r += warps_per_strip) {
    keep_in_memory();
    const int64_t at = runs.at[r].local + column;
    const LaneElements<Type, State, Fours> e = next;
    if (r + warps_per_strip < runs.count)
      read(next, runs.at[r + warps_per_strip].local + column);  // on its way meanwhile
    __syncwarp();  // what a lane overwrites below, the others have read
    if (runs.at[r].vector != kept_sides.vectors[lane]) {
      const int64_t held = kept_sides.vectors[lane] = runs.at[r].vector;
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const bool here = i < left && t > 0;
        const int64_t of = held + (column + i) * runs.vector_step;
        uint32_t words[kParts];
        lanes::split<kParts>(
            here ? runs.vector_side[k][of] * norms[side_input<false>(row_varies, k)] : 0.0f,
            here ? runs.vector_side[K + k][of] * norms[side_input<false>(row_varies, K + k)] : 0.0f,
            words);
        for (int part = 0; part < kParts; ++part) kept_sides.words[part][lane][i] = words[part];
        const float scale = here ? runs.vector[k][of] : 0.0f;
        memcpy(&kept_sides.words[kParts][lane][i], &scale, 4);
      }
    }
    LaneSide<kParts> along[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        along[i].packed[part] = kept_sides.words[part][lane][i];
      memcpy(&along[i].scale, &kept_sides.words[kParts][lane][i], 4);
    }
    const LaneSide<kParts> across =
        reinterpret_cast<const RunSides<kParts>&>(runs.numbers[r]).of[t];
    const float p = e.get_p(t, runs.value_type);
    lanes::DeviceWarp::Each<lanes::Accumulator> out[2];
    Four<FLOAT32> kept;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      keep_in_memory();
      const float* const norm = numbers.norm[t];
      float slots[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = 2 * tile + half;
        const float g = used_gradient(e.g.get(i, runs.grad_type), runs.scale, rule);
        const float v = fma_(g * rule.rms_new, g, e.v.get(i, State) * rule.rms_old);
        const float rs = rsqrt_(v + rule.eps_rms);
        const float x = e.get(i, stream, t, runs.value_type),
                    m = t == 0 ? x : fma_(g, now, x * old);
        const float f = along[i].scale * across.scale;
        slots[half][0] = (t == 0 ? g : m) * norm[0];
        slots[half][1] = (t == 0 ? m : m * rs) * norm[1];
        slots[half][2] = (t == 0 ? v : f * g) * norm[2];
        slots[half][3] = (t == 0 ? rs : f * m) * norm[3];
        kept.set(i, t == 0 ? v : m, FLOAT32);
      }
      lanes::DeviceWarp::Each<lanes::LaneInputs<kParts>> in;
      lanes::pack_inputs<kParts>(in[lane], 0, slots[0], slots[1]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t (&words)[4] = in[lane].step[1][part].r;
        words[0] = along[2 * tile].packed[part];
        words[1] = along[2 * tile + 1].packed[part];
        words[2] = words[3] = across.packed[part];
      }
      lanes::network<lanes::DeviceWarp, kParts>(
          weights, in, out[tile],
          [&](int of_lane, int layer, int i) { return numbers.get(of_lane, layer, i); });
    }
    if constexpr (State == FLOAT32 && Fours) {
      if (left > 0) kept.store(stream.to, FLOAT32, at);
    } else if constexpr (State == FLOAT32) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < left) static_cast<float*>(stream.to)[at + i] = kept.get(i, FLOAT32);
    } else if constexpr (Fours) {
      keep_in_memory();  // words are made when they are used
      Four<BFLOAT16> halved;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float x = kept.get(i, FLOAT32), y = kept.get(i + 1, FLOAT32);
        const uint32_t of_x = half_of(runs.word(stream.slot / 2, r, column + i), stream.slot % 2),
                       of_y =
                           half_of(runs.word(stream.slot / 2, r, column + i + 1), stream.slot % 2);
        halved.words[i / 2] = is_usual(x) & is_usual(y) ? round_two<true>(x, y, of_x, of_y)
                                                        : round_two<false>(x, y, of_x, of_y);
      }
      if (left > 0) halved.store(runs.means[stream.slot], BFLOAT16, at);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= left) continue;
        const uint32_t word = runs.are_neighbours() ? runs.word(stream.slot / 2, r, column + i)
                                                    : runs.word_at(stream.slot / 2, at + i);
        store_state<State>(stream.to, at + i, kept.get(i, FLOAT32), half_of(word, stream.slot % 2));
      }
    }
    float mine[2];  // value by value: a choice between accumulators would put them into memory
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const float low = t & 1 ? out[0][lane].x[2 + o] : out[0][lane].x[o],
                  high = t & 1 ? out[1][lane].x[2 + o] : out[1][lane].x[o];
      mine[o] = t < 2 ? low : high;
    }
    if (t < left) {
      const float direction = direction_of(mine[0], mine[1], numbers.step.exp_mult);
      if (runs.direction) {
        runs.direction[at + t] = direction * numbers.step.step_size;
      } else {
        const float moved_to = moved(p, direction, numbers.step);
        store_float(runs.value, Four<Type>::type_of(runs.value_type), at + t, moved_to);
        change.add_square(moved_to - p);
      }
    }
  }
  return change.get();
}

template <int kParts, int State>
__device__ __forceinline__ double tensor_core_job(
    const UpdateArgs& args, const Job& job, const Box& box, const Item& item, const Live& live,
    LaneRuns<kParts, State>& runs, KeptSides<kParts>& kept, KeptNumbers& numbers,
    const lanes::DeviceWarp::Each<lanes::LaneWeights<kParts>>& weights) {
  const bool row_varies = box.row[INNER] != 0;
  const float* norms = args.pass.tables.normalisers + args.pass.tables.normalisers_at[box.item];
  const RuleConstants& rule = args.pass.rule;
  if (threadIdx.x < 16) {
    const int t = threadIdx.x >> 2, slot = threadIdx.x & 3;
    numbers.norm[t][slot] = norms[lanes::feature_of_slot(false, t, slot)];
  }
  if (threadIdx.x == 0) numbers.step = args.steps[box.item];
  const auto number = [&](int64_t at, float (&of_run)[sizeof(RunSides<kParts>) / 4]) {
    RunSides<kParts>& sides = reinterpret_cast<RunSides<kParts>&>(of_run);
    sides.of[0] = LaneSide<kParts>{};
    for (int k = 0; k < K; ++k) {
      lanes::split<kParts>(
          runs.constant_side[k][at] * norms[side_input<false>(!row_varies, k)],
          runs.constant_side[K + k][at] * norms[side_input<false>(!row_varies, K + k)],
          sides.of[1 + k].packed);
      sides.of[1 + k].scale = runs.constant[k][at];
    }
  };
  runs.set(live, item, box, job, factors_on_device(item, live, args.pass.factors),
           static_cast<float>(args.pass.scale[box.item]), args.keys, number);
  if (!in_fours<State>(live, item, box, job) || !runs.are_neighbours())
    return tensor_core_runs<kParts, State, ANY_TYPE, false>(runs, kept, numbers, norms, row_varies,
                                                            rule, weights);
  if (runs.grad_type != FLOAT32 || runs.value_type != FLOAT32)
    return tensor_core_runs<kParts, State, ANY_TYPE, true>(runs, kept, numbers, norms, row_varies,
                                                           rule, weights);
  return tensor_core_runs<kParts, State, FLOAT32, true>(runs, kept, numbers, norms, row_varies,
                                                        rule, weights);
}

template <int kParts, int State>
__global__ void __launch_bounds__(128, 2) tensor_core_kernel(const UpdateArgs args) {
  __shared__ ScalarShared<false, 32> shared;
  __shared__ RunsShared<32, State> none;
  __shared__ LaneRuns<kParts, State> runs;
  __shared__ KeptSides<kParts> kept[4];
  __shared__ KeptNumbers numbers;
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.pass.tables;
  const int lane = threadIdx.x & 31, num_jobs = static_cast<int>(tables.num_jobs);
#pragma unroll 1
  for (int j = blockIdx.x; j < num_jobs; j += gridDim.x) {
    const Job& job = tables.jobs[j];
    const Box& box = tables.boxes[job.box];
    const Item& item = tables.items[box.item];
    const Live& live = tables.live[box.item];
    if (!is_active(live) || !has_long_runs(item, box)) continue;
    double change = 0.0;
    if (args.pass.moves[box.item]) {
      // read anew for every job: next to its elements that costs nothing, and between jobs nothing
      // is kept in registers
      lanes::DeviceWarp::Each<lanes::LaneWeights<kParts>> weights;
      unpack_weights<kParts>(weights[lane],
                             tables.networks + args.network_of[box.item] * NETWORK_WORDS, lane);
      // the side that changes along a run comes first
      if (box.row[INNER] == 0) lanes::swap_sides<kParts>(weights[lane]);
      numbers.set<kParts>(weights[lane]);
      change = tensor_core_job<kParts, State>(args, job, box, item, live, runs,
                                              kept[threadIdx.x >> 5], numbers, weights);
    }
    finish_job(args, j, box.item, change, scratch);
  }
  int64_t loaded = -1;
#pragma unroll 1
  for (int j = blockIdx.x; j < num_jobs; j += gridDim.x) {
    const Job& job = tables.jobs[j];
    const Box& box = tables.boxes[job.box];
    if (!is_active(tables.live[box.item]) || has_long_runs(tables.items[box.item], box)) continue;
    scalar_job<false, 32, State>(args, j, job, shared, none, loaded, scratch);
  }
}

}  // namespace gpu
}  // namespace pylo_dist
