// The operators on a CPU: jobs, threads and the sums over jobs. The element work is in
// cpu_kernels.h.

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "bindings.h"
#include "cpu.h"
#include "cpu_threads.h"
#include "schemas.h"

namespace pylo_dist {
namespace {

// -------------------------------------------------------------------------------- instruction sets

const Kernels* supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (name == "auto" || name == "avx512")) return &kernels_avx512;
  if (avx2 && (name == "auto" || name == "avx2")) return &kernels_avx2;
#endif
  return name == "auto" || name == "baseline" ? &kernels_baseline : nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* now = chosen.load();
  if (!now) {
    now = supported("auto");
    chosen.store(now);
  }
  return *now;
}

namespace {

// -------------------------------------------------------------------------------------------- jobs

constexpr int64_t SMALLEST_JOB = 1 << 14, LARGEST_JOB = 1 << 20, JOBS = 256;
constexpr int64_t LONGEST_RUN = 2048;  // sums of as many columns stay in the first-level cache

struct Jobs {
  std::vector<Job> jobs;
  std::vector<int64_t> first;  // of the a-th active item; one more at the end
};

Jobs deal(const Tables& tables, const Ints& active, int64_t smallest = SMALLEST_JOB) {
  int64_t numel = 0;
  for (int64_t i = 0; i < tables.num_items; ++i) numel += tables.items[i].numel;
  const int64_t size = std::clamp(numel / JOBS, smallest, LARGEST_JOB);
  Jobs all;
  for (int64_t i : active) {
    all.first.push_back(static_cast<int64_t>(all.jobs.size()));
    const Item& item = tables.items[i];
    STD_TORCH_CHECK(0 <= item.first_box && item.first_box + item.num_boxes <= tables.num_boxes,
                    "item ", i, " has boxes beyond the table");
    for (int64_t b = item.first_box; b < item.first_box + item.num_boxes; ++b) {
      const Box& box = tables.boxes[b];
      const int64_t runs = num_runs(box), inner = box.sizes[MAX_DIMS - 1];
      const int64_t longest = runs == 1 ? size : LONGEST_RUN;
      const int64_t length = std::min(inner, longest),
                    count = std::max<int64_t>(1, size / std::max<int64_t>(1, length));
      for (int64_t run = 0; run < runs; run += count) {
        for (int64_t at = 0; at < inner; at += length) {
          all.jobs.push_back(
              Job{b, run, std::min(runs, run + count), at, std::min(inner, at + length)});
        }
      }
    }
  }
  all.first.push_back(static_cast<int64_t>(all.jobs.size()));
  return all;
}

// The smallest and largest index that a job reaches in a vector with these strides.
IndexRange reach(const Box& box, const Job& job, const int64_t (&strides)[MAX_DIMS], int64_t at) {
  int64_t low[MAX_DIMS], high[MAX_DIMS];
  low[MAX_DIMS - 1] = job.first;
  high[MAX_DIMS - 1] = job.last - 1;
  int64_t a = job.first_run, b = job.last_run - 1;
  for (int d = MAX_DIMS - 2; d >= 0; --d) {
    low[d] = a % box.sizes[d];
    high[d] = b % box.sizes[d];
    a /= box.sizes[d];
    b /= box.sizes[d];
  }
  // beyond the first dim in which the ends differ, a job goes over all of a dim
  bool differ = false;
  for (int d = 0; d < MAX_DIMS - 1; ++d) {
    if (differ) {
      low[d] = 0;
      high[d] = box.sizes[d] - 1;
    }
    differ = differ || low[d] != high[d];
  }
  int64_t first = at, last = at;
  for (int d = 0; d < MAX_DIMS; ++d) {
    first += low[d] * strides[d];
    last += high[d] * strides[d];
  }
  return IndexRange{first, last - first + 1};
}

// ---------------------------------------------------------------------------------------- pointers

// What is in the workspace: the pointers of every item, and the dtype of momentum and rms.
struct Kept {
  Tensors* tensors;
  int64_t state_type;
};

int64_t workspace_size(const Tables& tables) {
  return tables.num_items * static_cast<int64_t>(sizeof(Tensors)) +
         static_cast<int64_t>(sizeof(int64_t));
}

// The pointers of every item, kept in the workspace from call to call: a list of tensors costs more
// than all of the work on small ones. Lists that are empty stand for those that came before; what
// comes is checked.
Kept kept_pointers(const Tables& tables, const Ints& active, TensorLists lists,
                   const Tensors_& workspace) {
  STD_TORCH_CHECK(!workspace.empty(), "the workspace is missing");
  Tensors* all = static_cast<Tensors*>(
      memory(workspace[0], workspace_size(tables), ScalarType::Byte, "the workspace"));
  int64_t* state_type = reinterpret_cast<int64_t*>(all + tables.num_items);
  tables.check_active(active);
  for (int64_t i : active) all[i].direction = nullptr;
  for (const Tensors_** list :
       {&lists.values, &lists.momentum, &lists.rms, &lists.row_or_diag, &lists.col, &lists.grads}) {
    if (*list && (*list)->empty()) *list = nullptr;
  }
  int64_t seen = -1;
  fill_pointers(tables, active, lists, all, &seen);
  if (seen >= 0) *state_type = seen;
  for (int64_t i : active) {
    const Tensors& t = all[i];
    const bool factors = tables.items[i].factored ? t.row && t.col : t.diag != nullptr;
    STD_TORCH_CHECK(!tables.items[i].numel || (t.value && t.grad && t.momentum && t.rms && factors),
                    "item ", i, " has tensors that were never given");
  }
  return Kept{all, *state_type};
}

// ------------------------------------------------------------------------------------------ pass A

void gradient_pass(Tensor items, Tensor boxes, Ints active, Tensors_ grads, Tensor limits,
                   bool replace, Tensors_ sums, Tensors_ workspace) {
  const Tables tables(items, boxes);
  TensorLists lists;
  lists.grads = &grads;
  const std::vector<Tensors> tensors = pointers_of(tables, active, lists);
  const double* limit = doubles(limits, 2 * tables.num_items, "limits");
  const std::vector<double*> buffers = buffers_of_a(tables, sums, active);
  // one thread adds the jobs' sums of an item: the fewer the better
  const Jobs jobs = deal(tables, active, 4 * SMALLEST_JOB);
  PassArgs args{};
  args.items = tables.items;
  args.boxes = tables.boxes;
  args.tensors = tensors.data();
  std::vector<GradientPartial> partials(jobs.jobs.size());
  std::vector<int64_t> at(jobs.jobs.size() + 1, 0);
  for (size_t j = 0; j < jobs.jobs.size(); ++j) {
    const Box& box = tables.boxes[jobs.jobs[j].box];
    GradientPartial& p = partials[j];
    p = GradientPartial{};
    if (tables.items[box.item].factored) {
      p.rows = reach(box, jobs.jobs[j], box.row, box.row_at);
      p.cols = reach(box, jobs.jobs[j], box.col, box.col_at);
      at[j + 1] = p.rows.size + p.cols.size + 2 * PAD;
    }
    at[j + 1] += at[j];
  }
  const std::unique_ptr<double[]> memory_(new double[at.back() + 1]);
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(jobs.jobs.size()), [&](int64_t j) {
    GradientPartial& p = partials[j];
    p.row = memory_.get() + at[j];
    p.col = p.row + p.rows.size + PAD;
    std::fill(memory_.get() + at[j], memory_.get() + at[j + 1], 0.0);
    const int64_t i = tables.boxes[jobs.jobs[j].box].item;
    const double clamp = limit[2 * i + 1];
    k.gradients(args, jobs.jobs[j],
                GradientLimits{static_cast<float>(limit[2 * i]), clamp * clamp, replace}, p);
  });
  for_each(static_cast<int64_t>(active.size()), [&](int64_t a) {
    const Item& item = tables.items[active[a]];
    double* buffer = buffers[item.a_buffer];
    for (int64_t j = jobs.first[a]; j < jobs.first[a + 1]; ++j) {
      const GradientPartial& p = partials[j];
      buffer[item.a_audit + AUDIT_NONFINITE] += p.audit[0];
      buffer[item.a_audit + AUDIT_SQUARES] += p.audit[1];
      double *row = buffer + item.a_at + p.rows.first,
             *col = buffer + item.a_at + item.rows + p.cols.first;
      for (int64_t x = 0; x < p.rows.size; ++x) row[x] += p.row[x];
      for (int64_t x = 0; x < p.cols.size; ++x) col[x] += p.col[x];
    }
  });
}

