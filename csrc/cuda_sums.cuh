// Pass B on a GPU: the factors of every item, then the sums of squares of the element features,
// added as in cuda_gradients.cuh.
#pragma once

#include "cuda_runs.cuh"

namespace pylo_dist {
namespace gpu {

struct PassArgs {
  Tables tables;
  RuleConstants rule;
  const bool* moves;
  const double* scale;
  float* factors;
  double* squares;
};

// The mean over the middle of row (outer, middle, inner), and from it the row's scale. `lanes`
// threads share a mean.
__device__ __forceinline__ void scale_rows(const Item& item, const float* row, float* to,
                                           int64_t group, int thread, int threads,
                                           double* scratch) {
  int64_t inner;
  const int64_t outer = divide(group, item.row_inner, inner),
                at = outer * item.size_d1 * item.row_inner + inner;
  double sum = 0.0;
  for (int64_t i = thread; i < item.size_d1; i += threads) sum += row[at + i * item.row_inner];
  sum = scratch ? block_sum(sum, scratch) : warp_sum(sum);
  const float mean = static_cast<float>(sum / static_cast<double>(item.size_d1));
  for (int64_t i = thread; i < item.size_d1; i += threads) {
    to[at + i * item.row_inner] = row_scale_of(row[at + i * item.row_inner], mean);
  }
}

// Sum over the elements of a lead of the squares of a factor, by one warp.
__device__ __forceinline__ double lead_square(const Item& item, const float* x, bool is_row,
                                              int64_t lead, int lane) {
  const int64_t* strides = is_row ? item.lead_row : item.lead_col;
  const int64_t* matrix = is_row ? item.matrix_row : item.matrix_col;
  int64_t at = 0;
  for (int d = MAX_LEAD_DIMS - 1; d >= 0; --d) {
    int64_t j;
    lead = divide(lead, item.lead_sizes[d], j);
    at += j * strides[d];
  }
  const int64_t rows = matrix[0] ? item.matrix_sizes[0] : 1,
                cols = matrix[1] ? item.matrix_sizes[1] : 1;
  double sum = 0.0;
  for (int64_t i = lane; i < rows * cols; i += 32) {
    int64_t c;
    const int64_t r = divide(i, cols, c);
    const double value = x[at + r * matrix[0] + c * matrix[1]];
    sum += value * value;
  }
  return warp_sum(sum) * (static_cast<double>(item.lead_numel) / static_cast<double>(rows * cols));
}

// A side of an item: a factor's state, and what the passes read of it.
struct FactorSide {
  float *state, *scale, *rsqrt;
  int64_t size;

