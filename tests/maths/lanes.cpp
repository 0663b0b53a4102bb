// What test_lanes.py calls of csrc/include/pylo_dist/lanes.h, as a C library.
#include "emulated_warp.h"

using namespace pylo_dist::lanes;

namespace {

// Normalised features x (n, features), row-major, through the network, 16 elements at a time; out
// (n, 2).
template <class Warp, int kParts>
void run(const NetworkPointers& net, int64_t n, int extended, const float* x, float* out) {
  const int features = extended ? 30 : 28;
  typename Warp::template Each<LaneWeights<kParts>> w;
  Scales<Warp> scales;
  load_network<Warp, kParts>(w, scales, net, extended);
  for (int64_t first = 0; first < n; first += 16) {
    typename Warp::template Each<LaneInputs<kParts>> in;
    typename Warp::template Each<Accumulator> acc;
    Warp::lanes([&](int lane) {
      for (int s = 0; s < kSteps; ++s) {
        float slots[2][4];
        for (int element = 0; element < 2; ++element)
          for (int j = 0; j < 4; ++j) {
            const int64_t i = first + lane / 4 + 8 * element;
            const int feature = feature_of_slot(extended, lane % 4, 4 * s + j);
            slots[element][j] = i < n && feature >= 0 ? x[i * features + feature] : 0.0f;
          }
        pack_inputs<kParts>(in[lane], s, slots[0], slots[1]);
      }
    });
    network<Warp, kParts>(
        w, in, acc, [&](int lane, int layer, int i) { return bias_of<kParts>(w[lane], layer, i); });
    for (int lane = 0; lane < 32; lane += 4)
      for (int element = 0; element < 2; ++element)
        for (int o = 0; o < 2; ++o) {
          const int64_t i = first + lane / 4 + 8 * element;
          if (i < n) out[2 * i + o] = acc[lane].x[2 * element + o];
        }
  }
}

}  // namespace

extern "C" {

void lanes_network(int parts, int truncates, const float* w1, int64_t stride, const float* b1,
                   const float* w2, const float* b2, const float* w3, const float* b3, int64_t n,
                   int extended, const float* x, float* out) {
  const NetworkPointers net{w1, stride, b1, w2, b2, w3, b3};
  auto* chosen = parts == 2
                     ? (truncates ? run<EmulatedWarp<true>, 2> : run<EmulatedWarp<false>, 2>)
                     : (truncates ? run<EmulatedWarp<true>, 1> : run<EmulatedWarp<false>, 1>);
  chosen(net, n, extended, x, out);
}

void lanes_to_half(int64_t n, const float* x, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half::to_half(x[i]);
}

void lanes_from_half(int64_t n, const uint16_t* x, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = half::from_half(x[i]);
}

int lanes_feature_of_slot(int extended, int t, int slot) {
  return feature_of_slot(extended, t, slot);
}
}
