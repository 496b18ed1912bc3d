// SPDX-License-Identifier: GPL-2.0-only
// cuMemAlloc and its relatives: device, managed, pool and host memory.
#include <sys/mman.h>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

struct CUmemPoolHandle_st {
  CUdevice device;
};

namespace phos_sim {
namespace {

CUresult release(CUdeviceptr p, bool (*may_free)(Kind)) {
  wait_for_all();
  std::unique_lock<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || r->base != p || r->dying || !may_free(r->kind)) return CUDA_ERROR_INVALID_VALUE;
  const uint64_t id = r->id;
  r->dying = true;
  linger(&hold);
  r = find_range(p);
  if (r && r->id == id) free_range(p);
  return CUDA_SUCCESS;
}

// Memory that the CPU can touch: pinned, or managed.
CUresult allocate_touchable(Kind kind, size_t size, CUdeviceptr* out) {
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  Range r;
  r.kind = kind;
  r.size = size;
  r.context = current_context();
  r.device = device_of(r.context);
  std::lock_guard<std::mutex> hold(memory().mutex);
  r.map_size = round_up(size, kGranularity);
  r.base = kind == Kind::kManaged ? reserve_managed(r.context, size) : reserve(r.map_size);
  if (!r.base) return CUDA_ERROR_OUT_OF_MEMORY;
  if (kind == Kind::kHostAlloc) {
    mprotect(reinterpret_cast<void*>(r.base), r.map_size, PROT_READ | PROT_WRITE);
  }
  r.map_base = r.base / kGranularity * kGranularity;
  r.id = memory().next_id++;
  *out = r.base;
  memory().ranges[r.base] = r;
  return CUDA_SUCCESS;
}

CUresult free_in_order(CUdeviceptr p, CUstream stream) {
  if (CUresult r = check_stream(stream)) return r;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || r->base != p || (r->kind != Kind::kPool && r->kind != Kind::kDevice)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  submit(stream, [p] {
    std::lock_guard<std::mutex> hold_later(memory().mutex);
    free_range(p);
    return CUDA_SUCCESS;
  });
  return CUDA_SUCCESS;
}

}  // namespace

CUmemoryPool default_pool(CUdevice device) {
  static CUmemPoolHandle_st* pools = [] {
    auto* p = new CUmemPoolHandle_st[kMaxGpus];
    for (int i = 0; i < kMaxGpus; i++) p[i].device = i;
    return p;
  }();
  return &pools[device];
}

}  // namespace phos_sim

using namespace phos_sim;

CUresult cuMemGetInfo(size_t* free_bytes, size_t* total) {
  PHOS_SIM_API(kContext);
  CUdevice device = device_of(current_context());
  std::lock_guard<std::mutex> hold(memory().mutex);
  if (total) *total = process().machine.gpus[device].bytes;
  const uint64_t used = bytes_in_use(device), ours = bytes_left_to_us(device);
  if (free_bytes) *free_bytes = used < ours ? ours - used : 0;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuMemGetInfo, cuMemGetInfo_v2);

CUresult cuMemAlloc(CUdeviceptr* p, size_t size) {
  PHOS_SIM_API(kContext);
  if (!p || !size) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  return allocate(Kind::kDevice, size, current_context(), p);
}
PHOS_SIM_ALIAS(cuMemAlloc, cuMemAlloc_v2);

CUresult cuMemFree(CUdeviceptr p) {
  PHOS_SIM_API(kContext);
  if (!p) return CUDA_SUCCESS;
  return release(
      p, [](Kind k) { return k == Kind::kDevice || k == Kind::kManaged || k == Kind::kPool; });
}
PHOS_SIM_ALIAS(cuMemFree, cuMemFree_v2);

CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr p) {
  PHOS_SIM_API(kContext);
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r || !r->access) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = r->base;
  if (size) *size = r->size;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuMemGetAddressRange, cuMemGetAddressRange_v2);

CUresult cuMemAllocManaged(CUdeviceptr* p, size_t size, unsigned int flags) {
  PHOS_SIM_API(kContext);
  if (!p || (flags != CU_MEM_ATTACH_GLOBAL && flags != CU_MEM_ATTACH_HOST)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return allocate_touchable(Kind::kManaged, size, p);
}

CUresult cuMemAllocHost(void** p, size_t size) {
  PHOS_SIM_API(kContext);
  if (!p) return CUDA_ERROR_INVALID_VALUE;
  return allocate_touchable(Kind::kHostAlloc, size, reinterpret_cast<CUdeviceptr*>(p));
}
PHOS_SIM_ALIAS(cuMemAllocHost, cuMemAllocHost_v2);

CUresult cuMemHostAlloc(void** p, size_t size, unsigned int) {
  PHOS_SIM_API(kContext);
  if (!p) return CUDA_ERROR_INVALID_VALUE;
  return allocate_touchable(Kind::kHostAlloc, size, reinterpret_cast<CUdeviceptr*>(p));
}

CUresult cuMemFreeHost(void* p) {
  PHOS_SIM_API(kContext);
  return release(reinterpret_cast<CUdeviceptr>(p), [](Kind k) { return k == Kind::kHostAlloc; });
}

CUresult cuMemHostRegister(void* p, size_t size, unsigned int) {
  PHOS_SIM_API(kContext);
  if (!p || !size) return CUDA_ERROR_INVALID_VALUE;
  Range r;
  r.kind = Kind::kHostRegistered;
  r.base = r.map_base = reinterpret_cast<CUdeviceptr>(p);
  r.size = r.map_size = size;
  r.context = current_context();
  r.device = device_of(r.context);
  std::lock_guard<std::mutex> hold(memory().mutex);
  auto next = memory().ranges.lower_bound(r.base);
  bool overlaps = next != memory().ranges.end() && next->first < r.base + size;
  if (overlaps || find_range(r.base)) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  r.id = memory().next_id++;
  memory().ranges[r.base] = r;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuMemHostRegister, cuMemHostRegister_v2);

CUresult cuMemHostUnregister(void* p) {
  PHOS_SIM_API(kContext);
  CUresult r =
      release(reinterpret_cast<CUdeviceptr>(p), [](Kind k) { return k == Kind::kHostRegistered; });
  return r == CUDA_ERROR_INVALID_VALUE ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED : r;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* out, void* p, unsigned int flags) {
  PHOS_SIM_API(kContext);
  if (!out || flags) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(reinterpret_cast<CUdeviceptr>(p));
  if (!r || (r->kind != Kind::kHostAlloc && r->kind != Kind::kHostRegistered)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *out = reinterpret_cast<CUdeviceptr>(p);
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuMemHostGetDevicePointer, cuMemHostGetDevicePointer_v2);

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!pool) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *pool = default_pool(device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!pool) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *pool = default_pool(device);
  return CUDA_SUCCESS;
}

CUresult cuMemAllocAsync(CUdeviceptr* p, size_t size, CUstream stream) {
  PHOS_SIM_API(kContext);
  if (!p || !size) return CUDA_ERROR_INVALID_VALUE;
  if (CUresult r = check_stream(stream)) return r;
  std::lock_guard<std::mutex> hold(memory().mutex);
  return allocate(Kind::kPool, size, current_context(), p);
}

CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream) {
  PHOS_SIM_API(kContext);
  return free_in_order(p, stream);
}

PHOS_SIM_EXPORT CUresult cuMemFreeAsync_ptsz(CUdeviceptr p, CUstream stream) {
  PHOS_SIM_API(kContext);
  return free_in_order(p, per_thread(stream));
}