  __device__ __forceinline__ FactorSide(const Item& item, const Live& live, float* factors,
                                        int64_t side)
      : state(side == ROW ? live.row_or_diag : live.col),
        scale(factors + item.factors_at + (side == ROW ? 0 : K * item.rows)),
        rsqrt(scale + K * (item.rows + item.cols)),  // as Factors lie
        size(side == ROW ? item.rows : item.cols) {}
};

// New state of a factor's entries, a thread each. To `partials`: the sums of the new entries, of
// their squares and of those of their rsqrt, for every decay.
__device__ __forceinline__ void update_entries(const PassArgs& args, const EntryJob& job,
                                               const Item& item, const Live& live, double* partials,
                                               double* scratch) {
  const int64_t side = job.side;
  const FactorSide of(item, live, args.factors, side);
  const double* means = live.a + item.a_at + (side == ROW ? 0 : item.rows);
  const double by = args.scale[job.item] * args.scale[job.item] /
                    static_cast<double>(side == ROW ? item.size_d0 : item.size_d1);
  const bool moves = args.moves[job.item];
  double sums[FACTOR_SUMS] = {};
  for (int64_t e = job.first + threadIdx.x; e < job.last; e += blockDim.x) {
    const double mean = means[e] * by;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t at = k * of.size + e;
      float x = of.state[at];
      if (moves) of.state[at] = x = update_factor(x, mean, k, args.rule);
      const float rsqrt = factor_rsqrt_of(x);
      of.rsqrt[at] = rsqrt;
      if (side == COLUMN) of.scale[at] = col_scale_of(x);
      sums[k] += x;
      sums[K + k] += static_cast<double>(x) * x;
      sums[2 * K + k] += static_cast<double>(rsqrt) * rsqrt;
    }
  }
#pragma unroll
  for (int s = 0; s < FACTOR_SUMS; ++s) {
    const double sum = block_sum(sums[s], scratch);
    if (threadIdx.x == 0) partials[s] = sum;
  }
}

// The sum number s over the entries of an item's side, by a block.
__device__ __forceinline__ double sum_of_entries(const Tables& tables, const ItemRange& range,
                                                 int64_t side, int s, double* scratch) {
  double sum = 0.0;
  for (int64_t j = range.first_entry_job + threadIdx.x; j < range.last_entry_job; j += blockDim.x) {
    if (tables.entry_jobs[j].side == side) sum += tables.partials[FACTOR_SUMS * j + s];
  }
  return block_sum(sum, scratch);
}

__device__ __forceinline__ void finish_factors(const PassArgs& args, const FactorJob& job,
                                               const Item& item, const Live& live,
                                               double* scratch) {
  const ItemRange range = args.tables.ranges[job.item];
  const FactorSide row(item, live, args.factors, ROW);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  double* squares = args.squares + item.squares_at;
#pragma unroll 1
  for (int k = 0; k < K; ++k) {
    const float* state = row.state + k * row.size;
    float* scale = row.scale + k * row.size;
    if (job.what == ENTRY_SCALES) {
      const double sum = sum_of_entries(args.tables, range, ROW, k, scratch);
      const float mean = static_cast<float>(sum / static_cast<double>(item.size_d1));
      for (int64_t r = job.first + threadIdx.x; r < job.last; r += blockDim.x)
        scale[r] = row_scale_of(state[r], mean);
    } else if (job.what == GROUP_SCALES && job.last - job.first == 1) {
      scale_rows(item, state, scale, job.first, threadIdx.x, blockDim.x, scratch);
    } else if (job.what == GROUP_SCALES) {
      for (int64_t g = job.first + warp; g < job.last; g += warps)
        scale_rows(item, state, scale, g, lane, 32, nullptr);
    } else {
#pragma unroll 1
      for (int64_t s = 0; s < 4; ++s) {  // row, col, their rsqrt
        const FactorSide of(item, live, args.factors, s % 2);
        double* to = squares + (s * K + k) * item.leads;
        if (item.leads == 1) {
          const double sum =
              sum_of_entries(args.tables, range, s % 2, (s < 2 ? K : 2 * K) + k, scratch);
          if (threadIdx.x == 0)
            *to = sum * (static_cast<double>(item.lead_numel) / static_cast<double>(of.size));
          continue;
        }
        const float* x = (s < 2 ? of.state : of.rsqrt) + k * of.size;
        for (int64_t l = job.first + warp; l < job.last; l += warps) {
          const double sum = lead_square(item, x, s % 2 == 0, l, lane);
          if (lane == 0) to[l] = sum;
        }
      }
    }
  }
}

// The factors' new state, and everything the passes read of them. First the entries, over as many
// blocks as it takes; then what needs all entries of an item, by blocks that wait for those. Sums
// are of partial sums in the order of the tables, whoever made them.
__global__ void __launch_bounds__(256)
    factor_kernel(const __grid_constant__ Head head, const PassArgs args) {
  __shared__ double scratch[MOST_WARPS];
  const Tables& tables = args.tables;
  unsigned* const done = tables.counters + 2 * tables.num_items;
  const int64_t turn = take_turn(done + tables.num_items, gridDim.x),
                second = turn - tables.num_entry_jobs;
  const int64_t i = second < 0 ? tables.entry_jobs[turn].item : tables.factor_jobs[second].item;
  const bool of_item = second < 0 && tables.entry_jobs[turn].side == NEITHER;
  if (of_item) keep_live(head, tables, i);
  const Live live = live_at(head, tables, i);
  const Item& item = tables.items[i];
  if (!is_active(live)) return;
  const ItemRange range = tables.ranges[i];
  const unsigned first = static_cast<unsigned>(range.last_entry_job - range.first_entry_job);
  if (second >= 0) {
    wait_for(&done[i], first);
    finish_factors(args, tables.factor_jobs[second], item, live, scratch);
  } else if (!of_item) {
    update_entries(args, tables.entry_jobs[turn], item, live, tables.partials + FACTOR_SUMS * turn,
                   scratch);
  }
  arrive(&done[i], first + static_cast<unsigned>(range.factor_jobs));
}

// What an element's features are made of.
struct Place {
  int64_t local, row, col, lead;
};

struct FactorScales {
  float row[K], col[K];
};

// New accumulators and element features of one element. Gives the scales they are made with.
template <bool Extended, bool Diag, int State>
__device__ __forceinline__ FactorScales read_element(Element<float, Extended>& e, const Live& live,
                                                     const Item& item, const Factors& factors,
                                                     const Place& at, float scale,
                                                     const RuleConstants& rule) {
  float m[K];
  FactorScales scales;
#pragma unroll
  for (int k = 0; k < K; ++k) m[k] = load_as_float(live.momentum, State, k * item.numel + at.local);
  const float g = used_gradient(load_as_float(live.grad, grad_type(live), at.local), scale, rule);
  const float p = load_as_float(live.value, value_type(live), at.local);
  common_features<Extended>(e, g, p, m, load_as_float(live.rms, State, at.local), rule);
  if constexpr (Diag) {
    float d[K];
#pragma unroll
    for (int k = 0; k < K; ++k) d[k] = live.row_or_diag[k * item.numel + at.local];
    diag_features<Extended>(e, d, rule);
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      scales.row[k] = factors.row_scale[k * factors.rows + at.row];
      scales.col[k] = factors.col_scale[k * factors.cols + at.col];
    }
    factored_features<Extended>(e, scales.row, scales.col);
  }
  return scales;
}

