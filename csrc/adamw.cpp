// AdamW's operators on a CPU: jobs, threads and the sums over jobs. The element work is in
// cpu_adamw.h.

#include "adamw_bindings.h"
#include "cpu.h"
#include "cpu_threads.h"
#include "schemas.h"

namespace pylo_dist {
namespace {

// Elements first .. last of the entry `entry` of a call. They follow from the sizes alone, and with
// them the bits of the sums.
struct Part {
  size_t entry;
  int64_t first, last;
};
constexpr int64_t PART = 1 << 16;

template <class SizeOf>
std::vector<Part> parts_of(size_t count, const SizeOf& size_of) {
  std::vector<Part> parts;
  for (size_t a = 0; a < count; ++a) {
    for (int64_t at = 0; at < size_of(a); at += PART)
      parts.push_back(Part{a, at, std::min(size_of(a), at + PART)});
  }
  return parts;
}

void square_sums(Tensors_ values, Tensor sums, Tensors_ workspace) {
  double* const to = doubles(sums, static_cast<int64_t>(values.size()), "sums");
  std::vector<const void*> from;
  Ints types;
  for (const Tensor& x : values) {
    types.push_back(dtype_of(x, "a value"));
    from.push_back(memory(x, x.numel(), x.scalar_type(), "a value"));
  }
  const std::vector<Part> parts =
      parts_of(values.size(), [&](size_t a) { return values[a].numel(); });
  std::vector<double> partials(parts.size());
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(parts.size()), [&](int64_t j) {
    const Part& part = parts[j];
    partials[j] = k.squares(from[part.entry], types[part.entry], part.first, part.last);
  });
  std::fill(to, to + values.size(), 0.0);
  for (size_t j = 0; j < parts.size(); ++j) to[parts[j].entry] += partials[j];
}

void adamw_pass(Ints active, Tensors_ values, Tensors_ grads, Tensors_ means, Tensors_ squares,
                std::vector<double> rule, Tensor numbers, Tensor moves, Tensor scale,
                Tensor update_squares, Tensors_ rounding, Tensors_ workspace) {
  const AdamWCall call(active, values, grads, means, squares, rule, numbers, moves, scale,
                       update_squares, rounding);
  const std::vector<Part> parts = parts_of(
      active.size(), [&](size_t a) { return call.moves[active[a]] ? call.tensors[a].numel : 0; });
  std::vector<double> partials(parts.size());
  const Kernels& k = kernels();
  for_each(static_cast<int64_t>(parts.size()), [&](int64_t j) {
    const Part& part = parts[j];
    const int64_t i = active[part.entry];
    partials[j] = k.adamw(call.tensors[part.entry], call.rule, call.numbers[part.entry],
                          static_cast<float>(call.scale[i]), call.keys ? call.keys + i : nullptr,
                          part.first, part.last);
  });
  for (int64_t i : active) call.update_squares[i] = 0.0;
  for (size_t j = 0; j < parts.size(); ++j)
    call.update_squares[active[parts[j].entry]] += partials[j];
}

int64_t adamw_workspace(Tensors_ values) { return 0; }

}  // namespace
}  // namespace pylo_dist

STABLE_TORCH_LIBRARY_FRAGMENT(pylo_dist, m){PYLO_DIST_ADAMW(PYLO_DIST_DEFINE)}

STABLE_TORCH_LIBRARY_IMPL(pylo_dist, CPU, m) {
  using namespace pylo_dist;
  PYLO_DIST_ADAMW(PYLO_DIST_IMPLEMENT)
}
