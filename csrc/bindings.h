// From the tensor lists of a call to pointers, with checks. Included by ops.cpp and cuda.cu;
// torch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "packing.h"
#include "pylo_dist/mlp.h"

namespace pylo_dist {

using torch::stable::Tensor;
using Tensors_ = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using torch::headeronly::ScalarType;

inline int64_t dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return FLOAT32;
    case ScalarType::BFloat16:
      return BFLOAT16;
    case ScalarType::Half:
      return FLOAT16;
    default:
      STD_TORCH_CHECK(false, name,
                      " has a dtype without a kernel; wanted float32, bfloat16 or float16");
      return -1;
  }
}

inline void check_list(const Tensors_& list, int64_t size, const char* name) {
  STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == size, name, " has ", list.size(),
                  " tensors, wanted ", size);
}

// The memory of a contiguous tensor of `type` with at least `numel` elements.
inline void* memory(const Tensor& x, int64_t numel, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(x.numel() >= numel, name, " has ", x.numel(), " elements, wanted ", numel);
  void* const data = const_cast<void*>(x.data_ptr());
  STD_TORCH_CHECK(data || !x.numel(), name, " has no memory: its storage was freed");
  return data;
}

inline float* floats(const Tensor& x, int64_t numel, const char* name) {
  return static_cast<float*>(memory(x, numel, ScalarType::Float, name));
}

// Momentum or rms of an item: float32, or, where `type` is given, also bfloat16, whose memory is
// meant then, all of a call alike (-1 before the first).
inline float* means(const Tensor& x, int64_t numel, int64_t* type, const char* name) {
  const int64_t found = x.scalar_type() == ScalarType::BFloat16 ? BFLOAT16 : FLOAT32;
  if (!type || found == FLOAT32) floats(x, numel, name);
  if (type) {
    STD_TORCH_CHECK(*type < 0 || *type == found, name, " has another dtype than other state");
    *type = found;
  }
  return static_cast<float*>(memory(x, numel, x.scalar_type(), name));
}

inline double* doubles(const Tensor& x, int64_t numel, const char* name) {
  return static_cast<double*>(memory(x, numel, ScalarType::Double, name));
}

inline const bool* bools(const Tensor& x, int64_t numel, const char* name) {
  return static_cast<const bool*>(memory(x, numel, ScalarType::Bool, name));
}

#define PYLO_DIST_NAME_ONE(name) #name " "
#define PYLO_DIST_NAME_MANY(name, count) #name ":" + std::to_string(count) + " "

// The fields of a row of "items" or "boxes", and the numbers of "rule", in order: "item sizes:5
// ...", a field of several with how many.
inline std::string table_fields(std::string table) {
  const std::string nothing;
  if (table == "boxes")
    return nothing + PYLO_DIST_BOX_FIELDS(PYLO_DIST_NAME_ONE, PYLO_DIST_NAME_MANY) "";
  if (table == "items")
    return nothing + PYLO_DIST_ITEM_FIELDS(PYLO_DIST_NAME_ONE, PYLO_DIST_NAME_MANY) "";
  if (table == "rule")
    return nothing + PYLO_DIST_RULE_FIELDS(PYLO_DIST_NAME_ONE, PYLO_DIST_NAME_MANY) "";
  STD_TORCH_CHECK(false, "there is no table '", table, "'; wanted items, boxes or rule");
  return nothing;
}

// The tables, which are on the host whatever the device of the other tensors.
struct Tables {
  const Item* items;
  const Box* boxes;
  int64_t num_items, num_boxes;

  Tables(const Tensor& items_, const Tensor& boxes_)
      : items(static_cast<const Item*>(memory(items_, 0, ScalarType::Long, "items"))),
        boxes(static_cast<const Box*>(memory(boxes_, 0, ScalarType::Long, "boxes"))),
        num_items(items_.numel() / ITEM_WIDTH),
        num_boxes(boxes_.numel() / BOX_WIDTH) {
    STD_TORCH_CHECK(items_.is_cpu() && boxes_.is_cpu(), "items and boxes must be on the host");
    STD_TORCH_CHECK(
        num_items * ITEM_WIDTH == items_.numel() && num_boxes * BOX_WIDTH == boxes_.numel(),
        "items and boxes were not made for this library");
  }

  void check_active(const Ints& active) const {
    for (int64_t i : active) STD_TORCH_CHECK(0 <= i && i < num_items, "there is no item ", i);
  }
};

