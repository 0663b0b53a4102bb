// The passes over the elements of one job, compiled once per instruction set (cpu_avx512.cpp,
// cpu_avx2.cpp, cpu_baseline.cpp).
#pragma once

#include "cpu_adamw.h"
#include "cpu_features.h"
#include "cpu_gradients.h"
#include "cpu_packing.h"
#include "cpu_updates.h"
