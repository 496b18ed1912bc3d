// SPDX-License-Identifier: GPL-2.0-only
// Virtual memory management: address reservations, handles, mappings, export as file descriptors.
#include <fcntl.h>
#include <unistd.h>

#include <set>
#include <vector>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

bool aligned(uint64_t n) {
  return n && n % kGranularity == 0;
}

Handle* find_handle(CUmemGenericAllocationHandle h) {
  auto it = memory().handles.find(h);
  return it == memory().handles.end() || !it->second.references ? nullptr : &it->second;
}

// A handle outlives its last reference while mappings use it: cuMemRetainAllocationHandle.
void drop_if_unused(uint64_t h) {
  Memory& m = memory();
  auto it = m.handles.find(h);
  if (it == m.handles.end() || it->second.references) return;
  for (auto& [base, r] : m.ranges) {
    if (r.handle == h) return;
  }
  m.handles.erase(it);
}

bool inside_reservation(CUdeviceptr p, size_t size) {
  auto& all = memory().reservations;
  auto it = all.upper_bound(p);
  if (it == all.begin()) return false;
  --it;
  return p + size <= it->first + it->second;
}

// The mappings that tile [p, p + size) exactly; empty if none do.
std::vector<Range*> mappings_in(CUdeviceptr p, size_t size) {
  std::vector<Range*> found;
  CUdeviceptr at = p;
  while (at < p + size) {
    auto it = memory().ranges.find(at);
    if (it == memory().ranges.end() || it->second.kind != Kind::kVmm || it->second.dying) return {};
    found.push_back(&it->second);
    at += it->second.size;
  }
  if (at != p + size) return {};
  return found;
}