// Pointers of every item of a call. Lists that a pass has no use for are null.
struct TensorLists {
  const Tensors_ *values = nullptr, *momentum = nullptr, *rms = nullptr, *row_or_diag = nullptr,
                 *col = nullptr, *directions = nullptr;
  const Tensors_* grads = nullptr;  // one per entry of `active`
};

// Fills in those of the items in `active`. Where momentum and rms may be bfloat16, their dtype is
// given back in `state_type`.
inline void fill_pointers(const Tables& tables, const Ints& active, const TensorLists& lists,
                          Tensors* all, int64_t* state_type = nullptr) {
  for (const Tensors_* list :
       {lists.values, lists.momentum, lists.rms, lists.row_or_diag, lists.col}) {
    if (list) check_list(*list, tables.num_items, "a list with one tensor per item");
  }
  if (lists.grads) check_list(*lists.grads, static_cast<int64_t>(active.size()), "grads");
  tables.check_active(active);
  for (size_t a = 0; a < active.size(); ++a) {
    const int64_t i = active[a];
    const Item& item = tables.items[i];
    Tensors& t = all[i];
    if (lists.grads) {
      const Tensor& grad = (*lists.grads)[a];
      t.grad_type = dtype_of(grad, "a gradient");
      t.grad = memory(grad, item.numel, grad.scalar_type(), "a gradient");
    }
    if (lists.values) {
      const Tensor& value = (*lists.values)[i];
      t.value_type = dtype_of(value, "a value");
      t.value = memory(value, item.numel, value.scalar_type(), "a value");
    }
    if (lists.momentum)
      t.momentum = means((*lists.momentum)[i], K * item.numel, state_type, "momentum");
    if (lists.rms) t.rms = means((*lists.rms)[i], item.numel, state_type, "rms");
    if (lists.row_or_diag) {
      float* first = floats((*lists.row_or_diag)[i], K * (item.factored ? item.rows : item.numel),
                            "row_or_diag");
      (item.factored ? t.row : t.diag) = first;
    }
    if (lists.col && item.factored) t.col = floats((*lists.col)[i], K * item.cols, "col");
    if (lists.directions && !lists.directions->empty()) {
      check_list(*lists.directions, static_cast<int64_t>(active.size()), "directions");
      t.direction = floats((*lists.directions)[a], item.numel, "a direction");
    }
  }
}

inline std::vector<Tensors> pointers_of(const Tables& tables, const Ints& active,
                                        const TensorLists& lists, int64_t* state_type = nullptr) {
  std::vector<Tensors> all(tables.num_items, Tensors{});
  fill_pointers(tables, active, lists, all.data(), state_type);
  return all;
}

// The keys that state of this dtype is rounded with, one per item; null where it is float32.
inline const int64_t* keys_of(const std::optional<Tensor>& keys, int64_t state_type,
                              const Tables& tables, const Ints& active) {
  STD_TORCH_CHECK((state_type == BFLOAT16) == keys.has_value(),
                  "state is rounded with keys where it is bfloat16, and nowhere else");
  if (!keys) return nullptr;
  for (int64_t i : active) {
    STD_TORCH_CHECK(tables.items[i].shard_run > 0 || !tables.items[i].numel, "item ", i,
                    " has runs of no element");
  }
  return static_cast<const int64_t*>(memory(*keys, tables.num_items, ScalarType::Long, "keys"));
}

// The float64 buffers of a Sum; `needed(item)` gives the end of what an item has in its buffer.
template <class BufferOf, class EndOf>
std::vector<double*> buffers_of(const Tables& tables, const Tensors_& sums, const Ints& active,
                                BufferOf buffer, EndOf end) {
  Ints sizes(sums.size(), 0);
  for (int64_t i : active) {
    const int64_t at = buffer(tables.items[i]);
    STD_TORCH_CHECK(0 <= at && at < static_cast<int64_t>(sums.size()), "item ", i,
                    " has no buffer ", at);
    if (end(tables.items[i]) > sizes[at]) sizes[at] = end(tables.items[i]);
  }
  std::vector<double*> pointers;
  for (size_t b = 0; b < sums.size(); ++b)
    pointers.push_back(doubles(sums[b], sizes[b], "a buffer of sums"));
  return pointers;
}

// How much `factors` and `squares` the factored ones of these items need.
struct FactorSizes {
  int64_t factors = 0, squares = 0;
};

inline FactorSizes factor_sizes(const Tables& tables, const Ints& active) {
  FactorSizes sizes;
  for (int64_t i : active) {
    const Item& item = tables.items[i];
    if (!item.factored) continue;
    sizes.factors = std::max(sizes.factors, item.factors_at + factors_size(item));
    sizes.squares = std::max(sizes.squares, item.squares_at + 4 * K * item.leads);
  }
  return sizes;
}