__device__ __forceinline__ Factors factors_on_device(const Item& item, const Live& live,
                                                     const float* factors) {
  const float* at = factors + item.factors_at;
  const int64_t r = K * item.rows, c = K * item.cols;
  return Factors{live.row_or_diag, live.col,       at,        at + r,
                 at + r + c,       at + 2 * r + c, item.rows, item.cols};
}

__device__ __forceinline__ double square(float x) { return Sum<true>::square(x); }

// sums[s] += the squares of what pass B sums, in its order, but for F(g) and F(m). Those of
// products are products of squares, in double: fewer conversions. Gives the squares of g and of m.
template <bool Extended, int N>
__device__ __forceinline__ void add_squares(Sum<true> (&sums)[N], const Element<float, Extended>& e,
                                            double& g, double (&m)[K]) {
  using L = Layout<Extended>;
  const double q = square(e.x[L::P + 8]);
  g = square(e.x[0]);
  sums[0].add(g);
  if constexpr (Extended) {
    sums[1].add_square(e.x[1]);
    sums[L::FIRST_FACTOR - 1].add(g * q);
  }
  sums[L::P].add_square(e.x[L::P]);
  sums[L::P + 4].add_square(e.v);
  sums[L::P + 8].add(q);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    m[k] = square(e.m[k]);
    sums[L::P + 1 + k].add(m[k]);
    sums[L::P + 5 + k].add(m[k] * q);
  }
}

// sums[s] += the squares of features first .. last of an element, as they are.
template <int first, int last, bool Extended, int N>
__device__ __forceinline__ void add_features(Sum<false> (&sums)[N],
                                             const Element<float, Extended>& e) {
#pragma unroll
  for (int f = first; f < last; ++f) sums[f].add_square(e.x[f]);
}