void moment_pass(Tensor items, Tensor boxes, Ints active, Tensors_ values, Tensors_ momentum,
                 Tensors_ rms, Tensors_ sums, Tensors_ workspace) {
  const Tables tables(items, boxes);
  std::vector<Job> jobs;
  for (int64_t i : active) {
    STD_TORCH_CHECK(0 <= i && i < tables.num_items && tables.items[i].moments_at >= 0, "item ", i,
                    " has no moments");
    for (int64_t at = 0; at < tables.items[i].numel; at += LARGEST_JOB / 4) {
      jobs.push_back(Job{i, 0, 1, at, std::min(tables.items[i].numel, at + LARGEST_JOB / 4)});
    }
  }
  TensorLists lists;
  lists.values = &values;
  lists.momentum = &momentum;
  lists.rms = &rms;
  int64_t state_type = -1;
  const std::vector<Tensors> tensors = pointers_of(tables, active, lists, &state_type);
  const std::vector<double*> buffers = buffers_of_b(tables, sums, active, true);
  std::vector<double> partials(NUM_MOMENTS * jobs.size(), 0.0);
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(jobs.size()), [&](int64_t j) {
    const Job& job = jobs[j];
    k.moments(tensors[job.box], state_type, tables.items[job.box].numel, job.first, job.last,
              partials.data() + NUM_MOMENTS * j);
  });
  for (size_t j = 0; j < jobs.size(); ++j) {
    const Item& item = tables.items[jobs[j].box];
    for (int s = 0; s < NUM_MOMENTS; ++s)
      buffers[item.b_buffer][item.moments_at + s] += partials[NUM_MOMENTS * j + s];
  }
}