// Of a tensor of 1 or 2 dims: rows, columns, and elements from row to row.
struct Rows {
  int64_t rows, columns, pitch;
};

inline Rows rows_of(const Tensor& x, const char* name) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims == 1 || dims == 2, name, " has ", dims, " dims, wanted 1 or 2");
  const int64_t columns = x.size(dims - 1);
  STD_TORCH_CHECK(columns == 1 || x.stride(dims - 1) == 1, name, " has neighbours far apart");
  return dims == 1 ? Rows{1, columns, columns} : Rows{x.size(0), columns, x.stride(0)};
}

// None of them is empty.
inline std::vector<Pair> pairs_of(const Tensors_& targets, const Tensors_& sources) {
  check_list(sources, static_cast<int64_t>(targets.size()), "sources");
  std::vector<Pair> pairs;
  pairs.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &to = targets[i], &from = sources[i];
    const Rows read = rows_of(from, "a source"), written = rows_of(to, "a target");
    STD_TORCH_CHECK(read.rows == written.rows && read.columns == written.columns, "source ", i,
                    " has another shape than its target");
    STD_TORCH_CHECK(read.rows * read.columns > 0, "target ", i, " is empty");
    const bool together = read.pitch == read.columns && written.pitch == written.columns;
    pairs.push_back(Pair{from.data_ptr(), to.data_ptr(), together ? 1 : read.rows,
                         together ? read.rows * read.columns : read.columns, read.pitch,
                         written.pitch, static_cast<int32_t>(dtype_of(from, "a source")),
                         static_cast<int32_t>(dtype_of(to, "a target"))});
  }
  return pairs;
}

// One for each of so many, and room for another.
inline Ends* ends_of(const Tensor& ends, size_t pairs) {
  return reinterpret_cast<Ends*>(floats(ends, 2 * static_cast<int64_t>(pairs) + 2, "ends"));
}

inline RuleConstants rule_of(const std::vector<double>& rule) {
  STD_TORCH_CHECK(rule.size() == RULE_WIDTH, "rule has ", rule.size(), " numbers, wanted ",
                  RULE_WIDTH);
  RuleNumbers numbers;
  std::copy(rule.begin(), rule.end(), reinterpret_cast<double*>(&numbers));
  return rule_constants(numbers);
}

inline int64_t network_size(bool extended, int64_t hidden) {
  if (!extended && hidden == 32) return PackedNetwork<false, 32>::SIZE;
  if (extended && hidden == 8) return PackedNetwork<true, 8>::SIZE;
  if (extended && hidden == 4) return PackedNetwork<true, 4>::SIZE;
  STD_TORCH_CHECK(false, "no kernel for ", extended ? 30 : 28, " features and ", hidden,
                  " hidden units");
  return 0;
}

inline int64_t num_inputs(bool extended) {
  return extended ? Layout<true>::INPUTS : Layout<false>::INPUTS;
}

inline int64_t first_factor(bool extended) {
  return extended ? Layout<true>::FIRST_FACTOR : Layout<false>::FIRST_FACTOR;
}

inline int64_t param_feature(bool extended) {
  return extended ? Layout<true>::P : Layout<false>::P;
}

// Sums of pass B per lead of an item.
inline int64_t num_sums(const Item& item, bool extended) {
  if (item.factored) return extended ? Layout<true>::SUMS_FACTORED : Layout<false>::SUMS_FACTORED;
  return extended ? Layout<true>::SUMS_DIAG : Layout<false>::SUMS_DIAG;
}

// The end of what an item has in the buffers of the two Sums.
inline int64_t end_of_a(const Item& item) {
  return std::max(item.a_audit + AUDIT_SQUARES + 1, item.a_at + item.rows + item.cols);
}

inline int64_t end_of_b(const Item& item, bool extended) {
  return std::max(item.b_at + num_sums(item, extended) * item.leads,
                  item.moments_at < 0 ? 0 : item.moments_at + NUM_MOMENTS);
}

inline std::vector<double*> buffers_of_a(const Tables& tables, const Tensors_& sums,
                                         const Ints& active) {
  return buffers_of(tables, sums, active, [](const Item& item) { return item.a_buffer; }, end_of_a);
}

inline std::vector<double*> buffers_of_b(const Tables& tables, const Tensors_& sums,
                                         const Ints& active, bool extended) {
  return buffers_of(
      tables, sums, active, [](const Item& item) { return item.b_buffer; },
      [extended](const Item& item) { return end_of_b(item, extended); });
}

}  // namespace pylo_dist
