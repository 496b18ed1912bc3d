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

// Pool and VMM memory belong to the device, not to a context.
bool of_context(const Range& r) {
  return r.kind != Kind::kVmm && r.kind != Kind::kPool;
}

// The address range that the driver means: for VMM memory the whole reservation, mapped or not.
void reservation_around(CUdeviceptr p, CUdeviceptr* base, uint64_t* size) {
  auto& all = memory().reservations;
  auto it = all.upper_bound(p);
  if (it == all.begin()) return;
  --it;
  if (p - it->first >= it->second) return;
  *base = it->first;
  *size = it->second;
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
       *v = of_context(r) ? reinterpret_cast<uint64_t>(r.context) : 0;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = is_host(r) ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_DEVICE_POINTER, 8,
     [](const Range& r, CUdeviceptr p, uint64_t* v) {
       *v = r.access ? p : 0;
       return r.access != 0;
     }},
    {CU_POINTER_ATTRIBUTE_HOST_POINTER, 8,
     [](const Range& r, CUdeviceptr p, uint64_t* v) {
       const bool touchable = is_host(r) || is_managed(r);
       *v = touchable ? p : 0;
       return touchable;
     }},
    {CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = is_host(r) ? 0 : r.sync_memops;
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
       CUdeviceptr base = r.base;
       uint64_t size = 0;
       if (r.kind == Kind::kVmm) reservation_around(r.base, &base, &size);
       *v = base;
       return true;
     }},
    {CU_POINTER_ATTRIBUTE_RANGE_SIZE, 8,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       CUdeviceptr base = 0;
       *v = r.size;
       if (r.kind == Kind::kVmm) reservation_around(r.base, &base, v);
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
       if (r.kind == Kind::kVmm)
         *v = memory().handles[r.handle].prop.allocFlags.gpuDirectRDMACapable;
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
    {CU_POINTER_ATTRIBUTE_IS_HW_DECOMPRESS_CAPABLE, 4,
     [](const Range& r, CUdeviceptr, uint64_t* v) {
       *v = r.kind == Kind::kDevice;
       return true;
     }},
};

const Attribute* find_attribute(CUpointer_attribute name) {
  for (const Attribute& a : kAttributes) {
    if (a.name == name) return &a;
  }
  return nullptr;
}

constexpr size_t kTokenBytes = 12;

// What cuPointerGetAttributes writes for an address without memory. False: nothing.
bool default_value(CUpointer_attribute name, CUdeviceptr p, uint64_t* value) {
  constexpr int kNoDevice = -2;
  CUdeviceptr base = 0;
  uint64_t size = 0;
  reservation_around(p, &base, &size);
  switch (name) {
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *value = p;
      return true;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *value = static_cast<uint32_t>(kNoDevice);
      return true;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *value = base;
      return size > 0;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *value = size;
      return size > 0;
    default:
      *value = 0;
      return true;
  }
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

// One attribute of `p`. One that the memory does not have is an error and zeroed all the same.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute name, CUdeviceptr p) {
  PHOS_SIM_API(kInitOnly);
  if (!data) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (!r) return CUDA_ERROR_INVALID_VALUE;
  if (name == CU_POINTER_ATTRIBUTE_P2P_TOKENS) {
    memset(data, 0, kTokenBytes);
    return is_host(*r) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  }
  const Attribute* attribute = find_attribute(name);
  if (!attribute) return CUDA_ERROR_INVALID_VALUE;
  uint64_t value = 0;
  bool has = attribute->get(*r, p, &value);
  memcpy(data, &value, attribute->size);  // little endian
  return has ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Several attributes of `p`. Unknown pointers are no error; what is written then is what driver 580
// was measured to write: the range not at all, unless the address is reserved.
CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* names, void** data,
                                CUdeviceptr p) {
  PHOS_SIM_API(kInitOnly);
  if (!names || !data || !count) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; i++) {
    if (!data[i] || !find_attribute(names[i])) return CUDA_ERROR_INVALID_VALUE;
  }
  std::lock_guard<std::mutex> hold(memory().mutex);
  Range* r = find_range(p);
  if (r && r->dying) crash();
  for (unsigned i = 0; i < count; i++) {
    const Attribute* attribute = find_attribute(names[i]);
    uint64_t value = 0;
    if (r) {
      attribute->get(*r, p, &value);
    } else if (!default_value(names[i], p, &value)) {
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
