// SPDX-License-Identifier: GPL-2.0-only
// Device memory: allocation, addresses, VMM, and what the driver says about pointers.
#include <unistd.h>

#include <fstream>

#include "test/contract/fixture.h"

namespace contract {
namespace {

class DeviceMemory : public CudaTest {};

// The permissions of this process's mapping at `address`; empty if there is none.
std::string permissions_at(CUdeviceptr address) {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long start = 0, end = 0;
    char perms[5] = "";
    sscanf(line.c_str(), "%lx-%lx %4s", &start, &end, perms);
    if (address >= start && address < end) return perms;
  }
  return "";
}

uint64_t attribute(CUpointer_attribute name, CUdeviceptr p) {
  uint64_t value = 0;
  EXPECT_EQ(cuPointerGetAttribute(&value, name, p), CUDA_SUCCESS) << "attribute " << name;
  return value;
}

CUresult ask(CUpointer_attribute name, CUdeviceptr p) {
  uint64_t value = 0;
  return cuPointerGetAttribute(&value, name, p);
}

struct VmmAllocation {
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr p = 0;
  size_t size = 0;

  CUresult make(CUdevice device, size_t bytes, bool exportable) {
    size = bytes;
    CUmemAllocationProp prop = device_memory_prop(device, exportable);
    CUresult r = cuMemCreate(&handle, size, &prop, 0);
    return r ? r : map_handle(handle, size, device, &p);
  }
  void release() {
    EXPECT_EQ(cuMemUnmap(p, size), CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressFree(p, size), CUDA_SUCCESS);
    EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  }
};

TEST_F(DeviceMemory, LargeAllocationIsAlignedAndInaccessibleToTheCpu) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAlloc(&p, 8 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(p % (2 * kMiB), 0u);
  EXPECT_EQ(permissions_at(p), "---p");
  EXPECT_EQ(permissions_at(p + 8 * kMiB - 1), "---p");
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, SmallAllocationsShareABlock) {
  CUdeviceptr a, b;
  ASSERT_EQ(cuMemAlloc(&a, 1000), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&b, 1000), CUDA_SUCCESS);
  EXPECT_EQ(a / (2 * kMiB), b / (2 * kMiB));
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, b + 999), b);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, b), 1000u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, b), 2 * kMiB);
  EXPECT_EQ(cuMemFree(a), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(b), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, ReservationHonoursTheHintOfJustFreedMemory) {
  CUdeviceptr p, again;
  ASSERT_EQ(cuMemAlloc(&p, 32 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFree(p), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&again, 32 * kMiB, 0, p, 0), CUDA_SUCCESS);
  EXPECT_EQ(again, p);
  EXPECT_EQ(cuMemAddressFree(again, 32 * kMiB), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, ReservationWithATakenHintGoesElsewhere) {
  CUdeviceptr p, other;
  ASSERT_EQ(cuMemAlloc(&p, 4 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&other, 4 * kMiB, 0, p, 0), CUDA_SUCCESS);
  EXPECT_NE(other, p);
  EXPECT_EQ(cuMemAddressFree(other, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, FreeOfSomethingElseIsInvalid) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAlloc(&p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(p + 512), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(p), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DeviceMemory, FreeOfVmmMemoryIsInvalid) {
  VmmAllocation vmm;
  ASSERT_EQ(vmm.make(device_, 4 * kMiB, false), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(vmm.p), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(kernels_.fill(vmm.p, 1024, 2), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(vmm.p, 1024), 2), 0u);
  vmm.release();
}

TEST_F(DeviceMemory, GranularityIsTwoMiB) {
  CUmemAllocationProp prop = device_memory_prop(device_, true);
  size_t granularity = 0;
  ASSERT_EQ(
      cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
      CUDA_SUCCESS);
  EXPECT_EQ(granularity, 2 * kMiB);
}

TEST_F(DeviceMemory, KernelCrossesMappingsOfSeveralHandles) {
  constexpr size_t kPiece = 2 * kMiB;
  constexpr uint32_t kElements = 2 * kPiece / 4;
  CUmemAllocationProp prop = device_memory_prop(device_, false);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handles[2];
  CUdeviceptr p;
  ASSERT_EQ(cuMemAddressReserve(&p, 2 * kPiece, 0, 0, 0), CUDA_SUCCESS);
  for (int i = 0; i < 2; i++) {
    ASSERT_EQ(cuMemCreate(&handles[i], kPiece, &prop, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemMap(p + i * kPiece, kPiece, 0, handles[i], 0), CUDA_SUCCESS);
  }
  ASSERT_EQ(cuMemSetAccess(p, 2 * kPiece, &access, 1), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.fill(p, kElements, 9), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(p, kElements), 9), 0u);
  EXPECT_EQ(cuMemUnmap(p, 2 * kPiece), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, 2 * kPiece), CUDA_SUCCESS);
  for (auto h : handles) EXPECT_EQ(cuMemRelease(h), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, AttributesOfCuMemAlloc) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAlloc(&p, 6 * kMiB), CUDA_SUCCESS);
  const CUdeviceptr inside = p + 5 * kMiB;
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_CONTEXT, p), reinterpret_cast<uint64_t>(context_));
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p), uint64_t{CU_MEMORYTYPE_DEVICE});
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_DEVICE_POINTER, inside), inside);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_HOST_POINTER, p), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_MANAGED, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, p), 1u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, inside), p);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, inside), 6 * kMiB);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPED, p), 1u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE, p), 1u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, p), 3u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, inside), p);
  CUdeviceptr base = 0;
  size_t size = 0;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, inside), CUDA_SUCCESS);
  EXPECT_EQ(base, p);
  EXPECT_EQ(size, 6 * kMiB);
  CUmemGenericAllocationHandle handle;
  EXPECT_EQ(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(p)),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, AttributesOfVmmMemory) {
  VmmAllocation vmm;
  ASSERT_EQ(vmm.make(device_, 4 * kMiB, true), CUDA_SUCCESS);
  EXPECT_EQ(permissions_at(vmm.p), "---p");
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_CONTEXT, vmm.p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, vmm.p), uint64_t{CU_MEMORYTYPE_DEVICE});
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, vmm.p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, vmm.p),
            uint64_t{CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR});
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE, vmm.p), 0u);
  CUipcMemHandle ipc;
  EXPECT_EQ(cuIpcGetMemHandle(&ipc, vmm.p), CUDA_ERROR_INVALID_VALUE);
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(vmm.p)), CUDA_SUCCESS);
  CUmemAllocationProp prop = {};
  ASSERT_EQ(cuMemGetAllocationPropertiesFromHandle(&prop, handle), CUDA_SUCCESS);
  EXPECT_EQ(prop.requestedHandleTypes, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  EXPECT_EQ(prop.location.id, device_);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  vmm.release();
}

