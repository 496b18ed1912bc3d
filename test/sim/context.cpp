// SPDX-License-Identifier: GPL-2.0-only
// Devices and contexts.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/module.h"
#include "test/sim/sim.h"

struct CUctx_st {
  CUdevice device;
  unsigned flags;
  bool primary;
  int references;
  std::set<CUcontext> peers = {};  // whose memory it reaches
  std::map<CUlimit, size_t> limits = {{CU_LIMIT_STACK_SIZE, 1024},
                                      {CU_LIMIT_PRINTF_FIFO_SIZE, 8650752},
                                      {CU_LIMIT_MALLOC_HEAP_SIZE, 8388608},
                                      {CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT, 2048}};
};

namespace phos_sim {
namespace {

struct Contexts {
  std::mutex mutex;
  std::set<CUcontext> alive;
  CUctx_st* primary[kMaxGpus] = {};
  unsigned primary_flags[kMaxGpus] = {};
};

Contexts& contexts() {
  static Contexts& c = *new Contexts;
  return c;
}

thread_local std::vector<CUcontext>* t_stack = nullptr;  // leaked: threads may exit after us

std::vector<CUcontext>& stack() {
  if (!t_stack) t_stack = new std::vector<CUcontext>;
  return *t_stack;
}

bool alive(CUcontext context) {
  std::lock_guard<std::mutex> hold(contexts().mutex);
  return contexts().alive.count(context) > 0;
}

// Frees what belongs to the context; the handle stays a valid pointer to a dead context.
void tear_down(CUcontext context) {
  wait_for_all();
  {
    std::lock_guard<std::mutex> hold(memory().mutex);
    free_ranges_of(context);
  }
  destroy_streams_of(context);
  unload_modules_of(context);
  std::lock_guard<std::mutex> hold(contexts().mutex);
  contexts().alive.erase(context);
  context->peers.clear();
  for (CUcontext other : contexts().alive) other->peers.erase(context);
}

CUresult create_context(CUcontext* out, unsigned flags, CUdevice device) {
  if (!out) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  auto* c = new CUctx_st{device, flags, false, 1};
  {
    std::lock_guard<std::mutex> hold(contexts().mutex);
    contexts().alive.insert(c);
  }
  stack().push_back(c);
  *out = c;
  return CUDA_SUCCESS;
}

struct Attribute {
  CUdevice_attribute name;
  int value;
};
// Those that programs ask about; the rest is 0.
constexpr Attribute kAttributes[] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_GPU_OVERLAP, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1},
    {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, 1},
};

}  // namespace

CUcontext current_context() {
  if (!t_stack || t_stack->empty()) return nullptr;
  CUcontext c = t_stack->back();
  return c && alive(c) ? c : nullptr;
}

CUdevice device_of(CUcontext context) {
  return context ? context->device : 0;
}

bool device_exists(CUdevice device) {
  return device >= 0 && device < process().machine.count;
}

bool has_peer_access(CUcontext context, CUcontext owner) {
  std::lock_guard<std::mutex> hold(contexts().mutex);
  return context->peers.count(owner) > 0;
}

}  // namespace phos_sim

using namespace phos_sim;

CUresult cuDriverGetVersion(int* version) {
  PHOS_SIM_FRAME();
  if (!version) return CUDA_ERROR_INVALID_VALUE;
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  PHOS_SIM_API(kInitOnly);
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  PHOS_SIM_API(kInit);
  if (!count) return CUDA_ERROR_INVALID_VALUE;
  *count = process().machine.count;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!name || size < 1) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(name, static_cast<size_t>(size), "%s", process().machine.gpus[device].name);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  PHOS_SIM_API(kInitOnly);
  if (!uuid) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *uuid = process().machine.gpus[device].uuid;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuDeviceGetUuid, cuDeviceGetUuid_v2);

CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!bytes) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = process().machine.gpus[device].bytes;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuDeviceTotalMem, cuDeviceTotalMem_v2);

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!value || attribute < 1 || attribute >= CU_DEVICE_ATTRIBUTE_MAX) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  *value = attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID ? device + 1 : 0;
  for (const Attribute& a : kAttributes) {
    if (a.name == attribute) *value = a.value;
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  PHOS_SIM_API(kInit);
  if (!can) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device) || !device_exists(peer)) return CUDA_ERROR_INVALID_DEVICE;
  *can = device != peer;
  return CUDA_SUCCESS;
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  PHOS_SIM_API(kContext);
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  if (!peer || !alive(peer)) return CUDA_ERROR_INVALID_CONTEXT;
  const CUcontext context = current_context();
  if (context->device == peer->device) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  std::lock_guard<std::mutex> hold(contexts().mutex);
  const bool is_new = context->peers.insert(peer).second;
  return is_new ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

