// The operators on a GPU: from tensor lists to launches. csrc/README.md says what each reads and
// writes; the kernels are in cuda_gradients.cuh, cuda_sums.cuh and cuda_update.cuh, how work is
// dealt to blocks in cuda_tables.h.
//
// The gradients' pointers travel as an argument of the first kernel of a pass, all others are sent
// when they change; so nothing is allocated, nothing waits for the host, and a CUDA graph that
// captured a step keeps its own. Launches of a step: A 2, B 2, C 2, whatever the number of tensors
// (an argument holds 4000 gradients, 2000 where directions are written; one more launch per 4000
// after that).
#include "adamw_bindings.h"
#include "bindings.h"
#include "cuda_adamw.cuh"
#include "cuda_packing.cuh"
#include "cuda_sums.cuh"
#include "cuda_update.cuh"
#include "schemas.h"

#if !defined(PYLO_FIBERS)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace pylo_dist {
namespace gpu {
namespace {

using HostTables = pylo_dist::Tables;

// All that a kernel is given; pass C is given most.
constexpr size_t MOST_ARGUMENT_BYTES = 32764;
static_assert(sizeof(Head) + sizeof(UpdateArgs) <= MOST_ARGUMENT_BYTES,
              "UPLOAD_WORDS leaves too little room for a kernel's other arguments");
static_assert(sizeof(Copies) <= MOST_ARGUMENT_BYTES, "MOST_PAIRS are too many for an argument");
static_assert(sizeof(AdamWHead) + sizeof(AdamWArgs) <= MOST_ARGUMENT_BYTES,
              "ADAMW_ENTRIES leaves too little room for a kernel's other arguments");

#if defined(PYLO_FIBERS)
#define PYLO_LAUNCH(kernel, blocks, threads, ...) \
  fibers::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); })

struct Device {
  explicit Device(const Tensor&) {}
  bool is_capturing() const { return false; }
  void clear(void* at, int64_t bytes) const { std::memset(at, 0, bytes); }
  template <class Kernel>
  int blocks(Kernel, int, int64_t jobs) const {
    return static_cast<int>(std::min<int64_t>(jobs, fibers::most_blocks));
  }
};
#else
#define PYLO_LAUNCH(kernel, blocks, threads, ...)                     \
  do {                                                                \
    if ((blocks) > 0) {                                               \
      kernel<<<(blocks), (threads), 0, device.stream>>>(__VA_ARGS__); \
      STD_CUDA_KERNEL_LAUNCH_CHECK();                                 \
    }                                                                 \
  } while (0)

// The device of a tensor, made current, and its current stream.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  int index;

  explicit Device(const Tensor& like)
      : guard(like.get_device_index()), index(like.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  void clear(void* at, int64_t bytes) const {
    STD_CUDA_CHECK(cudaMemsetAsync(at, 0, bytes, stream));
  }

  // As many blocks as the device runs at a time, if there are as many jobs.
  template <class Kernel>
  int blocks(Kernel kernel, int threads, int64_t jobs) const {
    int processors = 0, each = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
    return static_cast<int>(
        std::min<int64_t>(jobs, static_cast<int64_t>(processors) * (each > 0 ? each : 1)));
  }
};
#endif

// A table to the device, in as many kernel arguments as it takes.
void send(const Device& device, const void* from, int64_t bytes, void* to) {
  const int64_t* words = static_cast<const int64_t*>(from);
  (void)device;
  for (int64_t at = 0; at < bytes / 8; at += UPLOAD_WORDS) {
    Upload part;
    const int count = static_cast<int>(std::min<int64_t>(UPLOAD_WORDS, bytes / 8 - at));
    std::memcpy(part.words, words + at, 8 * static_cast<size_t>(count));
    PYLO_LAUNCH(upload, 1, 256, part, static_cast<int64_t*>(to) + at, count);
  }
}

// The batch's memory on the device and what is known about it. Its tables are made in the first
// call; by a graph, if that call is captured.
struct Workspace {
  Plan plan;
  char* base;
  Live* rows;  // on the device, of this pass
  Live* sent;  // on the host: what is in them; null while a stream is being captured

