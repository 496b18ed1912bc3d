// SPDX-License-Identifier: GPL-2.0-only
// Device addresses: inaccessible anonymous mappings, as the real driver reserves them.
#include <sys/mman.h>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

// Where the real driver puts its memory pools.
constexpr CUdeviceptr kLowBegin = 0x302000000;
constexpr CUdeviceptr kLowEnd = kLowBegin + (uint64_t{1} << 36);

constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

}  // namespace

CUdeviceptr reserve_at(CUdeviceptr where, uint64_t size) {
  void* p =
      mmap(reinterpret_cast<void*>(where), size, PROT_NONE, kFlags | MAP_FIXED_NOREPLACE, -1, 0);
  return p == MAP_FAILED ? 0 : reinterpret_cast<CUdeviceptr>(p);
}

CUdeviceptr reserve_high(uint64_t size, uint64_t alignment) {
  void* p = mmap(nullptr, size + alignment, PROT_NONE, kFlags, -1, 0);
  if (p == MAP_FAILED) return 0;
  CUdeviceptr start = reinterpret_cast<CUdeviceptr>(p);
  CUdeviceptr base = round_up(start, alignment);
  if (base > start) munmap(p, base - start);
  munmap(reinterpret_cast<void*>(base + size), start + alignment - base);
  return base;
}

CUdeviceptr reserve_low(uint64_t size) {
  for (CUdeviceptr at = kLowBegin; at < kLowEnd; at += kPoolBlock) {
    if (CUdeviceptr got = reserve_at(at, size)) return got;
  }
  return reserve_high(size);  // crowded: take any address
}

void unreserve(CUdeviceptr where, uint64_t size) {
  munmap(reinterpret_cast<void*>(where), size);
}

}  // namespace phos_sim