// Reservations that a fault has made at other addresses than wanted. The memory mutex is held.
std::set<CUdeviceptr>& g_elsewhere = *new std::set<CUdeviceptr>;

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
                                       CUmemAllocationGranularity_flags) {
  PHOS_SIM_API(kInit);
  if (!granularity || !prop) return CUDA_ERROR_INVALID_VALUE;
  *granularity = kGranularity;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr* p, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
  PHOS_SIM_API(kInit);
  if (!p || !aligned(size) || flags || (alignment & (alignment - 1))) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard<std::mutex> hold(memory().mutex);
  const bool elsewhere = g_elsewhere.size() < wants_elsewhere();
  const CUdeviceptr got =
      reserve(size, alignment > kGranularity ? alignment : kGranularity, elsewhere ? 0 : hint);
  if (!got) return CUDA_ERROR_OUT_OF_MEMORY;
  memory().reservations[got] = size;
  if (elsewhere) g_elsewhere.insert(got);
  *p = got;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr p, size_t size) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(memory().mutex);
  Memory& m = memory();
  auto it = m.reservations.find(p);
  if (it == m.reservations.end() || it->second != size) return CUDA_ERROR_INVALID_VALUE;
  auto mapped = m.ranges.lower_bound(p);
  if (mapped != m.ranges.end() && mapped->first < p + size) return CUDA_ERROR_INVALID_VALUE;
  m.reservations.erase(it);
  g_elsewhere.erase(p);
  unreserve(p, size);
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* out, size_t size,
                     const CUmemAllocationProp* prop, unsigned long long flags) {
  PHOS_SIM_API(kInit);
  if (!out || !prop || !aligned(size) || flags) return CUDA_ERROR_INVALID_VALUE;
  if (prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_NOT_SUPPORTED;
  if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  if (prop->requestedHandleTypes & ~CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (!device_exists(prop->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  BackingPtr backing = make_backing(prop->location.id, size);
  if (!backing) return CUDA_ERROR_OUT_OF_MEMORY;
  *out = memory().next_id++;
  memory().handles[*out] = Handle{backing, *prop, 1};
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  PHOS_SIM_API(kInit);
  std::unique_lock<std::mutex> hold(memory().mutex);
  Handle* h = find_handle(handle);
  if (!h) return CUDA_ERROR_INVALID_VALUE;
  if (h->references == 1) {
    h->dying++;
    linger(&hold);
    h->dying--;
  }
  h->references--;
  drop_if_unused(handle);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr p, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(memory().mutex);
  Memory& m = memory();
  Handle* h = find_handle(handle);
  if (!h || flags || offset || !aligned(size) || p % kGranularity) return CUDA_ERROR_INVALID_VALUE;
  if (size > h->backing->size || !inside_reservation(p, size)) return CUDA_ERROR_INVALID_VALUE;
  if (size < h->backing->size) return CUDA_ERROR_NOT_SUPPORTED;
  auto next = m.ranges.lower_bound(p);
  bool taken = next != m.ranges.end() && next->first < p + size;
  if (taken || find_range(p)) return CUDA_ERROR_INVALID_VALUE;
  Range r;
  r.kind = Kind::kVmm;
  r.base = r.map_base = p;
  r.size = r.map_size = size;
  r.backing = h->backing;
  r.device = h->backing->device;
  r.id = m.next_id++;
  r.handle = handle;
  r.access = 0;
  m.ranges[p] = std::move(r);
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr p, size_t size) {
  PHOS_SIM_API(kInit);
  wait_for_all();
  std::unique_lock<std::mutex> hold(memory().mutex);
  std::vector<Range*> mappings = mappings_in(p, size);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  for (Range* r : mappings) {
    r->dying = true;
    memory().handles[r->handle].dying++;
  }
  linger(&hold);
  for (Range* r : mappings) {
    uint64_t handle = r->handle;
    memory().handles[handle].dying--;
    free_range(r->base);
    drop_if_unused(handle);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr p, size_t size, const CUmemAccessDesc* desc, size_t count) {
  PHOS_SIM_API(kInit);
  if (!desc || !count) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  std::vector<Range*> mappings = mappings_in(p, size);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  for (Range* r : mappings) {
    for (size_t i = 0; i < count; i++) {
      if (desc[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) continue;
      if (!device_exists(desc[i].location.id)) return CUDA_ERROR_INVALID_DEVICE;
      const uint64_t bit = uint64_t{1} << desc[i].location.id;
      const bool some = desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_NONE;
      r->access = some ? r->access | bit : r->access & ~bit;
    }
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location, CUdeviceptr p) {
  PHOS_SIM_API(kInit);
  if (!flags || !location) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || r->kind != Kind::kVmm) return CUDA_ERROR_INVALID_VALUE;
  const bool some = device_exists(location->id) && r->access >> location->id & 1;
  *flags = some ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE;
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void* out, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(memory().mutex);
  Handle* h = find_handle(handle);
  if (!out || !h || flags || !(h->prop.requestedHandleTypes & type)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (h->dying) crash();
  int fd = fcntl(h->backing->fd, F_DUPFD_CLOEXEC, 0);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(out) = fd;
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* out, void* os_handle,
                                        CUmemAllocationHandleType type) {
  PHOS_SIM_API(kInit);
  int fd = static_cast<int>(reinterpret_cast<intptr_t>(os_handle));
  if (!out || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR || !is_device_memfd(fd)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard<std::mutex> hold(memory().mutex);
  BackingPtr backing = import_backing(fd, Origin::kFdImport, 0);
  if (!backing) return CUDA_ERROR_OUT_OF_MEMORY;
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, backing->device};
  *out = memory().next_id++;
  memory().handles[*out] = Handle{backing, prop, 1};
  return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* out, void* p) {
  PHOS_SIM_API(kInit);
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(reinterpret_cast<CUdeviceptr>(p));
  if (!r || r->kind != Kind::kVmm) return CUDA_ERROR_INVALID_VALUE;
  Handle& h = memory().handles[r->handle];
  if (r->dying || h.dying) crash();
  h.references++;
  *out = r->handle;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                CUmemGenericAllocationHandle handle) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(memory().mutex);
  Handle* h = find_handle(handle);
  if (!prop || !h) return CUDA_ERROR_INVALID_VALUE;
  *prop = h->prop;
  return CUDA_SUCCESS;
}