  Workspace(const Device& device, const Tensors_& workspace, const HostTables& host, Pass pass) {
    make(device, workspace, host);
    const bool captured = device.is_capturing();
    rows = at<Live>(plan.live) + (pass + captured * PASSES) * host.num_items;
    sent = captured ? nullptr : kept_rows(workspace, host) + pass * host.num_items;
  }

  static Live* kept_rows(const Tensors_& workspace, const HostTables& host) {
    const int64_t bytes = host_bytes(host.num_items);
    return reinterpret_cast<Live*>(
        static_cast<char*>(memory(workspace[1], bytes, ScalarType::Byte, "workspace[1]")) +
        sizeof(Plan));
  }

  static int64_t host_bytes(int64_t num_items) {
    return static_cast<int64_t>(sizeof(Plan)) +
           PASSES * num_items * static_cast<int64_t>(sizeof(Live));
  }

  void make(const Device& device, const Tensors_& workspace, const HostTables& host) {
    check_list(workspace, 2, "workspace");
    base = static_cast<char*>(memory(workspace[0], 0, ScalarType::Byte, "workspace[0]"));
    STD_TORCH_CHECK(workspace[1].is_cpu(), "workspace[1] must be on the host");
    Plan* kept =
        static_cast<Plan*>(memory(workspace[1], sizeof(Plan), ScalarType::Byte, "workspace[1]"));
    const bool known = kept->magic == PLAN_MAGIC && kept->num_items == host.num_items &&
                       kept->num_boxes == host.num_boxes;
    if (known) {
      plan = *kept;
      return;
    }
    const Work work = deal(host.items, host.num_items, host.boxes, host.num_boxes);
    plan = work.plan;
    STD_TORCH_CHECK(workspace[0].numel() >= plan.total, "workspace[0] has ", workspace[0].numel(),
                    " bytes, wanted ", plan.total);
    const auto bring = [&](const auto& table, int64_t at) {
      send(device, table.data(), static_cast<int64_t>(table.size() * sizeof(table[0])), base + at);
    };
    device.clear(base + plan.counters, num_counters(plan.num_items) * 4);
    send(device, host.items, host.num_items * static_cast<int64_t>(sizeof(Item)),
         base + plan.items);
    send(device, host.boxes, host.num_boxes * static_cast<int64_t>(sizeof(Box)), base + plan.boxes);
    bring(work.jobs, plan.jobs);
    bring(work.side_jobs, plan.side_jobs);
    bring(work.side_at, plan.side_at);
    bring(work.entry_jobs, plan.entry_jobs);
    bring(work.factor_jobs, plan.factor_jobs);
    bring(work.lead_jobs, plan.lead_jobs);
    bring(work.ranges, plan.ranges);
    bring(work.normalisers_at, plan.normalisers_at);
    bring(work.first_moment_job, plan.first_moment_job);
    if (!device.is_capturing()) *kept = plan;
  }

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base + offset);
  }

  Tables tables() const {
    return Tables{rows,
                  at<unsigned>(plan.counters),
                  at<Item>(plan.items),
                  at<Box>(plan.boxes),
                  at<Job>(plan.jobs),
                  at<SideJob>(plan.side_jobs),
                  at<int64_t>(plan.side_at),
                  at<EntryJob>(plan.entry_jobs),
                  at<FactorJob>(plan.factor_jobs),
                  at<LeadJob>(plan.lead_jobs),
                  at<ItemRange>(plan.ranges),
                  at<int64_t>(plan.normalisers_at),
                  at<float>(plan.normalisers),
                  at<uint32_t>(plan.networks),
                  at<double>(plan.partials),
                  plan.num_items,
                  plan.num_jobs,
                  plan.num_side_jobs,
                  plan.num_entry_jobs,
                  plan.num_lead_jobs};
  }
};