TEST_F(DeviceMemory, AttributesOfPoolMemory) {
  CUdeviceptr p;
  CUmemoryPool pool;
  ASSERT_EQ(cuMemAllocAsync(&p, 4 * kMiB, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuDeviceGetDefaultMemPool(&pool, device_), CUDA_SUCCESS);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, p), reinterpret_cast<uint64_t>(pool));
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_CONTEXT, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, p), 4 * kMiB);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, p), 32 * kMiB);
  EXPECT_LT(p, CUdeviceptr{1} << 44);
  ASSERT_EQ(kernels_.fill(p, 1024, 4), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(p, 1024), 4), 0u);
  EXPECT_EQ(cuMemFreeAsync(p, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, AttributesOfPinnedMemory) {
  void* host;
  CUdeviceptr device_view;
  ASSERT_EQ(cuMemHostAlloc(&host, 4096, 0), CUDA_SUCCESS);
  const auto p = reinterpret_cast<CUdeviceptr>(host);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p), uint64_t{CU_MEMORYTYPE_HOST});
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_HOST_POINTER, p), p);
  ASSERT_EQ(cuMemHostGetDevicePointer(&device_view, host, 0), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.fill(device_view, 1024, 6), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  auto* values = static_cast<uint32_t*>(host);
  EXPECT_EQ(count_wrong(std::vector<uint32_t>(values, values + 1024), 6), 0u);
  EXPECT_EQ(cuMemFreeHost(host), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, RegisteredMemoryIsHostMemoryUntilUnregistered) {
  std::vector<char> memory(1 << 16);
  auto aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 4095) &
                                         ~uintptr_t{4095});
  const auto p = reinterpret_cast<CUdeviceptr>(aligned);
  ASSERT_EQ(cuMemHostRegister(aligned, 8192, 0), CUDA_SUCCESS);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p), uint64_t{CU_MEMORYTYPE_HOST});
  EXPECT_EQ(cuMemHostRegister(aligned, 8192, 0), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  EXPECT_EQ(cuMemHostUnregister(aligned), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(DeviceMemory, ManagedMemoryIsForBothSides) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAllocManaged(&p, 2 * kMiB, CU_MEM_ATTACH_GLOBAL), CUDA_SUCCESS);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_MANAGED, p), 1u);
  ASSERT_EQ(kernels_.fill(p, 1024, 8), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  auto* values = reinterpret_cast<uint32_t*>(p);
  EXPECT_EQ(count_wrong(std::vector<uint32_t>(values, values + 1024), 8), 0u);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

constexpr uint64_t kUntouched = 0x5555555555555555;

// Asks for several attributes at once; `values` start as kUntouched.
CUresult ask_several(CUdeviceptr p, std::vector<CUpointer_attribute> names,
                     std::vector<uint64_t>* values) {
  values->assign(names.size(), kUntouched);
  std::vector<void*> data;
  for (uint64_t& value : *values) data.push_back(&value);
  return cuPointerGetAttributes(static_cast<unsigned>(names.size()), names.data(), data.data(), p);
}

TEST_F(DeviceMemory, UnknownAddressIsInvalidForOneAttributeAndNoErrorForSeveral) {
  std::vector<char> pageable(4096);
  const auto p = reinterpret_cast<CUdeviceptr>(pageable.data());
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_CONTEXT, p), CUDA_ERROR_INVALID_VALUE);
  std::vector<uint64_t> values;
  ASSERT_EQ(ask_several(p,
                        {CU_POINTER_ATTRIBUTE_CONTEXT, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                         CU_POINTER_ATTRIBUTE_HOST_POINTER, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                         CU_POINTER_ATTRIBUTE_MAPPED, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                         CU_POINTER_ATTRIBUTE_RANGE_SIZE},
                        &values),
            CUDA_SUCCESS);
  EXPECT_EQ(values[0], 0u);
  EXPECT_EQ(static_cast<uint32_t>(values[1]), 0u);
  EXPECT_EQ(values[2], p);
  EXPECT_EQ(static_cast<int32_t>(values[3]), -2);
  EXPECT_EQ(static_cast<uint32_t>(values[4]), 0u);
  EXPECT_EQ(values[5], kUntouched);
  EXPECT_EQ(values[6], kUntouched);
  CUdeviceptr base = 0;
  size_t size = 0;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, p), CUDA_ERROR_NOT_FOUND);
}