// All of an element's, on its own.
template <bool Extended, bool Diag, bool Double, int N>
__device__ __forceinline__ void add_element(Sum<Double> (&sums)[N],
                                            const Element<float, Extended>& e,
                                            const FactorScales& scales) {
  using L = Layout<Extended>;
  constexpr int of_products = L::P + 9, of_sides = L::FIRST_FACTOR;
  [[maybe_unused]] double g, m[K];
  if constexpr (Double)
    add_squares<Extended>(sums, e, g, m);
  else if constexpr (Diag)
    add_features<0, of_sides, Extended>(sums, e);
  else
    add_features<0, L::ELEMENT, Extended>(sums, e);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if constexpr (Diag) {
      if (Double) sums[of_products + k].add_square(e.x[of_products + k]);
      sums[of_sides + k].add_square(e.d[k]);
      sums[of_sides + K + k].add_square(factor_rsqrt_of(e.d[k]));
      sums[of_sides + 2 * K + k].add_square(e.x[of_sides + k]);
    } else if constexpr (Double) {
      const double scale = square(scales.row[k]) * square(scales.col[k]);
      sums[of_products + k].add(scale * g);
      sums[of_sides + k].add(scale * m[k]);
    }
  }
#pragma unroll
  for (int s = 0; s < N; ++s) sums[s].settle();
}

// Element `index` of a job: its run and column, without a division where a run of the job has a
// power of two of them.
struct JobShape {
  int64_t first_run, first;
  uint32_t columns;
  int shift;

  __device__ __forceinline__ explicit JobShape(const Job& job)
      : first_run(job.first_run),
        first(job.first),
        columns(static_cast<uint32_t>(job.last - job.first)),
        shift(0) {
    while ((1u << shift) < columns) ++shift;
    if ((1u << shift) != columns) shift = -1;
  }
  __device__ __forceinline__ Place place(const Box& box, uint32_t index) const {
    const uint32_t r = shift >= 0 ? index >> shift : index / columns;
    const int64_t c = first + (index - r * columns);
    const Run run = find_run(box, first_run + r);
    return Place{run.local + c, run.row + c * box.row[INNER], run.col + c * box.col[INNER],
                 run.lead + c * box.lead[INNER]};
  }
};

__device__ __forceinline__ uint32_t job_numel(const Job& job) {
  return static_cast<uint32_t>((job.last_run - job.first_run) * (job.last - job.first));
}

template <bool Extended, bool Diag>
__device__ __forceinline__ constexpr int num_feature_sums() {
  return Diag ? Layout<Extended>::SUMS_DIAG : Layout<Extended>::SUMS_FACTORED;
}

template <int first, int State, bool Double, int N>
__device__ __forceinline__ void add_old(Sum<Double> (&sums)[N], const Live& live, const Item& item,
                                        int64_t at) {
  float m[K];
#pragma unroll
  for (int k = 0; k < K; ++k) m[k] = load_as_float(live.momentum, State, k * item.numel + at);
  add_old<first>(sums, m, load_as_float(live.rms, State, at));
}

template <bool Extended, bool Diag, int State, bool Double, int N>
__device__ __forceinline__ void sum_job(const PassArgs& args, const Job& job, const Box& box,
                                        const Item& item, const Live& live,
                                        Sum<Double> (&sums)[N]) {
  const Factors factors = factors_on_device(item, live, args.factors);
  const float scale = static_cast<float>(args.scale[box.item]);
  const JobShape shape(job);
  const uint32_t numel = job_numel(job);
  for (uint32_t i = threadIdx.x; i < numel; i += blockDim.x) {
    const Place at = shape.place(box, i);
    Element<float, Extended> e;
    const FactorScales scales =
        read_element<Extended, Diag, State>(e, live, item, factors, at, scale, args.rule);
    add_element<Extended, Diag>(sums, e, scales);
  }
}

