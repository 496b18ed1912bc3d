// SPDX-License-Identifier: GPL-2.0-only
// The table of what lies where, allocation from it, and access through it.
#include <algorithm>
#include <cstring>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

uint64_t block_size(Kind kind) {
  return kind == Kind::kPool ? kPoolBlock : kGranularity;
}

CUdeviceptr reserve_for(Kind kind, uint64_t size) {
  return kind == Kind::kPool ? reserve_low(size) : reserve(size);
}

// Offset of a free gap of `size` bytes in a block; the block's size if there is none.
uint64_t find_gap(const Block& block, uint64_t size) {
  uint64_t at = 0;
  for (auto& [offset, used] : block.used) {
    if (offset - at >= size) return at;
    at = offset + used;
  }
  return block.size - at >= size ? at : block.size;
}

CUresult new_block(Kind kind, CUcontext context, CUdevice device, CUdeviceptr* base) {
  Memory& m = memory();
  const uint64_t size = block_size(kind);
  BackingPtr backing = make_backing(device, size);
  if (!backing) return CUDA_ERROR_OUT_OF_MEMORY;
  *base = reserve_for(kind, size);
  if (!*base) return CUDA_ERROR_OUT_OF_MEMORY;
  m.blocks[*base] = Block{backing, size, kind, context, m.next_id++, {}};
  return CUDA_SUCCESS;
}

CUresult allocate_in_block(Kind kind, uint64_t size, CUcontext context, CUdevice device,
                           CUdeviceptr* out) {
  Memory& m = memory();
  const uint64_t taken = round_up(size, kSmallAlignment);
  const uint64_t none = block_size(kind);
  CUdeviceptr base = 0;
  uint64_t gap = none;
  for (auto& [at, block] : m.blocks) {
    if (block.kind != kind || block.context != context) continue;
    gap = find_gap(block, taken);
    base = at;
    if (gap < none) break;
  }
  if (gap == none) {
    if (CUresult r = new_block(kind, context, device, &base)) return r;
    gap = 0;
  }
  Block& block = m.blocks[base];
  block.used[gap] = taken;
  Range r;
  r.kind = kind;
  r.base = base + gap;
  r.size = size;
  r.map_base = base;
  r.map_size = block.size;
  r.backing = block.backing;
  r.offset = gap;
  r.context = context;
  r.device = device;
  r.id = m.next_id++;
  *out = r.base;
  m.ranges[r.base] = std::move(r);
  return CUDA_SUCCESS;
}

}  // namespace

Memory& memory() {
  static Memory& m = *new Memory;
  return m;
}

Range* find_range(CUdeviceptr address) {
  Memory& m = memory();
  auto it = m.ranges.upper_bound(address);
  if (it == m.ranges.begin()) return nullptr;
  Range& r = std::prev(it)->second;
  return address - r.base < r.size ? &r : nullptr;
}

CUresult allocate(Kind kind, uint64_t size, CUcontext context, CUdeviceptr* out) {
  CUdevice device = device_of(context);
  if (size <= (kind == Kind::kPool ? kPoolBlock : kSmall)) {
    return allocate_in_block(kind, size, context, device, out);
  }
  Memory& m = memory();
  Range r;
  r.map_size = round_up(size, block_size(kind));
  if (r.map_size < size) return CUDA_ERROR_OUT_OF_MEMORY;
  r.backing = make_backing(device, r.map_size);
  if (!r.backing) return CUDA_ERROR_OUT_OF_MEMORY;
  r.base = r.map_base = reserve_for(kind, r.map_size);
  if (!r.base) return CUDA_ERROR_OUT_OF_MEMORY;
  r.kind = kind;
  r.size = size;
  r.context = context;
  r.device = device;
  r.id = m.next_id++;
  *out = r.base;
  m.ranges[r.base] = std::move(r);
  return CUDA_SUCCESS;
}

