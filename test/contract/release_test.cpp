// SPDX-License-Identifier: GPL-2.0-only
// What releasing memory and mapping it back relies on (gpu-tracker/agent/release.c, adopt.c).
#include <algorithm>

#include "test/contract/fixture.h"

namespace contract {
namespace {

uint64_t round_up(uint64_t n) {
  return (n + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
}

class Release : public CudaTest {
 protected:
  static uint64_t attribute(CUpointer_attribute name, CUdeviceptr p) {
    uint64_t value = 0;
    EXPECT_EQ(cuPointerGetAttribute(&value, name, p), CUDA_SUCCESS) << name;
    return value;
  }
  // VMM memory, with no handle kept, at addresses that are reserved.
  void map_at(CUdeviceptr p, size_t size, bool rdma = false) {
    CUmemAllocationProp prop = device_memory_prop(device_, true);
    prop.allocFlags.gpuDirectRDMACapable = rdma;
    CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle = 0;
    ASSERT_EQ(cuMemCreate(&handle, size, &prop, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemMap(p, size, 0, handle, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemSetAccess(p, size, &access, 1), CUDA_SUCCESS);
    ASSERT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  }
};

TEST_F(Release, LargeAllocationsHaveBlocksOfTheirOwn) {
  for (uint64_t size : {2 * kMiB + 1, 5 * kMiB / 2, 4 * kMiB, uint64_t{5000001}, 33 * kMiB}) {
    CUdeviceptr p;
    ASSERT_EQ(cuMemAlloc(&p, size), CUDA_SUCCESS);
    EXPECT_EQ(p % (2 * kMiB), 0u) << size;
    EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, p), p) << size;
    EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, p), round_up(size)) << size;
    EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  }
}

TEST_F(Release, AddressesOfFreedMemoryCanBeReservedEveryTime) {
  constexpr size_t kCount = 300;
  std::vector<CUdeviceptr> p(kCount);
  std::vector<uint64_t> sizes(kCount);
  for (size_t i = 0; i < kCount; i++) {
    sizes[i] = 2 * kMiB + 1 + i * 7919 * 13 % (6 * kMiB);
    ASSERT_EQ(cuMemAlloc(&p[i], sizes[i]), CUDA_SUCCESS);
  }
  size_t same = 0;
  std::vector<CUdeviceptr> reserved(kCount);
  for (size_t i = 0; i < kCount; i++) {
    ASSERT_EQ(cuMemFree(p[i]), CUDA_SUCCESS);
    ASSERT_EQ(cuMemAddressReserve(&reserved[i], round_up(sizes[i]), 0, p[i], 0), CUDA_SUCCESS);
    same += reserved[i] == p[i];
  }
  EXPECT_EQ(same, kCount);
  for (size_t i = 0; i < kCount; i++) {
    EXPECT_EQ(cuMemAddressFree(reserved[i], round_up(sizes[i])), CUDA_SUCCESS);
  }
}

TEST_F(Release, VmmMemoryCanTakeThePlaceOfFreedMemory) {
  constexpr size_t kSize = 6 * kMiB;
  CUdeviceptr p, at;
  ASSERT_EQ(cuMemAlloc(&p, 5000001), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFree(p), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAddressReserve(&at, kSize, 0, p, 0), CUDA_SUCCESS);
  ASSERT_EQ(at, p);
  ASSERT_NO_FATAL_FAILURE(map_at(p, kSize));
  ASSERT_EQ(kernels_.fill(p, kSize / 4, 3), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(p, kSize / 4), 3), 0u);
  // What the application would notice.
  EXPECT_EQ(cuMemFree(p), CUDA_ERROR_INVALID_VALUE);
  CUdeviceptr base = 0;
  size_t size = 0;
  EXPECT_EQ(cuMemGetAddressRange(&base, &size, p + 4096), CUDA_SUCCESS);
  EXPECT_EQ(base, p);
  EXPECT_EQ(size, kSize);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_CONTEXT, p), 0u);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, p), kSize);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, p), 0u);
  // Without a handle of one's own it can be exported all the same.
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(p)), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(cuMemUnmap(p, kSize), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, kSize), CUDA_SUCCESS);
}

