// SPDX-License-Identifier: GPL-2.0-only
// Reads memory and does next to nothing with it: how fast the device's memory is.
#include <cstdint>

#include "tools/bench/read_arguments.h"

extern "C" __global__ void __launch_bounds__(512)
    phos_bench_read(const __grid_constant__ phos_bench::ReadArguments a) {
  const auto* p = reinterpret_cast<const uint4*>(a.source);
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 7 * step < a.vectors; i += 8 * step) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = p[i + j * step];
#pragma unroll
    for (int j = 0; j < 8; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < a.vectors; i += step) sum += p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
  if (sum == 0x9e3779b9) *reinterpret_cast<uint32_t*>(a.out) = sum;  // so that it is not left out
}
