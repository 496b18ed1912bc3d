// SPDX-License-Identifier: GPL-2.0-only
// Device addresses: inaccessible anonymous mappings, as the real driver reserves them.
//
// As was seen of libcuda 580 (gpu-tracker/agent/regain.c): addresses come from the kernel, and go
// back to it, in regions of whole 32 MiB. What is free in the newest region is taken first; of
// that, with a hint the lowest from there on, else the smallest piece. A hint says nothing else
// where there is such. Only where there is none the kernel is asked: for the first addresses from
// the hint on that nobody had when /proc/self/maps was last read, else for any. A region in which
// nothing is left goes back.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

// Where the real driver puts its memory pools, which have no regions here.
constexpr CUdeviceptr kLowBegin = 0x302000000;
constexpr CUdeviceptr kLowEnd = kLowBegin + (uint64_t{1} << 36);

constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

struct Region {
  uint64_t size;
  uint64_t born;
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

CUdeviceptr take(Region& region, std::map<CUdeviceptr, CUdeviceptr>::iterator gap, CUdeviceptr at,
                 uint64_t size) {
  const auto [start, end] = *gap;
  region.gaps.erase(gap);
  if (at > start) region.gaps[start] = at;
  if (at + size < end) region.gaps[at + size] = end;
  return at;
}

CUdeviceptr take_known(CUdeviceptr from, uint64_t size, uint64_t alignment) {
  Region* newest = nullptr;
  std::map<CUdeviceptr, CUdeviceptr>::iterator best;
  for (auto& [base, region] : regions()) {
    if (newest && region.born < newest->born) continue;
    for (auto gap = region.gaps.begin(); gap != region.gaps.end(); ++gap) {
      const CUdeviceptr at = round_up(std::max(gap->first, from), alignment);
      if (at >= gap->second || gap->second - at < size) continue;
      const bool smaller =
          newest == &region && gap->second - gap->first < best->second - best->first;
      if (newest == &region && (from || !smaller)) continue;
      newest = &region;
      best = gap;
    }
  }
  if (!newest) return 0;
  return take(*newest, best, round_up(std::max(best->first, from), alignment), size);
}

// What others had when the driver looked last.
struct Span {
  CUdeviceptr begin, end;
};
constexpr size_t kMaxOthers = 16384;
Span g_others[kMaxOthers];
size_t g_other_count;

bool is_others(CUdeviceptr begin, CUdeviceptr end) {
  return std::any_of(g_others, g_others + g_other_count,
                     [=](const Span& s) { return s.begin < end && s.end > begin; });
}

bool is_region(CUdeviceptr begin, CUdeviceptr end) {
  for (const auto& [base, region] : regions()) {
    if (base < end && base + region.size > begin) return true;
  }
  return false;
}

CUdeviceptr map_near(CUdeviceptr hint, uint64_t size, uint64_t alignment) {
  constexpr CUdeviceptr kEnd = uint64_t{1} << 47;
  CUdeviceptr at = round_up(hint, std::max(alignment, kRegion));
  while (at + size < kEnd && (is_others(at, at + size) || is_region(at, at + size))) at += kRegion;
  if (at + size >= kEnd) return 0;
  void* p = get(at, size);
  if (p == MAP_FAILED) return 0;
  const auto got = reinterpret_cast<CUdeviceptr>(p);
  if (got >= hint && got % std::max(alignment, kRegion) == 0) return got;
  munmap(p, size);
  return 0;
}

CUdeviceptr take_new(CUdeviceptr hint, uint64_t size, uint64_t alignment) {
  static uint64_t born;
  const uint64_t whole = round_up(size, kRegion);
  CUdeviceptr base = hint ? map_near(hint, whole, alignment) : 0;
  if (!base) base = map_region(whole, alignment);
  if (!base) return 0;
  Region& region = regions()[base];
  region.size = whole;
  region.born = ++born;
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

// The first "BEGIN-END " at *text; past its line, or to the end of an incomplete one.
bool parse_line(const char** text, Span* out) {
  const char* end = strchr(*text, '\n');
  if (!end) return false;
  char* dash;
  out->begin = strtoull(*text, &dash, 16);
  out->end = strtoull(dash + 1, nullptr, 16);
  *text = end + 1;
  return true;
}

}  // namespace

void note_others() {
  static char buffer[1 << 16];
  const int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  size_t have = 0;
  ssize_t n;
  g_other_count = 0;
  while (fd >= 0 && (n = read(fd, buffer + have, sizeof buffer - 1 - have)) > 0) {
    have += static_cast<size_t>(n);
    buffer[have] = 0;
    const char* next = buffer;
    for (Span s{}; parse_line(&next, &s);) {
      if (g_other_count < kMaxOthers && !is_region(s.begin, s.end)) g_others[g_other_count++] = s;
    }
    have = static_cast<size_t>(buffer + have - next);
    memmove(buffer, next, have);
  }
  if (fd >= 0) close(fd);
}

CUdeviceptr map_region(uint64_t size, uint64_t alignment) {
  const uint64_t spare = std::max(alignment, kRegion) - 4096;
  void* p = get(0, size + spare);
  if (p == MAP_FAILED) return 0;
  const auto start = reinterpret_cast<CUdeviceptr>(p);
  const CUdeviceptr base = round_up(start, std::max(alignment, kRegion));
  put(start, base - start);
  put(base + size, start + spare - base);
  return base;
}

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
