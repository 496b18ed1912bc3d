// SPDX-License-Identifier: GPL-2.0-only
// What the driver says about a pointer.
#include <cstring>

#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

bool is_host(const Range& r) {
  return r.kind == Kind::kHostAlloc || r.kind == Kind::kHostRegistered;
}
bool is_managed(const Range& r) {
  return r.kind == Kind::kManaged;
}

// One attribute of the memory at `p`: its size in bytes and how to answer.
struct Attribute {
  CUpointer_attribute name;
  size_t size;
  // Writes the answer; false: this memory does not have it.
  bool (*get)(const Range& r, CUdeviceptr p, uint64_t* value);
};

const Attribute kAttributes[] = {
    {CU_POINTER_ATTRIBUTE_CONTEXT, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = reinterpret_cast<uint64_t>(r.context);
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = is_host(r) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_DEVICE_POINTER, 8,
     [](const Range&, CUdeviceptr p, uint64_t* v) {
       *v = p;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_HOST_POINTER, 8,
     [](const Range& r, CUdeviceptr p, uint64_t* v) {
       *v = p;
       return is_host(r) || is_managed(r);
     }},
    {CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.sync_memops;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_BUFFER_ID, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.id;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_IS_MANAGED, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = is_managed(r);
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = static_cast<uint64_t>(r.device);
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.kind == Kind::kDevice;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.base;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_RANGE_SIZE, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.size;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MAPPED, 4,
     [](const Range&, CUdeviceptr, uint64_t* v) {
       *v = 1;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = 0;
       if (r.kind == Kind::kVmm) *v = memory().handles[r.handle].prop.requestedHandleTypes;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.kind == Kind::kDevice;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.access ? CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE
                     : CU_POINTER_ATTRIBUTE_ACCESS_FLAG_NONE;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.kind == Kind::kPool ? reinterpret_cast<uint64_t>(default_pool(r.device)) : 0;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MAPPING_SIZE, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.map_size;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.map_base;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       auto block = memory().blocks.find(r.map_base);
       *v = block == memory().blocks.end() ? r.id : block->second.id;
       return true;
     }},
};

const Attribute* find_attribute(CUpointer_attribute name) {
  for (const Attribute& a : kAttributes) {
    if (a.name == name) return &a;
  }
  return nullptr;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

// The answer for one attribute of `p`; the enumerators are 32 bits wide, as in the real library.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute name, CUdeviceptr p) {
  PHOS_SIM_API(kInit);
  const Attribute* attribute = find_attribute(name);
  if (!data || !attribute) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  uint64_t value = 0;
  if (!r || !attribute->get(*r, p, &value)) return CUDA_ERROR_INVALID_VALUE;
  memcpy(data, &value, attribute->size);  // little endian
  return CUDA_SUCCESS;
}

// Unknown pointers and attributes that the memory does not have give zeros, and success.
CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* names, void** data,
                                CUdeviceptr p) {
  PHOS_SIM_API(kInit);
  if (!names || !data || !count) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; i++) {
    if (!data[i] || !find_attribute(names[i])) return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  for (unsigned i = 0; i < count; i++) {
    const Attribute* attribute = find_attribute(names[i]);
    uint64_t value = 0;
    if (r && !attribute->get(*r, p, &value)) value = 0;
    // Of an unknown pointer the real driver says nothing about its range (seen on 580).
    if (!r && (names[i] == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR ||
               names[i] == CU_POINTER_ATTRIBUTE_RANGE_SIZE)) {
      continue;
    }
    memcpy(data[i], &value, attribute->size);
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerSetAttribute(const void* value, CUpointer_attribute name, CUdeviceptr p) {
  PHOS_SIM_API(kInit);
  if (!value || name != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r) return CUDA_ERROR_INVALID_VALUE;
  r->sync_memops = *static_cast<const unsigned*>(value) != 0;
  return CUDA_SUCCESS;
}