// ------------------------------------------------------------------------------------------ pass B

// How many sums a job of pass B makes per lead; moments come of whole tensors (leads == 1).
int64_t num_partials(const Item& item, bool extended) {
  return num_sums(item, extended) + (item.moments_at < 0 ? 0 : NUM_MOMENTS - 1);
}

// EMA of one factor's means (`state` is modified where `moves` holds), K x size.
void update_factor_state(float* state, const double* sums, int64_t size, double by,
                         const RuleConstants& rule) {
  for (int k = 0; k < K; ++k) {
    for (int64_t i = 0; i < size; ++i)
      state[k * size + i] = update_factor(state[k * size + i], sums[i] * by, k, rule);
  }
}

// Sums of squares of a factor (or its rsqrt) over the elements of every lead, to out[lead].
void factor_squares(const Item& item, const float* x, bool is_row, double* out) {
  const int64_t size = is_row ? item.rows : item.cols,
                dropped = is_row ? item.size_d0 : item.size_d1;
  if (item.leads == 1) {
    double sum = 0.0;
    for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    out[0] = sum * static_cast<double>(item.lead_numel) / static_cast<double>(size);
    (void)dropped;
    return;
  }
  const int64_t (&lead)[MAX_LEAD_DIMS] = is_row ? item.lead_row : item.lead_col;
  const int64_t (&matrix)[2] = is_row ? item.matrix_row : item.matrix_col;
  // along the dim that the factor was averaged over its stride is 0: there is one number, as often
  // as the dim is long
  const int64_t rows = matrix[0] ? item.matrix_sizes[0] : 1,
                cols = matrix[1] ? item.matrix_sizes[1] : 1;
  const double times = static_cast<double>(item.lead_numel) / static_cast<double>(rows * cols);
  for (int64_t l = 0; l < item.leads; ++l) {
    int64_t rest = l, at = 0;
    for (int d = MAX_LEAD_DIMS - 1; d >= 0; --d) {
      at += rest % item.lead_sizes[d] * lead[d];
      rest /= item.lead_sizes[d];
    }
    double sum = 0.0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        const double value = x[at + r * matrix[0] + c * matrix[1]];
        sum += value * value;
      }
    }
    out[l] = sum * times;
  }
}