// What the first kernel of a pass gets. The rows go ahead if one of the active items is not as it
// was in the last call. To `state_type`, unless it is null: the dtype of momentum and rms.
Head head_of(const Device& device, const HostTables& host, const Ints& active,
             const TensorLists& lists, const std::vector<double*>* a, const std::vector<double*>* b,
             const Workspace& space, int64_t* state_type) {
  const std::vector<Tensors> tensors = pointers_of(host, active, lists, state_type);
  const size_t num_items = static_cast<size_t>(host.num_items);
  const bool writes_directions = lists.directions && !lists.directions->empty();
  std::vector<Live> rows(num_items, Live{});
  if (space.sent) std::memcpy(rows.data(), space.sent, num_items * sizeof(Live));
  std::vector<int64_t> words(num_items * (writes_directions ? 2 : 1), 0);
  for (int64_t i : active) {
    const Tensors& t = tensors[i];
    const Item& item = host.items[i];
    rows[i] = Live{t.value,
                   nullptr,
                   t.momentum,
                   t.rms,
                   item.factored ? t.row : t.diag,
                   t.col,
                   nullptr,
                   a ? (*a)[item.a_buffer] : nullptr,
                   b ? (*b)[item.b_buffer] : nullptr,
                   0};
    const int64_t grad = reinterpret_cast<int64_t>(t.grad);
    STD_TORCH_CHECK((grad & ~GRAD_BITS) == 0, "a gradient at an address of more than 56 bits");
    words[i] = grad | (t.value_type | t.grad_type << 2 | int64_t{1} << 4) << GRAD_SHIFT;
    if (writes_directions) words[num_items + i] = reinterpret_cast<int64_t>(t.direction);
  }
  if (!space.sent || std::memcmp(rows.data(), space.sent, num_items * sizeof(Live)) != 0) {
    send(device, rows.data(), static_cast<int64_t>(num_items * sizeof(Live)), space.rows);
    if (space.sent) std::memcpy(space.sent, rows.data(), num_items * sizeof(Live));
  }
  Head head{};
  head.items = host.num_items;
  head.directions = writes_directions ? host.num_items : 0;
  head.further = space.at<int64_t>(space.plan.words);
  const int64_t size = static_cast<int64_t>(words.size()),
                here = std::min<int64_t>(UPLOAD_WORDS, size);
  std::memcpy(head.upload.words, words.data(), static_cast<size_t>(here) * 8);
  if (size > here)
    send(device, words.data() + here, (size - here) * 8, space.at<int64_t>(space.plan.words));
  return head;
}

// --------------------------------------------------------------------------------------- operators

void gradient_pass(Tensor items, Tensor boxes, Ints active, Tensors_ grads, Tensor limits,
                   bool replace, Tensors_ sums, Tensors_ workspace) {
  if (active.empty()) return;
  const Device device(grads[0]);
  const HostTables host(items, boxes);
  TensorLists lists;
  lists.grads = &grads;
  const std::vector<double*> a = buffers_of_a(host, sums, active);
  const Workspace space(device, workspace, host, GRADIENTS);
  const Head head = head_of(device, host, active, lists, &a, nullptr, space, nullptr);
  const GradientArgs args{space.tables(), doubles(limits, 2 * host.num_items, "limits"), replace};
  PYLO_LAUNCH(gradient_kernel, device.blocks(gradient_kernel, 256, space.plan.num_side_jobs), 256,
              head, args);
  PYLO_LAUNCH(entry_kernel, static_cast<int>(space.plan.num_entry_jobs), 256, args);
}

void moment_pass(Tensor items, Tensor boxes, Ints active, Tensors_ values, Tensors_ momentum,
                 Tensors_ rms, Tensors_ sums, Tensors_ workspace) {
  if (active.empty()) return;
  const Device device(values[0]);
  const HostTables host(items, boxes);
  TensorLists lists;
  lists.values = &values;
  lists.momentum = &momentum;
  lists.rms = &rms;
  const std::vector<double*> b = buffers_of_b(host, sums, active, true);
  for (int64_t i : active)
    STD_TORCH_CHECK(host.items[i].moments_at >= 0, "item ", i, " has no moments");
  const Workspace space(device, workspace, host, MOMENTS);
  int64_t state_type = -1;
  const Head head = head_of(device, host, active, lists, nullptr, &b, space, &state_type);
  const Plan& plan = space.plan;
  const auto sums_of = state_type == FLOAT32 ? moment_kernel<FLOAT32> : moment_kernel<BFLOAT16>;
  PYLO_LAUNCH(sums_of, device.blocks(sums_of, 256, plan.num_moment_jobs), 256, head, space.tables(),
              space.at<int64_t>(plan.first_moment_job),
              space.at<unsigned>(plan.counters) + host.num_items,
              space.at<double>(plan.moment_partials));
}