TEST_F(DeviceMemory, RangeOfReservedAddressesIsTheWholeReservation) {
  CUmemAllocationProp prop = device_memory_prop(device_, false);
  CUmemGenericAllocationHandle handle;
  CUdeviceptr p;
  std::vector<uint64_t> values;
  const std::vector<CUpointer_attribute> names = {
      CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_RANGE_SIZE,
      CU_POINTER_ATTRIBUTE_MAPPED, CU_POINTER_ATTRIBUTE_MAPPING_SIZE};
  ASSERT_EQ(cuMemAddressReserve(&p, 8 * kMiB, 0, 0, 0), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_MAPPED, p), CUDA_ERROR_INVALID_VALUE);
  ASSERT_EQ(ask_several(p + 4096, names, &values), CUDA_SUCCESS);
  EXPECT_EQ(values[0], p);
  EXPECT_EQ(values[1], 8 * kMiB);
  EXPECT_EQ(static_cast<uint32_t>(values[2]), 0u);
  EXPECT_EQ(values[3], 0u);

  ASSERT_EQ(cuMemCreate(&handle, 4 * kMiB, &prop, 0), CUDA_SUCCESS);
  EXPECT_EQ(cuMemMap(p, 2 * kMiB, 0, handle, 0), CUDA_ERROR_NOT_SUPPORTED);
  ASSERT_EQ(cuMemMap(p, 4 * kMiB, 0, handle, 0), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_POINTER_ATTRIBUTE_DEVICE_POINTER, p), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, p), 0u);
  ASSERT_EQ(ask_several(p + 4096, names, &values), CUDA_SUCCESS);
  EXPECT_EQ(values[0], p);
  EXPECT_EQ(values[1], 8 * kMiB);
  EXPECT_EQ(static_cast<uint32_t>(values[2]), 1u);
  EXPECT_EQ(values[3], 4 * kMiB);
  CUdeviceptr base = 0;
  size_t size = 0;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, p + 4096), CUDA_ERROR_NOT_FOUND);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  ASSERT_EQ(cuMemSetAccess(p, 4 * kMiB, &access, 1), CUDA_SUCCESS);
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, p + 4096), CUDA_SUCCESS);
  EXPECT_EQ(base, p);
  EXPECT_EQ(size, 4 * kMiB);
  EXPECT_EQ(cuMemUnmap(p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, 8 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, SeveralAttributesAtOnceEqualSingleAnswers) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAlloc(&p, 4 * kMiB), CUDA_SUCCESS);
  uint64_t start = 0, size = 0, host = 5;
  CUpointer_attribute names[] = {CU_POINTER_ATTRIBUTE_RANGE_START_ADDR,
                                 CU_POINTER_ATTRIBUTE_RANGE_SIZE,
                                 CU_POINTER_ATTRIBUTE_HOST_POINTER};
  void* data[] = {&start, &size, &host};
  EXPECT_EQ(cuPointerGetAttributes(3, names, data, p + 4096), CUDA_SUCCESS);
  EXPECT_EQ(start, p);
  EXPECT_EQ(size, 4 * kMiB);
  EXPECT_EQ(host, 0u);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(DeviceMemory, MoreThanTheDeviceHasIsOutOfMemory) {
  size_t total = 0;
  ASSERT_EQ(cuDeviceTotalMem(&total, device_), CUDA_SUCCESS);
  CUdeviceptr p;
  EXPECT_EQ(cuMemAlloc(&p, total + 2 * kMiB), CUDA_ERROR_OUT_OF_MEMORY);
}