TEST_F(Release, UnmappedMemoryWithoutAHandleIsFree) {
  constexpr size_t kSize = 64 * kMiB;
  size_t before = 0, mapped = 0, after = 0, total = 0;
  CUdeviceptr p;
  ASSERT_EQ(cuMemAddressReserve(&p, kSize, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemGetInfo(&before, &total), CUDA_SUCCESS);
  ASSERT_NO_FATAL_FAILURE(map_at(p, kSize));
  ASSERT_EQ(cuMemGetInfo(&mapped, &total), CUDA_SUCCESS);
  EXPECT_EQ(before - mapped, kSize);
  ASSERT_EQ(cuMemUnmap(p, kSize), CUDA_SUCCESS);
  ASSERT_EQ(cuMemGetInfo(&after, &total), CUDA_SUCCESS);
  EXPECT_EQ(before, after);
  EXPECT_EQ(cuMemAddressFree(p, kSize), CUDA_SUCCESS);
}

// Everything else reserved, reallocation finds its old place once the gaps below it are taken.
TEST_F(Release, GapsThatAreReservedDoNotAttractAllocations) {
  CUdeviceptr low, p, at, miss = 0;
  ASSERT_EQ(cuMemAlloc(&low, 8 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&p, 8 * kMiB), CUDA_SUCCESS);
  if (low > p) std::swap(low, p);
  ASSERT_EQ(cuMemFree(p), CUDA_SUCCESS);
  ASSERT_EQ(cuMemFree(low), CUDA_SUCCESS);
  std::vector<CUdeviceptr> plugs;
  for (int i = 0; i < 64; i++) {
    ASSERT_EQ(cuMemAlloc(&miss, 8 * kMiB), CUDA_SUCCESS);
    if (miss == p) break;
    ASSERT_EQ(cuMemFree(miss), CUDA_SUCCESS);
    ASSERT_EQ(cuMemAddressReserve(&at, 8 * kMiB, 0, miss, 0), CUDA_SUCCESS);
    EXPECT_EQ(at, miss);
    plugs.push_back(at);
  }
  printf("misses before the old address: %zu\n", plugs.size());
  EXPECT_EQ(miss, p);
  if (miss == p) {
    EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  }
  for (CUdeviceptr plug : plugs) EXPECT_EQ(cuMemAddressFree(plug, 8 * kMiB), CUDA_SUCCESS);
}

TEST_F(Release, VmmMemoryCanBeAsGoodForRdma) {
  int supported = 0;
  ASSERT_EQ(cuDeviceGetAttribute(
                &supported, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, device_),
            CUDA_SUCCESS);
  if (!supported) GTEST_SKIP() << "this GPU has no RDMA with VMM memory";
  CUdeviceptr p;
  ASSERT_EQ(cuMemAddressReserve(&p, 4 * kMiB, 0, 0, 0), CUDA_SUCCESS);
  ASSERT_NO_FATAL_FAILURE(map_at(p, 4 * kMiB, true));
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE, p), 1u);
  EXPECT_EQ(cuMemUnmap(p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, 4 * kMiB), CUDA_SUCCESS);
}

class ReleaseInWorker : public WorkerTest {};

TEST_F(ReleaseInWorker, ReservationSurvivesTheDriversCheckpoint) {
  Worker worker;
  const std::string kept = value_of(worker.ask("alloc 4194304"));
  const std::string p = value_of(worker.ask("alloc 8388608"));
  ASSERT_EQ(worker.ask("fill " + kept + " 1048576 5"), "ok");
  ASSERT_EQ(worker.ask("free-reserve " + p + " 8388608"), "ok " + p);
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("map-at " + p + " 8388608"), "ok");
  EXPECT_EQ(worker.ask("fill " + p + " 2097152 6"), "ok");
  EXPECT_EQ(worker.ask("check " + p + " 2097152 6 0"), "ok 0");
  EXPECT_EQ(worker.ask("check " + kept + " 1048576 5 0"), "ok 0");
}

}  // namespace
}  // namespace contract