void free_range(CUdeviceptr base) {
  Memory& m = memory();
  auto it = m.ranges.find(base);
  if (it == m.ranges.end()) return;
  Range r = std::move(it->second);
  m.ranges.erase(it);
  auto block = m.blocks.find(r.map_base);
  if (block != m.blocks.end()) {
    block->second.used.erase(r.offset);
    if (!block->second.used.empty()) return;
    m.blocks.erase(block);
  }
  const bool reserved_here = r.kind != Kind::kVmm && r.kind != Kind::kHostRegistered;
  if (r.kind == Kind::kManaged) {
    unreserve_managed(r.context, r.base, r.size);
  } else if (reserved_here) {
    unreserve(r.map_base, r.map_size);
  }
}

void free_ranges_of(CUcontext context) {
  Memory& m = memory();
  for (auto it = m.ranges.begin(); it != m.ranges.end();) {
    CUdeviceptr base = it->first;
    bool mine = it->second.context == context;
    ++it;
    if (mine) free_range(base);
  }
}

namespace {

// Whose kernel this thread runs; null: none's.
thread_local CUcontext t_kernel_of = nullptr;

bool kernel_reaches(const Range& r) {
  if (!t_kernel_of) return true;
  const CUdevice device = device_of(t_kernel_of);
  if (r.kind == Kind::kVmm) return r.access >> device & 1;
  if (r.kind != Kind::kDevice || r.device == device) return true;
  return has_peer_access(t_kernel_of, r.context);
}

struct Piece {
  char* at = nullptr;
  uint64_t size = 0;
  BackingPtr keep;
};

// The CPU's view of as much of [address, address + size) as lies in one range. Mutex held.
bool device_piece(CUdeviceptr address, uint64_t size, Piece* piece) {
  Range* r = find_range(address);
  if (!r || !r->access || !kernel_reaches(*r)) return false;
  uint64_t into = address - r->base;
  piece->size = std::min(size, r->size - into);
  piece->keep = r->backing;
  piece->at =
      r->backing ? r->backing->aperture + r->offset + into : reinterpret_cast<char*>(address);
  return true;
}

Piece any_piece(CUdeviceptr address, uint64_t size) {
  std::lock_guard<std::mutex> hold(memory().mutex);
  Piece piece;
  if (device_piece(address, size, &piece)) return piece;
  if (find_range(address)) return {};  // mapped, but no access
  // Pageable host memory, up to where CUDA memory starts.
  auto next = memory().ranges.upper_bound(address);
  piece.at = reinterpret_cast<char*>(address);
  piece.size = size;
  if (next != memory().ranges.end()) piece.size = std::min<uint64_t>(size, next->first - address);
  return piece;
}

}  // namespace

KernelOf::KernelOf(CUcontext context) {
  t_kernel_of = context;
}

KernelOf::~KernelOf() {
  t_kernel_of = nullptr;
}

bool for_each_piece(CUdeviceptr address, uint64_t size,
                    const std::function<void(char*, uint64_t)>& visit) {
  while (size) {
    Piece piece;
    {
      std::lock_guard<std::mutex> hold(memory().mutex);
      if (!device_piece(address, size, &piece)) return false;
    }
    visit(piece.at, piece.size);
    address += piece.size;
    size -= piece.size;
    std::lock_guard<std::mutex> hold(memory().mutex);  // a last reference dies under the mutex
    piece.keep.reset();
  }
  return true;
}

bool reachable(CUdeviceptr address, uint64_t size) {
  std::lock_guard<std::mutex> hold(memory().mutex);
  while (size) {
    Piece piece;
    if (!device_piece(address, size, &piece)) return false;
    address += piece.size;
    size -= piece.size;
  }
  return true;
}

bool copy_bytes(CUdeviceptr to, CUdeviceptr from, uint64_t size) {
  while (size) {
    Piece target = any_piece(to, size);
    Piece source = any_piece(from, size);
    if (!target.at || !source.at) return false;
    uint64_t n = std::min(target.size, source.size);
    memmove(target.at, source.at, n);
    to += n;
    from += n;
    size -= n;
    std::lock_guard<std::mutex> hold(memory().mutex);
    target.keep.reset();
    source.keep.reset();
  }
  return true;
}

}  // namespace phos_sim