void prepare_factors(const Item& item, const Tensors& t, const double* sums, bool moves,
                     double scale, const RuleConstants& rule, float* factors, double* squares) {
  if (moves) {
    update_factor_state(t.row, sums, item.rows, scale * scale / static_cast<double>(item.size_d0),
                        rule);
    update_factor_state(t.col, sums + item.rows, item.cols,
                        scale * scale / static_cast<double>(item.size_d1), rule);
  }
  float* row_scale = factors + item.factors_at;
  float *col_scale = row_scale + K * item.rows, *row_rsqrt = col_scale + K * item.cols,
        *col_rsqrt = row_rsqrt + K * item.rows;
  for (int k = 0; k < K; ++k) {
    const float *row = t.row + k * item.rows, *col = t.col + k * item.cols;
    for (int64_t outer = 0; outer < item.row_outer; ++outer) {
      for (int64_t inner = 0; inner < item.row_inner; ++inner) {
        const int64_t at = outer * item.size_d1 * item.row_inner + inner;
        double sum = 0.0;
        for (int64_t i = 0; i < item.size_d1; ++i) sum += row[at + i * item.row_inner];
        const float mean = static_cast<float>(sum / static_cast<double>(item.size_d1));
        for (int64_t i = 0; i < item.size_d1; ++i) {
          row_scale[k * item.rows + at + i * item.row_inner] =
              row_scale_of(row[at + i * item.row_inner], mean);
        }
      }
    }
    for (int64_t i = 0; i < item.cols; ++i) col_scale[k * item.cols + i] = col_scale_of(col[i]);
    for (int64_t i = 0; i < item.rows; ++i) row_rsqrt[k * item.rows + i] = factor_rsqrt_of(row[i]);
    for (int64_t i = 0; i < item.cols; ++i) col_rsqrt[k * item.cols + i] = factor_rsqrt_of(col[i]);
    double* out = squares + item.squares_at + k * item.leads;
    factor_squares(item, row, true, out);
    factor_squares(item, col, false, out + K * item.leads);
    factor_squares(item, row_rsqrt + k * item.rows, true, out + 2 * K * item.leads);
    factor_squares(item, col_rsqrt + k * item.cols, false, out + 3 * K * item.leads);
  }
}

void feature_pass(Tensor items, Tensor boxes, Ints active, std::vector<double> rule, bool extended,
                  Tensors_ values, Tensors_ grads, Tensors_ momentum, Tensors_ rms,
                  Tensors_ row_or_diag, Tensors_ col, Tensors_ sums_a, Tensor moves, Tensor scale,
                  Tensor factors, Tensor squares, Tensors_ sums_b, Tensors_ workspace) {
  const Tables tables(items, boxes);
  TensorLists lists{&values, &momentum, &rms, &row_or_diag, &col, nullptr, &grads};
  const Kept kept = kept_pointers(tables, active, lists, workspace);
  const std::vector<double*> a_buffers = buffers_of_a(tables, sums_a, active);
  const std::vector<double*> b_buffers = buffers_of_b(tables, sums_b, active, extended);
  const FactorSizes sizes = factor_sizes(tables, active);
  float* factors_ = floats(factors, sizes.factors, "factors");
  double* squares_ = doubles(squares, sizes.squares, "squares");
  const bool* moves_ = bools(moves, tables.num_items, "moves");
  PassArgs args{};
  args.items = tables.items;
  args.boxes = tables.boxes;
  args.tensors = kept.tensors;
  args.state_type = kept.state_type;
  args.rule = rule_of(rule);
  args.scale = doubles(scale, tables.num_items, "scale");
  args.factors = factors_;
  for_each(static_cast<int64_t>(active.size()), [&](int64_t a) {
    const Item& item = tables.items[active[a]];
    if (!item.factored) return;
    const double* sums = a_buffers[item.a_buffer] + item.a_at;
    prepare_factors(item, kept.tensors[active[a]], sums, moves_[active[a]], args.scale[active[a]],
                    args.rule, factors_, squares_);
  });
  const Jobs jobs = deal(tables, active);
  std::vector<IndexRange> leads(jobs.jobs.size());
  std::vector<int64_t> at(jobs.jobs.size() + 1, 0);
  for (size_t j = 0; j < jobs.jobs.size(); ++j) {
    const Box& box = tables.boxes[jobs.jobs[j].box];
    leads[j] = reach(box, jobs.jobs[j], box.lead, box.lead_at);
    at[j + 1] = at[j] + num_partials(tables.items[box.item], extended) * leads[j].size;
  }
  std::vector<double> partials(at.back(), 0.0);
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(jobs.jobs.size()), [&](int64_t j) {
    k.features(args, jobs.jobs[j], extended, leads[j], partials.data() + at[j]);
  });
  for (size_t a = 0; a < active.size(); ++a) {
    const Item& item = tables.items[active[a]];
    double* buffer = b_buffers[item.b_buffer];
    const int64_t num = num_sums(item, extended);
    for (int64_t j = jobs.first[a]; j < jobs.first[a + 1]; ++j) {
      const double* from = partials.data() + at[j];
      for (int64_t f = 0; f < num; ++f, from += leads[j].size) {
        double* out = buffer + item.b_at + f * item.leads + leads[j].first;
        for (int64_t l = 0; l < leads[j].size; ++l) out[l] += from[l];
      }
      if (item.moments_at < 0) continue;
      buffer[item.moments_at] += partials[at[j] + param_feature(extended) * leads[j].size];
      for (int s = 1; s < NUM_MOMENTS; ++s) buffer[item.moments_at + s] += from[s - 1];
    }
  }
}

