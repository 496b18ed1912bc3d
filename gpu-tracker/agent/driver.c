/* SPDX-License-Identifier: GPL-2.0-only */
/* libcuda as the agent sees it: the table of functions, and questions about an address. */
#include <stddef.h>

#include "gpu-tracker/agent/agent.h"

/* The order is that of struct driver. */
static const char* const kNames[] = {
    "cuPointerGetAttribute",
    "cuPointerGetAttributes",
    "cuDeviceGet",
    "cuDeviceGetUuid_v2",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuIpcGetMemHandle",
    "cuMemRetainAllocationHandle",
    "cuMemExportToShareableHandle",
    "cuMemRelease",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemGetAddressRange_v2",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemCreate",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
    "cuCtxSynchronize",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuDeviceCanAccessPeer",
    "cuDevicePrimaryCtxGetState",
    "cuMemAllocManaged",
    "cuMemRangeGetAttributes",
    "cuMemAdvise_v2",
    "cuMemPrefetchAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuCtxGetDevice",
};
_Static_assert(sizeof kNames == sizeof(struct driver), "one name a function");

int driver_load(struct driver* driver, void* (*find)(void* handle, const char* name),
                void* handle) {
  void** functions = (void**)driver;
  for (size_t i = 0; i < sizeof kNames / sizeof kNames[0]; i++) {
    functions[i] = find(handle, kNames[i]);
    if (!functions[i]) return (int)i;
  }
  return -1;
}

/* cuda.h: CUpointer_attribute. Each answer is 4 or 8 bytes of its zeroed field. */
static const struct {
  int attribute;
  size_t field;
} kFacts[] = {
    {1, offsetof(struct memory_facts, context)},
    {2, offsetof(struct memory_facts, memory_type)},
    {7, offsetof(struct memory_facts, buffer_id)},
    {8, offsetof(struct memory_facts, is_managed)},
    {9, offsetof(struct memory_facts, device)},
    {11, offsetof(struct memory_facts, range_address)},
    {12, offsetof(struct memory_facts, range_size)},
    {14, offsetof(struct memory_facts, handle_types)},
    {17, offsetof(struct memory_facts, pool)},
    {18, offsetof(struct memory_facts, mapping_size)},
    {19, offsetof(struct memory_facts, mapping_address)},
};
#define FACTS (sizeof kFacts / sizeof kFacts[0])
/* CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: for memory of cuMemAlloc alone. */
#define LEGACY_IPC 10
_Static_assert((FACTS + 1) * sizeof(uint64_t) == sizeof(struct memory_facts), "all is asked for");

int driver_facts(const struct driver* driver, uint64_t address, struct memory_facts* facts) {
  int attributes[FACTS];
  void* data[FACTS];
  for (size_t i = 0; i < FACTS; i++) {
    attributes[i] = kFacts[i].attribute;
    data[i] = (char*)facts + kFacts[i].field;
    *(uint64_t*)data[i] = 0; /* what the driver does not know it does not write */
  }
  facts->legacy_ipc = 0;
  const int result = driver->pointer_get_attributes(FACTS, attributes, data, address);
  if (result || !facts->context || facts->pool || facts->is_managed) return result;
  attributes[0] = LEGACY_IPC;
  data[0] = &facts->legacy_ipc;
  return driver->pointer_get_attributes(1, attributes, data, address);
}
