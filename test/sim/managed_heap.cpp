// SPDX-License-Identifier: GPL-2.0-only
// Addresses of managed memory, of which each context has its own.
//
// As was recorded of libcuda 580.159.04 (1,087 allocations among 3,100 random calls, all of which
// these rules explain): it has regions of its own, whole 32 MiB, which go back to the kernel with
// the last that is in them. From 2 MiB on an allocation takes whole 2 MiB: in the newest region
// with so much in one piece, and of that in the smallest piece, the lowest of the same size. What
// is smaller is cut, in multiples of 512 bytes, out of chunks of 2 MiB, from the smallest piece of
// all, and of the same size from the one that is one for longest.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <vector>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

constexpr uint64_t kPage = 4096;

struct Piece {
  CUdeviceptr begin, end;
  uint64_t order;  // among those of the same size
};

// A region, of which 2 MiB are given, or a chunk in one, of which 512 bytes are.
struct Area {
  CUdeviceptr begin, end;
  std::vector<Piece> free;
  bool is_chunk;
  uint64_t born;

  bool is_empty() const { return free.size() == 1 && free[0].end - free[0].begin == end - begin; }
};

struct Heap {
  std::map<CUdeviceptr, Area> regions, chunks;
};

// The memory mutex is held.
Heap& heap_of(CUcontext context) {
  static auto& heaps = *new std::map<CUcontext, Heap>;
  return heaps[context];
}

uint64_t number() {
  static uint64_t last;
  return ++last;
}

Piece piece(const Area& area, CUdeviceptr begin, CUdeviceptr end) {
  return {begin, end, area.is_chunk ? number() : begin};
}

bool is_better(const Piece& a, const Piece& b) {
  const uint64_t one = a.end - a.begin, other = b.end - b.begin;
  return one != other ? one < other : a.order < b.order;
}

// The best piece of the area for `size` bytes.
Piece* best_of(Area& area, uint64_t size) {
  Piece* best = nullptr;
  for (Piece& p : area.free) {
    if (p.end - p.begin >= size && (!best || is_better(p, *best))) best = &p;
  }
  return best;
}

CUdeviceptr take(Area& area, Piece* from, uint64_t size) {
  const CUdeviceptr at = from->begin;
  *from = piece(area, at + size, from->end);
  if (from->begin == from->end) area.free.erase(area.free.begin() + (from - area.free.data()));
  return at;
}

void put_back(Area& area, CUdeviceptr at, uint64_t size) {
  CUdeviceptr end = at + size;
  std::erase_if(area.free, [&](const Piece& p) {
    if (p.end != at && p.begin != end) return false;
    at = std::min(at, p.begin);
    end = std::max(end, p.end);
    return true;
  });
  area.free.push_back(piece(area, at, end));
}

Area& around(std::map<CUdeviceptr, Area>& areas, CUdeviceptr at) {
  return std::prev(areas.upper_bound(at))->second;
}

Area* new_area(std::map<CUdeviceptr, Area>& areas, CUdeviceptr at, uint64_t size, bool is_chunk) {
  if (!at) return nullptr;
  Area& area = areas[at];
  area = {at, at + size, {}, is_chunk, number()};
  area.free.push_back(piece(area, at, at + size));
  return &area;
}

CUdeviceptr take_blocks(Heap& heap, uint64_t size) {
  Area* newest = nullptr;
  for (auto& [at, region] : heap.regions) {
    if ((!newest || region.born > newest->born) && best_of(region, size)) newest = &region;
  }
  const uint64_t whole = round_up(size, kRegion);
  if (!newest) newest = new_area(heap.regions, map_region(whole), whole, false);
  return newest ? take(*newest, best_of(*newest, size), size) : 0;
}

void give_blocks(Heap& heap, CUdeviceptr at, uint64_t size) {
  Area& region = around(heap.regions, at);
  put_back(region, at, size);
  if (!region.is_empty()) return;
  munmap(reinterpret_cast<void*>(region.begin), region.end - region.begin);
  heap.regions.erase(region.begin);
}

// Managed memory shows in /proc/PID/maps as a shared mapping of the managed memory driver's file,
// and a forked child does not have it.
bool map_memory(CUdeviceptr at, uint64_t bytes) {
  const uint64_t size = round_up(bytes, kPage);
  const int fd = memfd_create("/dev/nvidia-uvm", MFD_CLOEXEC);
  if (fd < 0) return false;
  void* p = MAP_FAILED;
  if (ftruncate(fd, static_cast<off_t>(size)) == 0) {
    p = mmap(reinterpret_cast<void*>(at), size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd,
             0);
  }
  close(fd);
  return p != MAP_FAILED && madvise(p, size, MADV_DONTFORK) == 0;
}

void unmap_memory(CUdeviceptr at, uint64_t bytes) {
  mmap(reinterpret_cast<void*>(at), round_up(bytes, kPage), PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

CUdeviceptr new_blocks(Heap& heap, uint64_t bytes) {
  const uint64_t size = round_up(bytes, kGranularity);
  const CUdeviceptr at = take_blocks(heap, size);
  if (!at || map_memory(at, bytes)) return at;
  give_blocks(heap, at, size);
  return 0;
}

}  // namespace

CUdeviceptr reserve_managed(CUcontext context, uint64_t bytes) {
  Heap& heap = heap_of(context);
  if (bytes >= kGranularity) return new_blocks(heap, bytes);
  const uint64_t size = round_up(bytes, kSmallAlignment);
  Area* chosen = nullptr;
  for (auto& [at, chunk] : heap.chunks) {
    const Piece* p = best_of(chunk, size);
    if (p && (!chosen || is_better(*p, *best_of(*chosen, size)))) chosen = &chunk;
  }
  if (!chosen) chosen = new_area(heap.chunks, new_blocks(heap, kGranularity), kGranularity, true);
  return chosen ? take(*chosen, best_of(*chosen, size), size) : 0;
}

void unreserve_managed(CUcontext context, CUdeviceptr at, uint64_t bytes) {
  Heap& heap = heap_of(context);
  if (bytes >= kGranularity) {
    unmap_memory(at, bytes);
    return give_blocks(heap, at, round_up(bytes, kGranularity));
  }
  Area& chunk = around(heap.chunks, at);
  put_back(chunk, at, round_up(bytes, kSmallAlignment));
  if (!chunk.is_empty()) return;
  const CUdeviceptr begin = chunk.begin;
  heap.chunks.erase(begin);
  unmap_memory(begin, kGranularity);
  give_blocks(heap, begin, kGranularity);
}

}  // namespace phos_sim
