// SPDX-License-Identifier: GPL-2.0-only
// memcpy and memset, synchronous and asynchronous.
#include <cstring>
#include <utility>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

enum class Wait { kNo, kYes };

CUdeviceptr address(const void* p) {
  return reinterpret_cast<CUdeviceptr>(p);
}

// True if the engine can read or write this memory at any later time: device, pinned or managed.
bool engine_can_wait(CUdeviceptr p, size_t size) {
  return reachable(p, size);
}

CUresult copy(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream, Wait wait) {
  if (!size) return CUDA_SUCCESS;
  // Pageable host memory belongs to the caller again when the call returns.
  if (!engine_can_wait(to, size) || !engine_can_wait(from, size)) wait = Wait::kYes;
  uint64_t ticket = submit(stream, [=] {
    return copy_bytes(to, from, size) ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
  });
  return wait == Wait::kYes ? wait_for(ticket) : CUDA_SUCCESS;
}

// Driver 580 refuses a copy that reaches from one allocation into the next one, imported ones
// included, though kernels may. What is mapped side by side by cuMemMap is one piece, but only for
// GPUs that cuMemSetAccess has named: others' memory is otherwise copied through the host.
bool may_copy(CUdeviceptr p, size_t size) {
  std::lock_guard<std::mutex> hold(memory().mutex);
  const Range* r = find_range(p);
  if (!r) return false;
  if (r->kind == Kind::kVmm) return r->access >> device_of(current_context()) & 1;
  return p + size <= r->base + r->size;
}

CUresult copy_checked(CUdeviceptr to, bool to_device, CUdeviceptr from, bool from_device,
                      size_t size, CUstream stream, Wait wait) {
  if (CUresult r = check_stream(stream)) return r;
  for (auto [on_device, p] : {std::pair(to_device, to), std::pair(from_device, from)}) {
    if (!on_device || !size) continue;
    if (!reachable(p, size) || !may_copy(p, size)) return CUDA_ERROR_INVALID_VALUE;
  }
  return copy(to, from, size, stream, wait);
}

template <typename T>
CUresult set(CUdeviceptr to, T value, size_t count, CUstream stream, Wait wait) {
  if (CUresult r = check_stream(stream)) return r;
  if (to % sizeof(T) || !reachable(to, count * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
  uint64_t ticket = submit(stream, [=] {
    for_each_piece(to, count * sizeof(T), [value](char* at, uint64_t bytes) {
      auto* elements = reinterpret_cast<T*>(at);
      for (uint64_t i = 0; i < bytes / sizeof(T); i++) elements[i] = value;
    });
    return CUDA_SUCCESS;
  });
  return wait == Wait::kYes ? wait_for(ticket) : CUDA_SUCCESS;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t size) {
  PHOS_SIM_API(kContext);
  return copy(to, from, size, nullptr, Wait::kYes);
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_checked(to, false, from, false, size, stream, Wait::kNo);
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t size) {
  PHOS_SIM_API(kContext);
  return copy_checked(to, true, address(from), false, size, nullptr, Wait::kYes);
}
PHOS_SIM_ALIAS(cuMemcpyHtoD, cuMemcpyHtoD_v2);

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t size) {
  PHOS_SIM_API(kContext);
  return copy_checked(address(to), false, from, true, size, nullptr, Wait::kYes);
}
PHOS_SIM_ALIAS(cuMemcpyDtoH, cuMemcpyDtoH_v2);

PHOS_SIM_EXPORT CUresult cuMemcpyDtoH_v2_ptds(void* to, CUdeviceptr from, size_t size) {
  PHOS_SIM_API(kContext);
  return copy_checked(address(to), false, from, true, size, CU_STREAM_PER_THREAD, Wait::kYes);
}

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t size) {
  PHOS_SIM_API(kContext);
  return copy_checked(to, true, from, true, size, nullptr, Wait::kNo);
}
PHOS_SIM_ALIAS(cuMemcpyDtoD, cuMemcpyDtoD_v2);

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t size, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_checked(to, true, address(from), false, size, stream, Wait::kNo);
}
PHOS_SIM_ALIAS(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2);

CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t size, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_checked(address(to), false, from, true, size, stream, Wait::kNo);
}
PHOS_SIM_ALIAS(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2);

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  PHOS_SIM_API(kContext);
  return copy_checked(to, true, from, true, size, stream, Wait::kNo);
}
PHOS_SIM_ALIAS(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2);

CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
  PHOS_SIM_API(kContext);
  return set<uint8_t>(to, value, count, nullptr, Wait::kYes);
}
PHOS_SIM_ALIAS(cuMemsetD8, cuMemsetD8_v2);

CUresult cuMemsetD32(CUdeviceptr to, unsigned int value, size_t count) {
  PHOS_SIM_API(kContext);
  return set<uint32_t>(to, value, count, nullptr, Wait::kYes);
}
PHOS_SIM_ALIAS(cuMemsetD32, cuMemsetD32_v2);

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  PHOS_SIM_API(kContext);
  return set<uint8_t>(to, value, count, stream, Wait::kNo);
}

PHOS_SIM_EXPORT CUresult cuMemsetD8Async_ptsz(CUdeviceptr to, unsigned char value, size_t count,
                                              CUstream stream) {
  PHOS_SIM_API(kContext);
  return set<uint8_t>(to, value, count, per_thread(stream), Wait::kNo);
}

CUresult cuMemsetD32Async(CUdeviceptr to, unsigned int value, size_t count, CUstream stream) {
  PHOS_SIM_API(kContext);
  return set<uint32_t>(to, value, count, stream, Wait::kNo);
}
