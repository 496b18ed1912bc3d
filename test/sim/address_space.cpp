// SPDX-License-Identifier: GPL-2.0-only
// Device addresses: inaccessible anonymous mappings, as the real driver reserves them.
#include <sys/mman.h>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

// Where the real driver puts memory of cuMemAddressReserve.
constexpr CUdeviceptr kLowBegin = 0x302000000;
constexpr CUdeviceptr kLowEnd = 0x500000000000;

constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

CUdeviceptr reserve_at(CUdeviceptr where, uint64_t size) {
  void* p =
      mmap(reinterpret_cast<void*>(where), size, PROT_NONE, kFlags | MAP_FIXED_NOREPLACE, -1, 0);
  return p == MAP_FAILED ? 0 : reinterpret_cast<CUdeviceptr>(p);
}

CUdeviceptr reserve_high(uint64_t size) {
  void* p = mmap(nullptr, size + kGranularity, PROT_NONE, kFlags, -1, 0);
  if (p == MAP_FAILED) return 0;
  CUdeviceptr start = reinterpret_cast<CUdeviceptr>(p);
  CUdeviceptr base = round_up(start, kGranularity);
  if (base > start) munmap(p, base - start);
  munmap(reinterpret_cast<void*>(base + size), start + kGranularity - base);
  return base;
}

// First fit among this process's own reservations; what else lies there is stepped over.
CUdeviceptr reserve_low(uint64_t size) {
  CUdeviceptr at = kLowBegin;
  auto next = memory().reservations.lower_bound(at);
  for (; at + size <= kLowEnd; at += kGranularity) {
    for (; next != memory().reservations.end() && next->first < at + size; ++next) {
      if (next->first + next->second > at) at = next->first + next->second;
    }
    if (CUdeviceptr got = reserve_at(at, size)) return got;
    if (at > kLowBegin + (uint64_t{1} << 36)) break;  // crowded: take any address
  }
  return reserve_high(size);
}

void unreserve(CUdeviceptr where, uint64_t size) {
  munmap(reinterpret_cast<void*>(where), size);
}

}  // namespace phos_sim