// The same of a job with long runs, by warps; with `Moments` those too, behind the others.
template <bool Extended, bool Moments, int State, int Type, bool Fours, bool Double, int N>
__device__ __forceinline__ void sum_runs(const RuleConstants& rule, const Runs<4>& runs,
                                         Kept& along, Sum<Double> (&sums)[N]) {
  using L = Layout<Extended>;
  // a card that is slow in double keeps scales for either
  constexpr bool keeps_squares = Double && std::is_same_v<KeptNumber, double>;
  const int left = runs.columns - lane_column<Fours>(0);
  if (left <= 0) return;
  along.vector() = -1;
#pragma unroll 1
  for (int r = threadIdx.x >> 5; r < runs.count; r += blockDim.x >> 5) {
    keep_in_memory();
    if (runs.at[r].vector != along.vector()) {
      const int64_t held = along.vector() = runs.at[r].vector;
#pragma unroll
      for (int i = 0; i < 4 * K; ++i) {
        const float scale = runs.template along<Fours>(i >> 2, i & 3, held);
        along.at(i >> 2, i & 3) = keeps_squares ? square(scale) : scale;
      }
    }
    const int64_t at = runs.at[r].local + lane_column<Fours>(0);
    const int g_type = runs.grad_type, p_type = runs.value_type;
    [[maybe_unused]] double of_g[K] = {}, of_m[K] = {};
    const auto add = [&](int j, float g, float p, const float (&m)[K], float v) {
      Element<float, Extended> e;
      common_features<Extended>(e, used_gradient(g, runs.scale, rule), p, m, v, rule);
      if constexpr (Double) {
        double g2, m2[K];
        add_squares<Extended>(sums, e, g2, m2);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const double scale = keeps_squares ? static_cast<double>(along.at(k, j))
                                             : square(static_cast<float>(along.at(k, j)));
          of_g[k] += scale * g2;
          of_m[k] += scale * m2[k];
        }
      } else {
        float scales[K], across[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          scales[k] = static_cast<float>(along.at(k, j));
          across[k] = runs.numbers[r][k];
        }
        factored_features<Extended>(e, across, scales);
        add_features<0, L::ELEMENT, Extended>(sums, e);
      }
      if constexpr (Moments) add_old<L::SUMS_FACTORED>(sums, m, v);
    };
    if constexpr (Fours) {
      ElementFours<Type, State> x;
      x.load(runs, g_type, p_type, at);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float old[K] = {x.m[0].get(j, State), x.m[1].get(j, State), x.m[2].get(j, State)};
        add(j, x.g.get(j, g_type), x.p.get(j, p_type), old, x.v.get(j, State));
      }
    } else {
#pragma unroll 1
      for (int j = 0; 32 * j < left; ++j) {
        const int64_t here = at + 32 * j;
        float old[K];
#pragma unroll
        for (int k = 0; k < K; ++k) old[k] = load_as_float(runs.means[k], State, here);
        add(j, load_as_float(runs.grad, g_type, here), load_as_float(runs.value, p_type, here), old,
            load_as_float(runs.means[K], State, here));
      }
    }
    if constexpr (Double) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const double across = square(runs.numbers[r][k]);
        sums[L::P + 9 + k].add(across * of_g[k]);
        sums[L::FIRST_FACTOR + k].add(across * of_m[k]);
      }
    }
#pragma unroll
    for (int s = 0; s < N; ++s) sums[s].settle();
  }
}

// Those sums alone. All but long runs in fours take a turn of their own for them, since the
// registers are full without.
template <int State, bool Double>
__device__ __forceinline__ void sum_old(const Job& job, const Box& box, const Item& item,
                                        const Live& live, Sum<Double> (&sums)[NUM_MOMENTS - 1]) {
  const JobShape shape(job);
  const uint32_t numel = job_numel(job);
  for (uint32_t i = threadIdx.x; i < numel; i += blockDim.x) {
    add_old<0, State>(sums, live, item, shape.place(box, i).local);
#pragma unroll
    for (int s = 0; s < NUM_MOMENTS - 1; ++s) sums[s].settle();
  }
}

// The sums of a block to rows first .. first + num of the partial sums of a job.
template <bool Double, int N>
__device__ __forceinline__ void store_sums(const Sum<Double> (&sums)[N], double (*warp_sums)[8],
                                           const Tables& tables, int64_t job, int first, int num) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int s = 0; s < N; s += 4) {
    double four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = s + i < N ? sums[s + i].get() : 0.0;
    const double sum = four_sums(four, lane);
    if ((lane & 7) == 0 && s + lane / 8 < N) warp_sums[s + lane / 8][threadIdx.x >> 5] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < num) {
    double sum = 0.0;
    for (unsigned w = 0; w < blockDim.x >> 5; ++w) sum += warp_sums[threadIdx.x][w];
    tables.partials[(first + threadIdx.x) * tables.num_jobs + job] = sum;
  }
  __syncthreads();
}

