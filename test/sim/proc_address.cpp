// SPDX-License-Identifier: GPL-2.0-only
// cuGetProcAddress, from the one table of entry points.
#include <cstring>

#include "test/sim/entry_points.h"
#include "test/sim/sim.h"

// cuda.h declares no more than one of the variants.
extern "C" {
CUresult cuCtxCreate_v2(CUcontext*, unsigned int, CUdevice);
CUresult cuMemcpyDtoH_v2_ptds(void*, CUdeviceptr, size_t);
CUresult cuMemsetD8Async_ptsz(CUdeviceptr, unsigned char, size_t, CUstream);
CUresult cuStreamQuery_ptsz(CUstream);
CUresult cuStreamSynchronize_ptsz(CUstream);
CUresult cuLaunchKernel_ptsz(CUfunction, unsigned int, unsigned int, unsigned int, unsigned int,
                             unsigned int, unsigned int, unsigned int, CUstream, void**, void**);
CUresult cuMemFreeAsync_ptsz(CUdeviceptr, CUstream);
}

namespace phos_sim {
namespace {

struct EntryPoint {
  const char* name;
  int since;
  void* address;
};

EntryPoint entry(const char* name, int since, void* address) {
  return {name, since, address};
}

// The cast checks that cuda.h declares each function.
#define X(name, since) \
  entry(#name, since, reinterpret_cast<void*>(static_cast<decltype(&::name)>(&::name))),
const EntryPoint kEntryPoints[] = {
    entry("cuCtxCreate", 3020, reinterpret_cast<void*>(&cuCtxCreate_v2)), PHOS_SIM_ENTRY_POINTS(X)};
#undef X

// For programs that are built for a default stream in each thread.
const EntryPoint kPerThread[] = {
    entry("cuMemcpyDtoH", 7000, reinterpret_cast<void*>(&cuMemcpyDtoH_v2_ptds)),
    entry("cuMemsetD8Async", 7000, reinterpret_cast<void*>(&cuMemsetD8Async_ptsz)),
    entry("cuStreamQuery", 7000, reinterpret_cast<void*>(&cuStreamQuery_ptsz)),
    entry("cuStreamSynchronize", 7000, reinterpret_cast<void*>(&cuStreamSynchronize_ptsz)),
    entry("cuLaunchKernel", 7000, reinterpret_cast<void*>(&cuLaunchKernel_ptsz)),
    entry("cuMemFreeAsync", 11020, reinterpret_cast<void*>(&cuMemFreeAsync_ptsz)),
};

CUresult find(const char* name, void** out, int version, cuuint64_t flags,
              CUdriverProcAddressQueryResult* status) {
  if (!name || !out) return CUDA_ERROR_INVALID_VALUE;
  *out = nullptr;
  bool known = false;
  int best = 0;
  for (const EntryPoint& e : kEntryPoints) {
    if (strcmp(e.name, name)) continue;
    known = true;
    if (e.since > version || e.since < best) continue;
    best = e.since;
    *out = e.address;
  }
  for (const EntryPoint& e : kPerThread) {
    const bool wanted = flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM;
    if (wanted && !strcmp(e.name, name) && e.since <= version) *out = e.address;
  }
  if (status) {
    *status = *out    ? CU_GET_PROC_ADDRESS_SUCCESS
              : known ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                      : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuGetProcAddress(const char* name, void** out, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult* status) {
  return find(name, out, version, flags, status);
}

// The form before CUDA 12: no status.
PHOS_SIM_EXPORT CUresult phos_sim_get_proc_address_v1(const char* name, void** out, int version,
                                                      cuuint64_t flags) {
  return find(name, out, version, flags, nullptr);
}
PHOS_SIM_ALIAS(cuGetProcAddress, phos_sim_get_proc_address_v1);