// ------------------------------------------------------------------------------------------ pass C

// Normalisers (leads, inputs) of an item, from the sums of B and the squares of the factor
// features.
void fill_normalisers(const Item& item, bool extended, const double* sums, const double* squares,
                      double eps, float* out) {
  const int64_t row = first_factor(extended), inputs = num_inputs(extended),
                n = num_sums(item, extended);
  for (int64_t f = 0; f < inputs; ++f) {
    const double* from = sums + f * item.leads;
    if (f >= row + 12) {
      from = sums + (n - (inputs - f)) * item.leads;
    } else if (f >= row && item.factored) {
      from = squares + item.squares_at + (f - row) * item.leads;
    } else if (f >= row) {  // D twice, then its rsqrt twice
      from = sums + (row + (f - row) / 6 * K + (f - row) % K) * item.leads;
    }
    for (int64_t l = 0; l < item.leads; ++l) {
      out[l * inputs + f] = normaliser(from[l], static_cast<double>(item.lead_numel), eps);
    }
  }
}

void update_pass(Tensor items, Tensor boxes, Ints active, std::vector<double> rule, bool extended,
                 int64_t hidden, int64_t precision, Tensors_ values, Tensors_ grads,
                 Tensors_ momentum, Tensors_ rms, Tensors_ row_or_diag, Tensors_ col,
                 Tensor factors, Tensor squares, Tensors_ sums_b, Tensor moves, Tensor scale,
                 Tensor networks, Tensor network_of, Tensor steps, Tensor param_squares,
                 Tensor update_squares, Tensors_ directions, Tensors_ workspace,
                 std::optional<Tensor> keys) {
  const Tables tables(items, boxes);
  const TensorLists lists{&values, &momentum, &rms, &row_or_diag, &col, &directions, &grads};
  const Kept kept = kept_pointers(tables, active, lists, workspace);
  Tensors* tensors = kept.tensors;
  const std::vector<double*> b_buffers = buffers_of_b(tables, sums_b, active, extended);
  const FactorSizes sizes = factor_sizes(tables, active);
  const double* squares_ = doubles(squares, sizes.squares, "squares");
  const bool* moves_ = bools(moves, tables.num_items, "moves");
  const int64_t* network_of_ =
      static_cast<int64_t*>(memory(network_of, tables.num_items, ScalarType::Long, "network_of"));
  PassArgs args{};
  const int64_t size = network_size(extended, hidden), num_networks = networks.numel() / size;
  for (int64_t i : active) {
    STD_TORCH_CHECK(0 <= network_of_[i] && network_of_[i] < num_networks, "item ", i,
                    " has no network ", network_of_[i]);
  }
  args.items = tables.items;
  args.boxes = tables.boxes;
  args.tensors = tensors;
  args.state_type = kept.state_type;
  args.rule = rule_of(rule);
  args.scale = doubles(scale, tables.num_items, "scale");
  args.keys = keys_of(keys, kept.state_type, tables, active);
  args.factors = floats(factors, sizes.factors, "factors");
  const float* packed = floats(networks, 0, "networks");
  args.steps = reinterpret_cast<const Step*>(floats(steps, 4 * tables.num_items, "steps"));
  double* param_squares_ = doubles(param_squares, tables.num_items, "param_squares");
  double* update_squares_ = doubles(update_squares, tables.num_items, "update_squares");
  Ints normalisers_at(tables.num_items, 0);
  int64_t total = 0;
  Ints moving;
  for (int64_t i : active) {
    const Item& item = tables.items[i];
    const double* p = b_buffers[item.b_buffer] + item.b_at + param_feature(extended) * item.leads;
    param_squares_[i] = 0.0;
    for (int64_t l = 0; l < item.leads; ++l) param_squares_[i] += p[l];
    update_squares_[i] = 0.0;
    if (!moves_[i]) continue;
    moving.push_back(i);
    normalisers_at[i] = total;
    total += item.leads * num_inputs(extended);
  }
  // networks in the order in which the kernel reads them, one for all items that are alike
  const Kernels& k = kernels();
  Ints place_of(tables.num_items, 0), place(2 * num_networks, -1), used;
  for (int64_t i : moving) {
    const int64_t n = 2 * network_of_[i] + (tables.items[i].vector_is_row ? 1 : 0);
    if (place[n] < 0) {
      place[n] = static_cast<int64_t>(used.size());
      used.push_back(n);
    }
    place_of[i] = place[n];
  }
  args.network_bytes = k.network_bytes(static_cast<int>(hidden));
  constexpr size_t line = 64;
  std::vector<char> room(used.size() * args.network_bytes + line);
  char* const ready = room.data() + (line - reinterpret_cast<uintptr_t>(room.data()) % line);
  for_each(static_cast<int64_t>(used.size()), [&](int64_t u) {
    k.pack(packed + used[u] / 2 * size, used[u] % 2, static_cast<int>(hidden),
           ready + u * args.network_bytes);
  });
  args.networks = ready;
  args.network_of = place_of.data();
  std::vector<float> normalisers(total);
  args.normalisers = normalisers.data();
  args.normalisers_at = normalisers_at.data();
  for_each(static_cast<int64_t>(moving.size()), [&](int64_t a) {
    const Item& item = tables.items[moving[a]];
    const double* sums = b_buffers[item.b_buffer] + item.b_at;
    fill_normalisers(item, extended, sums, squares_, args.rule.eps_normalise,
                     normalisers.data() + normalisers_at[moving[a]]);
  });
  const Jobs jobs = deal(tables, moving);
  std::vector<double> changes(jobs.jobs.size(), 0.0);
  for_each(static_cast<int64_t>(jobs.jobs.size()), [&](int64_t j) {
    changes[j] = k.updates(args, jobs.jobs[j], static_cast<int>(hidden));
  });
  for (size_t a = 0; a < moving.size(); ++a) {
    for (int64_t j = jobs.first[a]; j < jobs.first[a + 1]; ++j)
      update_squares_[moving[a]] += changes[j];
  }
  for (int64_t i : active) tensors[i].grad = nullptr;  // it may be gone before the next call
}