// The kernels for a rule, of state in this dtype.
template <int State>
auto feature_kernel_for(bool extended, bool moments) {
  return moments    ? feature_kernel<true, true, State>
         : extended ? feature_kernel<true, false, State>
                    : feature_kernel<false, false, State>;
}

template <int State>
auto scalar_kernel_for(bool extended, int64_t hidden) {
  return !extended     ? scalar_kernel<false, 32, State>
         : hidden == 8 ? scalar_kernel<true, 8, State>
                       : scalar_kernel<true, 4, State>;
}

template <int State>
auto tensor_core_kernel_for(int64_t precision) {
  return precision == 1 ? tensor_core_kernel<2, State> : tensor_core_kernel<1, State>;
}

void feature_pass(Tensor items, Tensor boxes, Ints active, std::vector<double> rule, bool extended,
                  Tensors_ values, Tensors_ grads, Tensors_ momentum, Tensors_ rms,
                  Tensors_ row_or_diag, Tensors_ col, Tensors_ sums_a, Tensor moves, Tensor scale,
                  Tensor factors, Tensor squares, Tensors_ sums_b, Tensors_ workspace) {
  if (active.empty()) return;
  const Device device(values[0]);
  const HostTables host(items, boxes);
  const TensorLists lists{&values, &momentum, &rms, &row_or_diag, &col, nullptr, &grads};
  const std::vector<double*> a = buffers_of_a(host, sums_a, active);
  const std::vector<double*> b = buffers_of_b(host, sums_b, active, extended);
  const FactorSizes sizes = factor_sizes(host, active);
  const Workspace space(device, workspace, host, FEATURES);
  int64_t state_type = -1;
  const Head head = head_of(device, host, active, lists, &a, &b, space, &state_type);
  const PassArgs args{space.tables(),
                      rule_of(rule),
                      bools(moves, host.num_items, "moves"),
                      doubles(scale, host.num_items, "scale"),
                      floats(factors, sizes.factors, "factors"),
                      doubles(squares, sizes.squares, "squares")};
  PYLO_LAUNCH(factor_kernel,
              static_cast<int>(space.plan.num_entry_jobs + space.plan.num_factor_jobs), 256, head,
              args);
  const int64_t jobs = std::max(space.plan.num_jobs, space.plan.num_lead_jobs);
  // a rule's tensors are alike in this
  const bool moments = extended && host.items[active[0]].moments_at >= 0;
  for (int64_t i : active)
    STD_TORCH_CHECK(moments == (host.items[i].moments_at >= 0), "only some items have moments");
  const auto features = state_type == FLOAT32 ? feature_kernel_for<FLOAT32>(extended, moments)
                                              : feature_kernel_for<BFLOAT16>(extended, moments);
  const int threads = feature_threads(moments);
  PYLO_LAUNCH(features, device.blocks(features, threads, jobs), threads, args);
}

