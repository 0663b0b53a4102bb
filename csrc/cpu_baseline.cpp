#define PYLO_ISA baseline
#include "cpu_kernels.h"

namespace pylo_dist {
extern const Kernels kernels_baseline = {"baseline", gradients, moments, features, network_bytes,
                                     pack,   updates,   copy,    adamw,    squares};
}