CUresult cuCtxDisablePeerAccess(CUcontext peer) {
  PHOS_SIM_API(kContext);
  if (!peer || !alive(peer)) return CUDA_ERROR_INVALID_CONTEXT;
  const CUcontext context = current_context();
  std::lock_guard<std::mutex> hold(contexts().mutex);
  return context->peers.erase(peer) ? CUDA_SUCCESS : CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  Contexts& all = contexts();
  std::lock_guard<std::mutex> hold(all.mutex);
  CUctx_st*& p = all.primary[device];
  if (!p) p = new CUctx_st{device, all.primary_flags[device], true, 0};
  p->references++;
  all.alive.insert(p);
  *context = p;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  PHOS_SIM_API(kInit);
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  CUctx_st* p;
  {
    std::lock_guard<std::mutex> hold(contexts().mutex);
    p = contexts().primary[device];
    if (!p || !p->references) return CUDA_ERROR_INVALID_CONTEXT;
    if (--p->references) return CUDA_SUCCESS;
  }
  tear_down(p);
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2);

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
  PHOS_SIM_API(kInit);
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard<std::mutex> hold(contexts().mutex);
  CUctx_st* p = contexts().primary[device];
  if (flags) *flags = contexts().primary_flags[device];
  if (active) *active = p && p->references > 0;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxSetFlags(CUdevice device, unsigned int flags) {
  PHOS_SIM_API(kInit);
  if (!device_exists(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::lock_guard<std::mutex> hold(contexts().mutex);
  contexts().primary_flags[device] = flags;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuDevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags_v2);

CUresult cuCtxCreate(CUcontext* context, CUctxCreateParams*, unsigned int flags, CUdevice device) {
  PHOS_SIM_API(kInit);
  return create_context(context, flags, device);
}

PHOS_SIM_EXPORT CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device) {
  PHOS_SIM_API(kInit);
  return create_context(context, flags, device);
}
PHOS_SIM_ALIAS(cuCtxCreate, cuCtxCreate_v2);

PHOS_SIM_EXPORT CUresult cuCtxCreate_v3(CUcontext* context, CUexecAffinityParam*, int,
                                        unsigned int flags, CUdevice device) {
  PHOS_SIM_API(kInit);
  return create_context(context, flags, device);
}

CUresult cuCtxDestroy(CUcontext context) {
  PHOS_SIM_API(kInit);
  if (!context || !alive(context) || context->primary) return CUDA_ERROR_INVALID_CONTEXT;
  tear_down(context);
  if (!stack().empty() && stack().back() == context) stack().pop_back();
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuCtxDestroy, cuCtxDestroy_v2);

CUresult cuCtxSetCurrent(CUcontext context) {
  PHOS_SIM_API(kInit);
  if (context && !alive(context)) return CUDA_ERROR_INVALID_CONTEXT;
  if (!stack().empty()) stack().pop_back();
  if (context) stack().push_back(context);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  PHOS_SIM_API(kInit);
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  *context = stack().empty() ? nullptr : stack().back();
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  PHOS_SIM_API(kInit);
  if (!context || !alive(context)) return CUDA_ERROR_INVALID_CONTEXT;
  stack().push_back(context);
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuCtxPushCurrent, cuCtxPushCurrent_v2);

CUresult cuCtxPopCurrent(CUcontext* context) {
  PHOS_SIM_API(kInit);
  if (stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = stack().back();
  stack().pop_back();
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuCtxPopCurrent, cuCtxPopCurrent_v2);

CUresult cuCtxGetDevice(CUdevice* device) {
  PHOS_SIM_API(kContext);
  if (!device) return CUDA_ERROR_INVALID_VALUE;
  *device = current_context()->device;
  return CUDA_SUCCESS;
}

// The least that an H200 takes (driver 580); it raises what is below.
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  PHOS_SIM_API(kContext);
  static const std::map<CUlimit, size_t> kLeast = {{CU_LIMIT_STACK_SIZE, 0},
                                                   {CU_LIMIT_PRINTF_FIFO_SIZE, 524288},
                                                   {CU_LIMIT_MALLOC_HEAP_SIZE, 4194304},
                                                   {CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT, 32}};
  const auto least = kLeast.find(limit);
  if (least == kLeast.end()) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  const CUcontext context = current_context();
  std::lock_guard<std::mutex> hold(contexts().mutex);
  context->limits[limit] = std::max(value, least->second);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  PHOS_SIM_API(kContext);
  if (!value) return CUDA_ERROR_INVALID_VALUE;
  const CUcontext context = current_context();
  std::lock_guard<std::mutex> hold(contexts().mutex);
  const auto it = context->limits.find(limit);
  if (it == context->limits.end()) return CUDA_ERROR_UNSUPPORTED_LIMIT;
  *value = it->second;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  PHOS_SIM_API(kContext);
  return wait_for_all();
}