// The sums over the groups of an item's jobs, box after box, by the block that finished the last of
// them.
template <bool Extended, bool Moments>
__device__ __forceinline__ void sum_groups(const PassArgs& args, const Item& item, const Live& live,
                                           const ItemRange& range, int num, int features) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t jobs = args.tables.num_jobs;
  double* to = live.b + item.b_at;
  int64_t j = range.first_job;
  while (j < range.last_job) {
    const int64_t box = args.tables.jobs[j].box;
    int64_t turn = 0;
    for (; j < range.last_job && args.tables.jobs[j].box == box;
         j = args.tables.jobs[j].group_end) {
      const Job& group = args.tables.jobs[j];
      for (int s = 0; s < num; ++s, ++turn) {
        if (turn % warps != warp) continue;
        double sum = 0.0;
#pragma unroll 4
        for (int64_t i = j + lane; i < group.group_end; i += 32)
          sum += args.tables.partials[s * jobs + i];
        sum = warp_sum(sum);
        if (lane != 0) continue;
        if (s < features) to[s * item.leads + group.lead] += sum;
        if constexpr (Moments) {
          double* moments = live.b + item.moments_at;
          if (s == Layout<Extended>::P) moments[0] += sum;
          if (s >= features) moments[1 + s - features] += sum;
        }
      }
    }
    __syncthreads();  // the next box may add to the same lead
  }
}

// The sums of a lead of an item, by a thread, over all boxes that hold a part of it.
template <bool Extended, int State, bool Double, int N>
__device__ __forceinline__ void sum_lead(const PassArgs& args, const Item& item, const Live& live,
                                         int64_t lead, float scale, Sum<Double> (&sums)[N]) {
#pragma unroll 1
  for (int64_t b = item.first_box; b < item.first_box + item.num_boxes; ++b) {
    const Box& box = args.tables.boxes[b];
    int64_t rest = lead - box.lead_at, numel = box_numel(box);
    Place begin{box.local_at, box.row_at, box.col_at, lead};
    bool here = rest >= 0 && numel > 0;
    for (int d = 0; d < MAX_DIMS && here; ++d) {
      if (box.lead[d] == 0 || box.sizes[d] == 1) continue;
      const int64_t at = rest / box.lead[d];
      here = at < box.sizes[d];
      rest -= at * box.lead[d];
      numel /= box.sizes[d];
      begin.local += at * box.local[d];
      begin.row += at * box.row[d];
      begin.col += at * box.col[d];
    }
    if (!here || rest != 0) continue;
#pragma unroll 1
    for (int64_t i = 0; i < numel; ++i) {
      Place at = begin;
      int64_t index = i;
      for (int d = INNER; d >= 0; --d) {
        if (box.lead[d] != 0 || box.sizes[d] == 1) continue;
        const int64_t x = index % box.sizes[d];
        index /= box.sizes[d];
        at.local += x * box.local[d];
        at.row += x * box.row[d];
        at.col += x * box.col[d];
      }
      keep_in_memory();
      Element<float, Extended> e;
      const FactorScales scales = read_element<Extended, false, State>(
          e, live, item, factors_on_device(item, live, args.factors), at, scale, args.rule);
      add_element<Extended, false>(sums, e, scales);
    }
  }
}

