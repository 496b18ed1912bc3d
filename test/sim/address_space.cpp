// SPDX-License-Identifier: GPL-2.0-only
// Device addresses: inaccessible anonymous mappings, as the real driver reserves them.
//
// As there, the lowest free addresses that are large enough are taken: what was freed last is given
// out again only if nothing below it fits.
#include <sys/mman.h>

#include <iterator>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

// Where the real driver puts its memory pools.
constexpr CUdeviceptr kLowBegin = 0x302000000;
constexpr CUdeviceptr kLowEnd = kLowBegin + (uint64_t{1} << 36);

// Clear of what the kernel hands out, so that a gap stays the driver's.
constexpr CUdeviceptr kBegin = 0x6e0000000000;
constexpr CUdeviceptr kEnd = 0x700000000000;

constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

// Free pieces of [kBegin, kEnd): start and end. The memory mutex is held.
using Gaps = std::map<CUdeviceptr, CUdeviceptr>;
Gaps& gaps() {
  static Gaps& g = *new Gaps{{kBegin, kEnd}};
  return g;
}

bool in_area(CUdeviceptr where, uint64_t size) {
  return where >= kBegin && where < kEnd && size <= kEnd - where;
}

bool take(CUdeviceptr where, uint64_t size) {
  auto it = gaps().upper_bound(where);
  if (it == gaps().begin()) return false;
  --it;
  const auto [start, end] = *it;
  if (where + size > end) return false;
  gaps().erase(it);
  if (where > start) gaps()[start] = where;
  if (where + size < end) gaps()[where + size] = end;
  return true;
}

void give_back(CUdeviceptr where, uint64_t size) {
  CUdeviceptr end = where + size;
  auto next = gaps().lower_bound(where);
  if (next != gaps().end() && next->first == end) {
    end = next->second;
    next = gaps().erase(next);
  }
  if (next != gaps().begin() && std::prev(next)->second == where) {
    std::prev(next)->second = end;
  } else {
    gaps()[where] = end;
  }
}

bool map_at(CUdeviceptr where, uint64_t size) {
  void* p =
      mmap(reinterpret_cast<void*>(where), size, PROT_NONE, kFlags | MAP_FIXED_NOREPLACE, -1, 0);
  return p != MAP_FAILED;
}

}  // namespace

CUdeviceptr reserve_at(CUdeviceptr where, uint64_t size) {
  const bool ours = in_area(where, size);
  if (ours && !take(where, size)) return 0;
  if (map_at(where, size)) return where;
  if (ours) give_back(where, size);
  return 0;
}

CUdeviceptr reserve_first(uint64_t size, uint64_t alignment) {
  for (const auto& [start, end] : gaps()) {
    const CUdeviceptr base = round_up(start, alignment);
    if (base >= end || end - base < size) continue;
    return reserve_at(base, size);
  }
  return 0;
}

CUdeviceptr reserve_low(uint64_t size) {
  for (CUdeviceptr at = kLowBegin; at < kLowEnd; at += kPoolBlock) {
    if (CUdeviceptr got = reserve_at(at, size)) return got;
  }
  return reserve_first(size);  // crowded: take any address
}

void unreserve(CUdeviceptr where, uint64_t size) {
  munmap(reinterpret_cast<void*>(where), size);
  if (in_area(where, size)) give_back(where, size);
}

}  // namespace phos_sim
