// SPDX-License-Identifier: GPL-2.0-only
// What phos's own kernels (gpu-tracker/copy/kernels.cu, tools/bench/read.cu) do on the simulated
// device.
#include <cstring>
#include <vector>

#include "gpu-tracker/copy/kernel_arguments.h"
#include "test/sim/memory.h"
#include "test/sim/module.h"
#include "test/sim/page_hash_reference.h"
#include "tools/bench/read_arguments.h"

namespace phos_sim {
namespace {

bool read_device(CUdeviceptr from, void* to, uint64_t bytes) {
  auto* at = static_cast<char*>(to);
  return for_each_piece(from, bytes, [&](char* piece, uint64_t n) {
    memcpy(at, piece, n);
    at += n;
  });
}

bool write_device(CUdeviceptr to, const void* from, uint64_t bytes) {
  auto* at = static_cast<const char*>(from);
  return for_each_piece(to, bytes, [&](char* piece, uint64_t n) {
    memcpy(piece, at, n);
    at += n;
  });
}

CUresult hash_pages(const Launch& launch, bool copy) {
  const auto a = launch.argument<phos::HashArguments>(0);
  if (launch.threads % phos::kHashThreads) return CUDA_ERROR_LAUNCH_FAILED;
  std::vector<uint32_t> level2(phos::kLevel2Words);
  if (!read_device(a.level2, level2.data(), 4 * level2.size())) return CUDA_ERROR_ILLEGAL_ADDRESS;
  for (uint64_t i = 0; i < a.count; i++) {
    phos::PageEntry entry;
    if (!read_device(a.pages + i * sizeof entry, &entry, sizeof entry)) {
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    if (entry.address % 16) return CUDA_ERROR_MISALIGNED_ADDRESS;
    std::vector<uint8_t> page(phos::kPageBytes);
    if (!read_device(entry.address, page.data(), entry.bytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
    if (copy && !write_device(a.staging + i * page.size(), page.data(), page.size())) {
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    const auto hash = phos_test::page_hash(page.data(), a.level1, level2.data(), a.level3);
    if (!write_device(a.hashes + i * hash.size(), hash.data(), hash.size())) {
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace

CUresult run_hash_pages(const Launch& launch) {
  return hash_pages(launch, false);
}

CUresult run_copy_hash_pages(const Launch& launch) {
  return hash_pages(launch, true);
}

CUresult run_bench_read(const Launch& launch) {
  const auto a = launch.argument<phos_bench::ReadArguments>(0);
  volatile uint64_t sum = 0;
  const bool ok = for_each_piece(a.source, a.vectors * 16, [&](char* piece, uint64_t n) {
    for (uint64_t i = 0; i + 8 <= n; i += 64) sum = sum + static_cast<uint64_t>(piece[i]);
  });
  return ok ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

}  // namespace phos_sim