void update_pass(Tensor items, Tensor boxes, Ints active, std::vector<double> rule, bool extended,
                 int64_t hidden, int64_t precision, Tensors_ values, Tensors_ grads,
                 Tensors_ momentum, Tensors_ rms, Tensors_ row_or_diag, Tensors_ col,
                 Tensor factors, Tensor squares, Tensors_ sums_b, Tensor moves, Tensor scale,
                 Tensor networks, Tensor network_of, Tensor steps, Tensor param_squares,
                 Tensor update_squares, Tensors_ directions, Tensors_ workspace,
                 std::optional<Tensor> keys) {
  if (active.empty()) return;
  const Device device(values[0]);
  const HostTables host(items, boxes);
  const TensorLists lists{&values, &momentum, &rms, &row_or_diag, &col, &directions, &grads};
  const std::vector<double*> b = buffers_of_b(host, sums_b, active, extended);
  const FactorSizes sizes = factor_sizes(host, active);
  const int64_t num_networks = networks.numel() / network_size(extended, hidden);
  const Workspace space(device, workspace, host, UPDATES);
  int64_t state_type = -1;
  const Head head = head_of(device, host, active, lists, nullptr, &b, space, &state_type);
  const double* squares_ = doubles(squares, sizes.squares, "squares");
  const PassArgs pass{space.tables(),
                      rule_of(rule),
                      bools(moves, host.num_items, "moves"),
                      doubles(scale, host.num_items, "scale"),
                      floats(factors, sizes.factors, "factors"),
                      nullptr};
  const UpdateArgs args{pass,
                        floats(networks, 0, "networks"),
                        static_cast<const int64_t*>(
                            memory(network_of, host.num_items, ScalarType::Long, "network_of")),
                        reinterpret_cast<const Step*>(floats(steps, 4 * host.num_items, "steps")),
                        doubles(param_squares, host.num_items, "param_squares"),
                        doubles(update_squares, host.num_items, "update_squares"),
                        squares_,
                        keys_of(keys, state_type, host, active)};
  const int64_t jobs = space.plan.num_jobs;
  const int slices = static_cast<int>(SLICES * host.num_items);
  if (!extended && precision > 0) {
    STD_TORCH_CHECK(num_networks <= host.num_items, "there are more networks than items");
    const auto prepare = precision == 1 ? prepare_kernel<false, 2> : prepare_kernel<false, 1>;
    const auto update = state_type == FLOAT32 ? tensor_core_kernel_for<FLOAT32>(precision)
                                              : tensor_core_kernel_for<BFLOAT16>(precision);
    PYLO_LAUNCH(prepare, slices + static_cast<int>(num_networks), 128, head, args);
    PYLO_LAUNCH(update, device.blocks(update, 128, jobs), 128, args);
    return;
  }
  const auto prepare = extended ? prepare_kernel<true, 0> : prepare_kernel<false, 0>;
  PYLO_LAUNCH(prepare, slices, 128, head, args);
  const auto update = state_type == FLOAT32 ? scalar_kernel_for<FLOAT32>(extended, hidden)
                                            : scalar_kernel_for<BFLOAT16>(extended, hidden);
  const int threads = scalar_threads(static_cast<int>(hidden));
  PYLO_LAUNCH(update, device.blocks(update, threads, jobs), threads, args);
}

// Not a pass of a batch: it needs no tables. One launch, and one more per MOST_PAIRS after that.
void copy_pass(Tensors_ targets, Tensors_ sources, Tensor ends) {
  if (targets.empty()) return;
  const Device device(targets[0]);
  const std::vector<Pair> pairs = pairs_of(targets, sources);
  Ends* const all = ends_of(ends, pairs.size());
  for (size_t first = 0; first < pairs.size(); first += MOST_PAIRS) {
    Copies copies{};
    copies.count = static_cast<int64_t>(std::min<size_t>(MOST_PAIRS, pairs.size() - first));
    int64_t jobs = 0;
    for (int64_t p = 0; p < copies.count; ++p) {
      copies.pairs[p] = pairs[first + static_cast<size_t>(p)];
      copies.first_job[p] = jobs;
      jobs += copies.pairs[p].rows * jobs_of_row(copies.pairs[p]);
    }
    copies.first_job[copies.count] = jobs;
    copies.ends = reinterpret_cast<unsigned*>(all + first);
    copies.counter = reinterpret_cast<unsigned*>(all + pairs.size());
    PYLO_LAUNCH(copy_kernel, device.blocks(copy_kernel, COPY_THREADS, jobs), COPY_THREADS, copies);
  }
}

// Bytes on the device and pinned on the host, both zeroed by the caller.
Ints workspace_sizes(Tensor items, Tensor boxes, Tensor) {
  const HostTables host(items, boxes);
  return Ints{deal(host.items, host.num_items, host.boxes, host.num_boxes).plan.total,
              Workspace::host_bytes(host.num_items)};
}

