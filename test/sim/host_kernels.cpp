// SPDX-License-Identifier: GPL-2.0-only
// What kernels do on the simulated device. To add one: its PTX goes where its users are (the test
// kernels: test_kernels.h), its host function into the table below.
#include <algorithm>
#include <ctime>

#include "gpu-tracker/copy/kernel_arguments.h"
#include "test/sim/memory.h"
#include "test/sim/module.h"
#include "test/sim/test_kernels.h"
#include "tools/bench/read_arguments.h"

namespace phos_sim {
namespace {

// Calls visit(element, index) for the elements that the launch's threads reach.
template <typename Visit>
CUresult for_each_u32(CUdeviceptr p, uint64_t n, const Launch& launch, Visit visit) {
  uint64_t index = 0;
  bool ok = for_each_piece(p, std::min(n, launch.threads) * 4, [&](char* at, uint64_t bytes) {
    auto* elements = reinterpret_cast<uint32_t*>(at);
    for (uint64_t i = 0; i < bytes / 4; i++) visit(&elements[i], static_cast<uint32_t>(index++));
  });
  return ok ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult run_increment(const Launch& launch) {
  return for_each_u32(launch.argument<CUdeviceptr>(0), launch.argument<uint32_t>(8), launch,
                      [](uint32_t* p, uint32_t) { ++*p; });
}

CUresult run_fill(const Launch& launch) {
  const auto seed = launch.argument<uint32_t>(12);
  return for_each_u32(launch.argument<CUdeviceptr>(0), launch.argument<uint32_t>(8), launch,
                      [seed](uint32_t* p, uint32_t i) { *p = phos_test::fill_value(seed, i); });
}

CUresult run_spin(const Launch& launch) {
  auto ns = static_cast<int64_t>(launch.argument<uint64_t>(0));
  timespec left = {ns / 1000000000, ns % 1000000000};
  while (nanosleep(&left, &left)) {
  }
  return CUDA_SUCCESS;
}

// phos_touch_global gets its module's variable as a hidden second argument (module.cpp).
CUresult run_touch_global(const Launch& launch) {
  const auto value = launch.argument<uint32_t>(0);
  return for_each_u32(launch.argument<CUdeviceptr>(8), 1, launch,
                      [value](uint32_t* p, uint32_t) { *p += value; });
}

constexpr HostKernel kKernels[] = {
    {"phos_increment", {8, 4}, run_increment},
    {"phos_fill", {8, 4, 4}, run_fill},
    {"phos_spin", {8}, run_spin},
    {"phos_touch_global", {4}, run_touch_global},
    {phos::kHashKernel, {sizeof(phos::HashArguments)}, run_hash_pages},
    {phos::kCopyHashKernel, {sizeof(phos::HashArguments)}, run_copy_hash_pages},
    {"phos_bench_read", {sizeof(phos_bench::ReadArguments)}, run_bench_read},
};

}  // namespace

const HostKernel* find_host_kernel(const char* name) {
  for (const HostKernel& k : kKernels) {
    if (!strcmp(k.name, name)) return &k;
  }
  return nullptr;
}

}  // namespace phos_sim
