// From the tensor lists of an AdamW call to pointers, with checks; both backends.
#pragma once

#include "bindings.h"
#include "pylo_dist/adamw.h"

namespace pylo_dist {

// Of a call: lists and `numbers` have an entry per entry of `active`; moves, scale and
// update_squares one per item of the batch.
struct AdamWCall {
  std::vector<AdamWTensors> tensors;
  AdamWRule rule;
  const AdamWNumbers* numbers;
  const bool* moves;
  const double* scale;
  double* update_squares;
  const int64_t* keys = nullptr;  // per item, where state is bfloat16

  AdamWCall(const Ints& active, const Tensors_& values, const Tensors_& grads,
            const Tensors_& means, const Tensors_& squares, const std::vector<double>& rule_,
            const Tensor& numbers_, const Tensor& moves_, const Tensor& scale_,
            const Tensor& update_squares_, const Tensors_& rounding) {
    const int64_t count = static_cast<int64_t>(active.size()), num_items = moves_.numel();
    check_list(values, count, "values");
    check_list(grads, count, "grads");
    check_list(means, count, "means");
    check_list(squares, count, "squares");
    for (int64_t i : active) STD_TORCH_CHECK(0 <= i && i < num_items, "there is no item ", i);
    STD_TORCH_CHECK(rule_.size() == ADAMW_RULE_WIDTH, "rule has ", rule_.size(),
                    " numbers, wanted ", ADAMW_RULE_WIDTH);
    float* const to = &rule.beta_1;
    for (int n = 0; n < ADAMW_RULE_WIDTH; ++n) to[n] = static_cast<float>(rule_[n]);
    numbers = reinterpret_cast<const AdamWNumbers*>(
        floats(numbers_, ADAMW_NUMBERS_WIDTH * count, "numbers"));
    moves = bools(moves_, num_items, "moves");
    scale = doubles(scale_, num_items, "scale");
    update_squares = doubles(update_squares_, num_items, "update_squares");
    const AdamWShard* shards = nullptr;
    if (!rounding.empty()) {
      check_list(rounding, 2, "rounding");
      STD_TORCH_CHECK(rounding[0].is_cpu(), "shards must be on the host");
      shards =
          static_cast<AdamWShard*>(memory(rounding[0], 3 * num_items, ScalarType::Long, "shards"));
      keys = static_cast<int64_t*>(memory(rounding[1], num_items, ScalarType::Long, "keys"));
    }
    for (int64_t a = 0; a < count; ++a) {
      AdamWTensors t{};
      t.numel = values[a].numel();
      t.value_type = dtype_of(values[a], "a value");
      t.grad_type = dtype_of(grads[a], "a gradient");
      t.value = memory(values[a], t.numel, values[a].scalar_type(), "a value");
      t.grad = memory(grads[a], t.numel, grads[a].scalar_type(), "a gradient");
      const ScalarType state = keys ? ScalarType::BFloat16 : ScalarType::Float;
      t.mean = memory(means[a], t.numel, state, "a mean");
      t.square = memory(squares[a], t.numel, state, "a mean of squares");
      t.shard = shards ? shards[active[a]] : AdamWShard{};
      STD_TORCH_CHECK(!shards || t.shard.run > 0 || !t.numel, "item ", active[a],
                      " has runs of no element");
      tensors.push_back(t);
    }
  }
};

static_assert(sizeof(AdamWRule) == 4 * ADAMW_RULE_WIDTH &&
                  sizeof(AdamWNumbers) == 4 * ADAMW_NUMBERS_WIDTH,
              "a row is its fields and nothing else");

}  // namespace pylo_dist