// AdamW's launches: launch(head) of up to ADAMW_ENTRIES tensors at a time.
template <class Launch>
void for_entries(const Ints& items, const std::vector<AdamWTensors>& tensors,
                 const Launch& launch) {
  AdamWHead head;
  head.num_entries = head.num_jobs = 0;
  for (size_t a = 0; a < tensors.size(); ++a) {
    head.entries[head.num_entries++] =
        AdamWEntry{tensors[a], items[a], static_cast<int64_t>(a), head.num_jobs};
    head.num_jobs += adamw_jobs(tensors[a].numel);
    if (head.num_entries < ADAMW_ENTRIES && a + 1 < tensors.size()) continue;
    launch(head);
    head.num_entries = head.num_jobs = 0;
  }
}

// Partial sums, and counters after them.
AdamWArgs adamw_room(const Tensors_& values, const Tensors_& workspace) {
  check_list(workspace, 1, "workspace");
  int64_t jobs = 0;
  for (const Tensor& x : values) jobs += adamw_jobs(x.numel());
  AdamWArgs args{};
  args.partials = static_cast<double*>(
      memory(workspace[0], adamw_bytes(jobs), ScalarType::Byte, "workspace[0]"));
  args.counters = reinterpret_cast<unsigned*>(args.partials + jobs);
  return args;
}

int64_t adamw_workspace(Tensors_ values) {
  int64_t jobs = 0;
  for (const Tensor& x : values) jobs += adamw_jobs(x.numel());
  return adamw_bytes(jobs);
}

void square_sums(Tensors_ values, Tensor sums, Tensors_ workspace) {
  if (values.empty()) return;
  const Device device(values[0]);
  AdamWArgs args = adamw_room(values, workspace);
  args.sums = doubles(sums, static_cast<int64_t>(values.size()), "sums");
  std::vector<AdamWTensors> tensors;
  for (const Tensor& x : values) {
    AdamWTensors t{};
    t.numel = x.numel();
    t.value_type = dtype_of(x, "a value");
    t.value = memory(x, t.numel, x.scalar_type(), "a value");
    tensors.push_back(t);
  }
  for_entries(Ints(values.size(), 0), tensors, [&](const AdamWHead& head) {
    PYLO_LAUNCH(square_kernel, device.blocks(square_kernel, 256, head.num_jobs), 256, head, args);
  });
}

void adamw_pass(Ints active, Tensors_ values, Tensors_ grads, Tensors_ means, Tensors_ squares,
                std::vector<double> rule, Tensor numbers, Tensor moves, Tensor scale,
                Tensor update_squares, Tensors_ rounding, Tensors_ workspace) {
  if (active.empty()) return;
  const Device device(moves);
  const AdamWCall call(active, values, grads, means, squares, rule, numbers, moves, scale,
                       update_squares, rounding);
  AdamWArgs args = adamw_room(values, workspace);
  args.rule = call.rule;
  args.numbers = call.numbers;
  args.moves = call.moves;
  args.scale = call.scale;
  args.keys = call.keys;
  args.sums = call.update_squares;
  const auto kernel = call.keys ? adamw_kernel<BFLOAT16> : adamw_kernel<FLOAT32>;
  for_entries(active, call.tensors, [&](const AdamWHead& head) {
    PYLO_LAUNCH(kernel, device.blocks(kernel, 256, head.num_jobs), 256, head, args);
  });
}

#if !defined(PYLO_FIBERS)
#define PYLO_TEXT_(...) #__VA_ARGS__
#define PYLO_TEXT(...) PYLO_TEXT_(__VA_ARGS__)
#if defined(__CUDA_ARCH_LIST__)
std::string cuda_architectures() { return PYLO_TEXT(__CUDA_ARCH_LIST__); }
#else
std::string cuda_architectures() { return "unknown"; }
#endif
#endif

}  // namespace
}  // namespace gpu
}  // namespace pylo_dist

#if !defined(PYLO_FIBERS)
STABLE_TORCH_LIBRARY_FRAGMENT(pylo_dist, m) {
  m.def("cuda_architectures() -> str");
  m.def("cuda_table_fields(str table) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&pylo_dist::gpu::cuda_architectures));
  m.impl("cuda_table_fields", TORCH_BOX(&pylo_dist::table_fields));
}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist, CUDA, m) {
  using namespace pylo_dist::gpu;
  PYLO_DIST_PASSES(PYLO_DIST_IMPLEMENT)
  PYLO_DIST_ADAMW(PYLO_DIST_IMPLEMENT)
}
#endif