// What phos lowers in its own context to save device memory.
TEST_F(DeviceMemory, LimitsAreRaisedToTheLeastThereIs) {
  CUcontext own;
  ASSERT_EQ(cuCtxCreate(&own, nullptr, 0, device_), CUDA_SUCCESS);
  for (CUlimit limit : {CU_LIMIT_STACK_SIZE, CU_LIMIT_MALLOC_HEAP_SIZE, CU_LIMIT_PRINTF_FIFO_SIZE,
                        CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT}) {
    size_t before = 0, after = 0;
    ASSERT_EQ(cuCtxGetLimit(&before, limit), CUDA_SUCCESS) << limit;
    EXPECT_EQ(cuCtxSetLimit(limit, 0), CUDA_SUCCESS) << limit;
    ASSERT_EQ(cuCtxGetLimit(&after, limit), CUDA_SUCCESS) << limit;
    EXPECT_LT(after, before) << limit;
  }
  EXPECT_EQ(cuCtxDestroy(own), CUDA_SUCCESS);
  cuCtxSetCurrent(context_);
}

TEST_F(DeviceMemory, FreeMemoryGoesDownByAnAllocation) {
  size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cuMemGetInfo(&before, &total), CUDA_SUCCESS);
  CUdeviceptr p;
  ASSERT_EQ(cuMemAlloc(&p, 64 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemGetInfo(&after, &total), CUDA_SUCCESS);
  EXPECT_EQ(before - after, 64 * kMiB);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

}  // namespace
}  // namespace contract
