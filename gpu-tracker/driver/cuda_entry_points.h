// SPDX-License-Identifier: GPL-2.0-only
// The table of libcuda functions that phos calls from outside a target; private to this room.
#pragma once

#include <cuda.h>

#include <string>

#include "gpu-tracker/base/result.h"

namespace phos {

// Name, and the driver release that brought it (0: older than any phos could use). Those that tell
// a driver that is too old from a library that is none come first.
#define PHOS_CUDA_ENTRY_POINTS(X)               \
  X(cuInit, 0)                                  \
  X(cuDriverGetVersion, 0)                      \
  X(cuGetErrorName, 0)                          \
  X(cuDeviceGetCount, 0)                        \
  X(cuDeviceGet, 0)                             \
  X(cuDeviceGetName, 0)                         \
  X(cuDeviceTotalMem_v2, 0)                     \
  X(cuDeviceGetUuid_v2, 470)                    \
  X(cuCheckpointProcessGetRestoreThreadId, 570) \
  X(cuCheckpointProcessGetState, 570)           \
  X(cuCheckpointProcessLock, 570)               \
  X(cuCheckpointProcessCheckpoint, 570)         \
  X(cuCheckpointProcessRestore, 570)            \
  X(cuCheckpointProcessUnlock, 570)             \
  X(cuDeviceGetAttribute, 0)                    \
  X(cuDevicePrimaryCtxRetain, 0)                \
  X(cuDevicePrimaryCtxRelease_v2, 450)          \
  X(cuDevicePrimaryCtxSetFlags_v2, 450)         \
  X(cuCtxSetCurrent, 0)                         \
  X(cuCtxSetLimit, 0)                           \
  X(cuMemGetInfo_v2, 0)                         \
  X(cuMemAlloc_v2, 0)                           \
  X(cuMemFree_v2, 0)                            \
  X(cuIpcOpenMemHandle_v2, 450)                 \
  X(cuIpcCloseMemHandle, 0)                     \
  X(cuMemImportFromShareableHandle, 440)        \
  X(cuMemAddressReserve, 440)                   \
  X(cuMemAddressFree, 440)                      \
  X(cuMemMap, 440)                              \
  X(cuMemUnmap, 440)                            \
  X(cuMemSetAccess, 440)                        \
  X(cuMemRelease, 440)                          \
  X(cuMemHostRegister_v2, 0)                    \
  X(cuMemHostUnregister, 0)                     \
  X(cuStreamCreate, 0)                          \
  X(cuStreamDestroy_v2, 0)                      \
  X(cuStreamSynchronize, 0)                     \
  X(cuStreamWaitEvent, 0)                       \
  X(cuEventCreate, 0)                           \
  X(cuEventDestroy_v2, 0)                       \
  X(cuEventRecord, 0)                           \
  X(cuEventSynchronize, 0)                      \
  X(cuEventQuery, 0)                            \
  X(cuEventElapsedTime_v2, 570)                 \
  X(cuMemcpyDtoHAsync_v2, 0)                    \
  X(cuMemcpyHtoDAsync_v2, 0)                    \
  X(cuMemcpyDtoDAsync_v2, 0)                    \
  X(cuMemsetD8Async, 0)                         \
  X(cuModuleLoadData, 0)                        \
  X(cuModuleUnload, 0)                          \
  X(cuModuleGetFunction, 0)                     \
  X(cuLaunchKernel, 0)

struct CudaEntryPoints {
#define X(name, since) decltype(&::name) name = nullptr;
  PHOS_CUDA_ENTRY_POINTS(X)
#undef X

  // "<what> failed: CUDA_ERROR_... (n)"
  Error error(const std::string& what, CUresult r) const {
    const char* name = nullptr;
    cuGetErrorName(r, &name);
    return Error(
        Domain::kCuda, r,
        what + " failed: " + (name ? name : "unknown error") + " (" + std::to_string(r) + ")");
  }
};

}  // namespace phos
