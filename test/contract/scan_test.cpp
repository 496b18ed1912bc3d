// SPDX-License-Identifier: GPL-2.0-only
// What the agent relies on to find all device memory by asking about addresses
// (gpu-tracker/agent/scan.c), and what a question costs.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <string>

#include "gpu-tracker/base/proc.h"
#include "test/contract/fixture.h"

namespace contract {
namespace {

class Scan : public CudaTest {
 protected:
  static uint64_t attribute(CUpointer_attribute name, CUdeviceptr p) {
    uint64_t value = 0;
    EXPECT_EQ(cuPointerGetAttribute(&value, name, p), CUDA_SUCCESS) << name;
    return value;
  }
  // The line of /proc/self/maps that holds `p`.
  static phos::ProcMapping mapping_at(CUdeviceptr p) {
    auto maps = phos::read_proc_maps(getpid());
    for (const phos::ProcMapping& m : *maps) {
      if (m.start <= p && p < m.end) return m;
    }
    return {};
  }
};

TEST_F(Scan, DeviceMemoryLiesInInaccessiblePrivateMappings) {
  CUdeviceptr device, pool, mapped;
  ASSERT_EQ(cuMemAlloc(&device, 4 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAllocAsync(&pool, 4 * kMiB, nullptr), CUDA_SUCCESS);
  CUmemAllocationProp prop = device_memory_prop(device_, true);
  CUmemGenericAllocationHandle handle;
  ASSERT_EQ(cuMemCreate(&handle, 4 * kMiB, &prop, 0), CUDA_SUCCESS);
  ASSERT_EQ(map_handle(handle, 4 * kMiB, device_, &mapped), CUDA_SUCCESS);
  for (CUdeviceptr p : {device, pool, mapped}) {
    EXPECT_STREQ(mapping_at(p).perms, "---p");
    EXPECT_EQ(mapping_at(p).path, "");
  }
  EXPECT_EQ(cuMemUnmap(mapped, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(mapped, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFreeAsync(pool, nullptr), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(device), CUDA_SUCCESS);
}

TEST_F(Scan, ManagedMemoryIsASharedMappingOfItsDriver) {
  CUdeviceptr p;
  ASSERT_EQ(cuMemAllocManaged(&p, 4 * kMiB, CU_MEM_ATTACH_GLOBAL), CUDA_SUCCESS);
  EXPECT_EQ(p % (2 * kMiB), 0u);
  EXPECT_EQ(mapping_at(p).perms[3], 's');
  EXPECT_NE(mapping_at(p).path.find("/dev/nvidia-uvm"), std::string::npos) << mapping_at(p).path;
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, p + 2 * kMiB), p);
  EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_RANGE_SIZE, p), 4 * kMiB);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(Scan, PiecesOfAReservationHaveMappingsAndIdsOfTheirOwn) {
  CUmemAllocationProp prop = device_memory_prop(device_, true);
  CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handles[2];
  CUdeviceptr p;
  ASSERT_EQ(cuMemAddressReserve(&p, 12 * kMiB, 0, 0, 0), CUDA_SUCCESS);
  for (int i = 0; i < 2; i++) {
    ASSERT_EQ(cuMemCreate(&handles[i], 4 * kMiB, &prop, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemMap(p + i * 4 * kMiB, 4 * kMiB, 0, handles[i], 0), CUDA_SUCCESS);
    ASSERT_EQ(cuMemSetAccess(p + i * 4 * kMiB, 4 * kMiB, &access, 1), CUDA_SUCCESS);
  }
  for (int i = 0; i < 2; i++) {
    const CUdeviceptr inside = p + i * 4 * kMiB + 2 * kMiB;
    EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, inside), p + i * 4 * kMiB);
    EXPECT_EQ(attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, inside), 4 * kMiB);
  }
  const uint64_t first = attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, p);
  EXPECT_NE(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, p + 4 * kMiB), first);
  uint64_t none = 0;
  EXPECT_EQ(cuPointerGetAttribute(&none, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, p + 8 * kMiB),
            CUDA_ERROR_INVALID_VALUE);
  // The same handle mapped anew at the same address is another buffer.
  ASSERT_EQ(cuMemUnmap(p, 4 * kMiB), CUDA_SUCCESS);
  ASSERT_EQ(cuMemMap(p, 4 * kMiB, 0, handles[1], 0), CUDA_SUCCESS);
  EXPECT_NE(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, p), first);
  EXPECT_EQ(cuMemUnmap(p, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemUnmap(p + 4 * kMiB, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemAddressFree(p, 12 * kMiB), CUDA_SUCCESS);
  for (auto handle : handles) EXPECT_EQ(cuMemRelease(handle), CUDA_SUCCESS);
}

TEST_F(Scan, NewMemoryAtAnOldAddressHasAnotherId) {
  CUdeviceptr first, second;
  ASSERT_EQ(cuMemAlloc(&first, 4 * kMiB), CUDA_SUCCESS);
  const uint64_t id = attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, first);
  ASSERT_EQ(cuMemFree(first), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&second, 4 * kMiB), CUDA_SUCCESS);
  EXPECT_NE(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, second), id);
  EXPECT_EQ(cuMemFree(second), CUDA_SUCCESS);
}

TEST_F(Scan, AllocationsAboveOneMiBBeginAtTwoMiB) {
  for (uint64_t size : {kMiB + 1, 3 * kMiB / 2, 2 * kMiB, 2 * kMiB + 1, 5 * kMiB}) {
    CUdeviceptr p[3];
    for (CUdeviceptr& each : p) {
      ASSERT_EQ(cuMemAlloc(&each, size), CUDA_SUCCESS);
      EXPECT_EQ(each % (2 * kMiB), 0u) << size;
    }
    for (CUdeviceptr each : p) EXPECT_EQ(cuMemFree(each), CUDA_SUCCESS);
  }
}

// Prints what one question about an address without memory costs; the limit only catches a driver
// in which the scan of a large process would take seconds.
TEST_F(Scan, QuestionAboutAnEmptyAddressIsCheap) {
  constexpr int kProbes = 100000;
  CUdeviceptr p;
  ASSERT_EQ(cuMemAddressReserve(&p, 256 * kMiB, 0, 0, 0), CUDA_SUCCESS);
  auto nanoseconds_each = [&](auto question) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kProbes; i++) question(p + (static_cast<uint64_t>(i) % 128) * 2 * kMiB);
    const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
    return static_cast<double>(took.count()) / kProbes;
  };
  CUdeviceptr value = 0;
  void* data[] = {&value};
  CUpointer_attribute type = CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
  const double one =
      nanoseconds_each([&](CUdeviceptr at) { (void)cuPointerGetAttribute(&value, type, at); });
  const double several =
      nanoseconds_each([&](CUdeviceptr at) { (void)cuPointerGetAttributes(1, &type, data, at); });
  const double range =
      nanoseconds_each([&](CUdeviceptr at) { (void)cuMemGetAddressRange(&value, nullptr, at); });
  printf(
      "cuPointerGetAttribute %.0f ns, cuPointerGetAttributes %.0f ns, cuMemGetAddressRange "
      "%.0f ns\n",
      one, several, range);
  EXPECT_LT(one, 20000);
  EXPECT_EQ(cuMemAddressFree(p, 256 * kMiB), CUDA_SUCCESS);
}

}  // namespace
}  // namespace contract