// Matrices so small that a thread sums one.
template <bool Extended, int State>
__device__ __forceinline__ void sum_small_leads(const PassArgs& args) {
  const Tables& tables = args.tables;
  for (int j = blockIdx.x; j < static_cast<int>(tables.num_lead_jobs); j += gridDim.x) {
    const LeadJob& job = tables.lead_jobs[j];
    const Item& item = tables.items[job.item];
    const Live& live = tables.live[job.item];
    if (!is_active(live)) continue;
    const float scale = static_cast<float>(args.scale[job.item]);
    for (int64_t lead = job.first + threadIdx.x; lead < job.last; lead += blockDim.x) {
      make_sums([&](auto is_double) {
        constexpr bool Double = decltype(is_double)::value;
        Sum<Double> sums[num_feature_sums<Extended, false>()];
        sum_lead<Extended, State>(args, item, live, lead, scale, sums);
        if (!are_good(sums)) return false;
#pragma unroll
        for (int s = 0; s < Layout<Extended>::SUMS_FACTORED; ++s)
          live.b[item.b_at + s * item.leads + lead] += sums[s].get();
        return true;
      });
    }
  }
}

// As many as an SM holds without spilling.
constexpr int feature_threads(bool moments) { return moments ? 128 : 256; }
constexpr int feature_blocks(bool moments) { return moments ? 3 : 2; }

template <bool Extended, bool Moments, int State>
__global__ void __launch_bounds__(feature_threads(Moments), feature_blocks(Moments))
    feature_kernel(const PassArgs args) {
  constexpr int further = Moments ? NUM_MOMENTS - 1 : 0;
  constexpr int factored = num_feature_sums<Extended, false>(),
                diag = num_feature_sums<Extended, true>();
  constexpr int most = factored + further > diag ? factored + further : diag;
  __shared__ double warp_sums[most][8];
  __shared__ Runs<4> runs;
  __shared__ Kept along[8];
  const Tables& tables = args.tables;
  const int num_jobs = static_cast<int>(tables.num_jobs);
  for (int j = blockIdx.x; j < num_jobs; j += gridDim.x) {
    const Job& job = tables.jobs[j];
    const Box& box = tables.boxes[job.box];
    const Item& item = tables.items[box.item];
    const Live& live = tables.live[box.item];
    if (!is_active(live) || has_small_leads(item)) continue;
    const int features = item.factored ? factored : diag, num = features + further;
    const bool long_runs = has_long_runs(item, box),
               together = long_runs && in_fours<State>(live, item, box, job);
    if (long_runs) {
      runs.set<State>(live, item, box, job, factors_on_device(item, live, args.factors),
                      static_cast<float>(args.scale[box.item]),
                      [&](int64_t at, float (&scales)[4]) {
                        for (int k = 0; k < K; ++k) scales[k] = runs.constant[k][at];
                      });
    }
    make_sums([&](auto is_double) {
      constexpr bool Double = decltype(is_double)::value;
      Sum<Double> sums[most];
      Kept& kept = along[threadIdx.x >> 5];
      if (!item.factored)
        sum_job<Extended, true, State>(args, job, box, item, live, sums);
      else if (!long_runs)
        sum_job<Extended, false, State>(args, job, box, item, live, sums);
      else if (!together)
        sum_runs<Extended, false, State, ANY_TYPE, false>(args.rule, runs, kept, sums);
      else if (runs.grad_type != FLOAT32 || runs.value_type != FLOAT32)
        sum_runs<Extended, Moments, State, ANY_TYPE, true>(args.rule, runs, kept, sums);
      else
        sum_runs<Extended, Moments, State, FLOAT32, true>(args.rule, runs, kept, sums);
      if (!Double && __syncthreads_or(!are_good(sums))) return false;
      store_sums(sums, warp_sums, tables, j, 0, together ? num : features);
      if constexpr (Moments) {
        if (!together) {
          Sum<Double> old[further];
          sum_old<State>(job, box, item, live, old);
          if (!Double && __syncthreads_or(!are_good(old))) return false;
          store_sums(old, warp_sums, tables, j, features, further);
        }
      }
      return true;
    });
    const ItemRange range = tables.ranges[box.item];
    if (is_last(&tables.counters[box.item],
                static_cast<unsigned>(range.last_job - range.first_job))) {
      sum_groups<Extended, Moments>(args, item, live, range, num, features);
    }
  }
  if constexpr (!Moments) sum_small_leads<Extended, State>(args);  // moments are of whole tensors
}

}  // namespace gpu
}  // namespace pylo_dist
