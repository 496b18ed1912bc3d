// SPDX-License-Identifier: GPL-2.0-only
// Device addresses: inaccessible anonymous mappings, as the real driver reserves them.
//
// As was seen of libcuda 580: addresses come from the kernel, and go back to it, in regions of
// whole 32 MiB. Of what is free in those the lowest that is large enough is taken, or, with a hint,
// the lowest from there on; a hint says nothing else where there is such. Only where there is none
// the kernel is asked: for the hint if a region could begin there, else for any address. A region
// in which nothing is left goes back.
#include <sys/mman.h>

#include <algorithm>
#include <iterator>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

// Where the real driver puts its memory pools, which have no regions here.
constexpr CUdeviceptr kLowBegin = 0x302000000;
constexpr CUdeviceptr kLowEnd = kLowBegin + (uint64_t{1} << 36);

constexpr uint64_t kRegion = 32 << 20;

constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

struct Region {
  uint64_t size;
  std::map<CUdeviceptr, CUdeviceptr> gaps;  // free pieces: start and end
};

// The memory mutex is held.
using Regions = std::map<CUdeviceptr, Region>;
Regions& regions() {
  static Regions& r = *new Regions;
  return r;
}

void* get(CUdeviceptr where, uint64_t size) {
  return mmap(reinterpret_cast<void*>(where), size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

void put(CUdeviceptr where, uint64_t size) {
  if (size) munmap(reinterpret_cast<void*>(where), size);
}

CUdeviceptr map_anywhere(uint64_t size, uint64_t alignment) {
  const uint64_t spare = std::max(alignment, kRegion) - 4096;
  void* p = get(0, size + spare);
  if (p == MAP_FAILED) return 0;
  const auto start = reinterpret_cast<CUdeviceptr>(p);
  const CUdeviceptr base = round_up(start, std::max(alignment, kRegion));
  put(start, base - start);
  put(base + size, start + spare - base);
  return base;
}

// The hint is no more than that to the kernel either. 0: something else is there.
CUdeviceptr map_at(CUdeviceptr where, uint64_t size) {
  void* p = get(where, size);
  if (p == MAP_FAILED) return 0;
  if (reinterpret_cast<CUdeviceptr>(p) == where) return where;
  munmap(p, size);
  return 0;
}

CUdeviceptr take(Region& region, std::map<CUdeviceptr, CUdeviceptr>::iterator gap, CUdeviceptr at,
                 uint64_t size) {
  const auto [start, end] = *gap;
  region.gaps.erase(gap);
  if (at > start) region.gaps[start] = at;
  if (at + size < end) region.gaps[at + size] = end;
  return at;
}

CUdeviceptr take_known(CUdeviceptr from, uint64_t size, uint64_t alignment) {
  for (auto& [base, region] : regions()) {
    for (auto gap = region.gaps.begin(); gap != region.gaps.end(); ++gap) {
      const CUdeviceptr at = round_up(std::max(gap->first, from), alignment);
      if (at < gap->second && gap->second - at >= size) return take(region, gap, at, size);
    }
  }
  return 0;
}

CUdeviceptr take_new(CUdeviceptr hint, uint64_t size, uint64_t alignment) {
  const uint64_t whole = round_up(size, kRegion);
  CUdeviceptr base = hint && hint % std::max(alignment, kRegion) == 0 ? map_at(hint, whole) : 0;
  if (!base) base = map_anywhere(whole, alignment);
  if (!base) return 0;
  Region& region = regions()[base];
  region.size = whole;
  if (whole > size) region.gaps[base + size] = base + whole;
  return base;
}

Regions::iterator region_of(CUdeviceptr where) {
  auto it = regions().upper_bound(where);
  if (it == regions().begin()) return regions().end();
  --it;
  return where - it->first < it->second.size ? it : regions().end();
}

void add_gap(Region& region, CUdeviceptr where, uint64_t size) {
  CUdeviceptr end = where + size;
  auto next = region.gaps.lower_bound(where);
  if (next != region.gaps.end() && next->first == end) {
    end = next->second;
    next = region.gaps.erase(next);
  }
  if (next != region.gaps.begin() && std::prev(next)->second == where) {
    std::prev(next)->second = end;
  } else {
    region.gaps[where] = end;
  }
}

}  // namespace

CUdeviceptr reserve(uint64_t size, uint64_t alignment, CUdeviceptr hint) {
  if (const CUdeviceptr at = take_known(hint, size, alignment)) return at;
  return take_new(hint, size, alignment);
}

CUdeviceptr reserve_low(uint64_t size) {
  for (CUdeviceptr at = kLowBegin; at < kLowEnd; at += kPoolBlock) {
    void* p =
        mmap(reinterpret_cast<void*>(at), size, PROT_NONE, kFlags | MAP_FIXED_NOREPLACE, -1, 0);
    if (p != MAP_FAILED) return at;
  }
  return reserve(size);  // crowded: take any address
}

void unreserve(CUdeviceptr where, uint64_t size) {
  const auto it = region_of(where);
  if (it == regions().end()) return put(where, size);
  const CUdeviceptr base = it->first;
  Region& region = it->second;
  add_gap(region, where, size);
  if (region.gaps.begin()->second - region.gaps.begin()->first == region.size) {
    put(base, region.size);
    regions().erase(it);
    return;
  }
  // Without what has been mapped there.
  mmap(reinterpret_cast<void*>(where), size, PROT_NONE, kFlags | MAP_FIXED, -1, 0);
}

}  // namespace phos_sim