void copy_pass(Tensors_ targets, Tensors_ sources, Tensor ends) {
  struct Part {
    size_t pair;
    int64_t row, first, last;
  };
  const std::vector<Pair> pairs = pairs_of(targets, sources);
  Ends* const all = ends_of(ends, pairs.size());
  std::vector<Part> parts;
  for (size_t p = 0; p < pairs.size(); ++p) {
    for (int64_t row = 0; row < pairs[p].rows; ++row) {
      for (int64_t at = 0; at < pairs[p].columns; at += LARGEST_JOB)
        parts.push_back(Part{p, row, at, std::min(pairs[p].columns, at + LARGEST_JOB)});
    }
  }
  constexpr float infinity = std::numeric_limits<float>::infinity();
  std::vector<Ends> found(parts.size(), Ends{infinity, -infinity});
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(parts.size()), [&](int64_t i) {
    const Part& part = parts[i];
    const Pair& pair = pairs[part.pair];
    k.copy(pair, part.row * pair.from_pitch + part.first, part.row * pair.to_pitch + part.first,
           part.last - part.first, found[i]);
  });
  std::fill(all, all + pairs.size(), Ends{infinity, -infinity});
  for (size_t i = 0; i < parts.size(); ++i) {
    Ends& here = all[parts[i].pair];
    if (here.lowest != here.lowest) continue;  // NaN, and the other end too
    here.lowest = min_(found[i].lowest, here.lowest);
    here.highest = max_(found[i].highest, here.highest);
  }
}

Ints workspace_sizes(Tensor items, Tensor boxes, Tensor like) {
  return Ints{workspace_size(Tables(items, boxes))};
}

// Chooses the instruction set for all later calls ("auto": the best one there is), and gives its
// name.
std::string instruction_set(std::string name) {
  const Kernels* wanted = supported(name);
  STD_TORCH_CHECK(wanted, "this machine or build has no instruction set '", name, "'");
  chosen.store(wanted);
  return wanted->name;
}

}  // namespace
}  // namespace pylo_dist

STABLE_TORCH_LIBRARY(pylo_dist, m) {
  PYLO_DIST_PASSES(PYLO_DIST_DEFINE)
  m.def("instruction_set(str name) -> str");
  m.def("table_fields(str table) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist, CPU, m) {
  using namespace pylo_dist;
  PYLO_DIST_PASSES(PYLO_DIST_IMPLEMENT)
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&pylo_dist::instruction_set));
  m.impl("table_fields", TORCH_BOX(&pylo_dist::table_fields));
}
