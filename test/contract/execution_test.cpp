// SPDX-License-Identifier: GPL-2.0-only
// Contexts, modules, kernels, streams, events, copies and the names of things.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "test/contract/fixture.h"

namespace contract {
namespace {

class Execution : public CudaTest {};

TEST_F(Execution, StreamsAreAsynchronousAndOrdered) {
  CUstream stream;
  CUdeviceptr p;
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&p, 4096), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.spin(300, stream), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(stream), CUDA_ERROR_NOT_READY);
  ASSERT_EQ(kernels_.fill(p, 1024, 1, stream), CUDA_SUCCESS);
  for (int i = 0; i < 3; i++) ASSERT_EQ(kernels_.increment(p, 1024, stream), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(stream), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(p, 1024), 1, 3), 0u);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamDestroy(stream), CUDA_SUCCESS);
}

TEST_F(Execution, EventOrdersTwoStreamsAndMeasuresTime) {
  CUstream a, b;
  CUevent begin, end;
  CUdeviceptr p;
  ASSERT_EQ(cuStreamCreate(&a, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamCreate(&b, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&begin, CU_EVENT_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuEventCreate(&end, CU_EVENT_DEFAULT), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&p, 4096), CUDA_SUCCESS);
  ASSERT_EQ(cuEventRecord(begin, a), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.spin(1000, a), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.fill(p, 1024, 5, a), CUDA_SUCCESS);
  ASSERT_EQ(cuEventRecord(end, a), CUDA_SUCCESS);
  EXPECT_EQ(cuEventQuery(end), CUDA_ERROR_NOT_READY);
  ASSERT_EQ(cuStreamWaitEvent(b, end, 0), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.increment(p, 1024, b), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(b), CUDA_SUCCESS);
  ASSERT_EQ(cuEventSynchronize(end), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(p, 1024), 5, 1), 0u);
  float ms = 0;
  ASSERT_EQ(cuEventElapsedTime(&ms, begin, end), CUDA_SUCCESS);
  EXPECT_GE(ms, 990);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(begin), CUDA_SUCCESS);
  EXPECT_EQ(cuEventDestroy(end), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamDestroy(a), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamDestroy(b), CUDA_SUCCESS);
}

TEST_F(Execution, CopiesAndSetsOfEveryKind) {
  constexpr uint32_t kCount = 4096;
  CUdeviceptr a, b;
  void* pinned;
  ASSERT_EQ(cuMemAlloc(&a, kCount * 4), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&b, kCount * 4), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAllocHost(&pinned, kCount * 4), CUDA_SUCCESS);
  std::vector<uint32_t> values(kCount);
  for (uint32_t i = 0; i < kCount; i++) values[i] = phos_test::fill_value(31, i);
  ASSERT_EQ(cuMemcpyHtoD(a, values.data(), kCount * 4), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoD(b, a, kCount * 4), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(b, kCount), 31), 0u);
  ASSERT_EQ(cuMemcpyDtoHAsync(pinned, b, kCount * 4, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(memcmp(pinned, values.data(), kCount * 4), 0);
  ASSERT_EQ(cuMemsetD8(b, 0xab, 16), CUDA_SUCCESS);
  ASSERT_EQ(cuMemsetD32(b + 16, 0x12345678, 4), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpy(reinterpret_cast<CUdeviceptr>(pinned), b, 48), CUDA_SUCCESS);
  auto* words = static_cast<uint32_t*>(pinned);
  EXPECT_EQ(words[3], 0xababababu);
  EXPECT_EQ(words[4], 0x12345678u);
  EXPECT_EQ(words[8], values[8]);
  EXPECT_EQ(cuMemFreeHost(pinned), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(a), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(b), CUDA_SUCCESS);
}

TEST_F(Execution, ModuleGlobalIsReadableAndUsedByItsKernel) {
  CUdeviceptr p;
  size_t size = 0;
  ASSERT_EQ(cuModuleGetGlobal(&p, &size, kernels_.module(), "phos_global"), CUDA_SUCCESS);
  EXPECT_EQ(size, 256u);
  EXPECT_EQ(read_back(p, 64), std::vector<uint32_t>(64, 0));
  ASSERT_EQ(kernels_.touch_global(41), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.touch_global(1), CUDA_SUCCESS);
  EXPECT_EQ(read_back(p, 1)[0], 42u);
  CUfunction f;
  EXPECT_EQ(cuModuleGetFunction(&f, kernels_.module(), "no_such_kernel"), CUDA_ERROR_NOT_FOUND);
}

TEST_F(Execution, ContextsAreCurrentPerThreadAndStack) {
  CUcontext other, popped, current;
  ASSERT_EQ(cuCtxCreate(&other, nullptr, 0, device_), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, other);
  CUcontext elsewhere = other;
  std::thread([&] { cuCtxGetCurrent(&elsewhere); }).join();
  EXPECT_EQ(elsewhere, nullptr);
  ASSERT_EQ(cuCtxPopCurrent(&popped), CUDA_SUCCESS);
  EXPECT_EQ(popped, other);
  ASSERT_EQ(cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(current, context_);
  EXPECT_EQ(cuCtxDestroy(other), CUDA_SUCCESS);
  CUdeviceptr p;
  std::thread([&] { EXPECT_EQ(cuMemAlloc(&p, 4096), CUDA_ERROR_INVALID_CONTEXT); }).join();
}

TEST_F(Execution, PrimaryContextKnowsWhetherItIsActive) {
  unsigned flags = 0;
  int active = 0;
  ASSERT_EQ(cuDevicePrimaryCtxGetState(device_, &flags, &active), CUDA_SUCCESS);
  EXPECT_EQ(active, 1);
}

TEST_F(Execution, ErrorsHaveNames) {
  const char* text = nullptr;
  ASSERT_EQ(cuGetErrorName(CUDA_ERROR_NOT_SUPPORTED, &text), CUDA_SUCCESS);
  EXPECT_STREQ(text, "CUDA_ERROR_NOT_SUPPORTED");
  ASSERT_EQ(cuGetErrorString(CUDA_ERROR_OUT_OF_MEMORY, &text), CUDA_SUCCESS);
  EXPECT_STREQ(text, "out of memory");
  EXPECT_EQ(cuGetErrorName(static_cast<CUresult>(12345), &text), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(text, nullptr);
}

TEST_F(Execution, LibraryExportsOldAndNewNames) {
  for (const char* name :
       {"cuMemAlloc", "cuMemAlloc_v2", "cuMemFree", "cuMemFree_v2", "cuCtxCreate", "cuCtxCreate_v2",
        "cuCtxCreate_v4", "cuIpcOpenMemHandle", "cuIpcOpenMemHandle_v2", "cuGetProcAddress",
        "cuGetProcAddress_v2", "cuDeviceTotalMem_v2", "cuCheckpointProcessLock"}) {
    EXPECT_NE(dlsym(RTLD_DEFAULT, name), nullptr) << name;
  }
}

TEST_F(Execution, ProcAddressIsTheNewestVersionAsked) {
  void* f = nullptr;
  CUdriverProcAddressQueryResult status;
  ASSERT_EQ(cuGetProcAddress("cuMemAlloc", &f, 13000, CU_GET_PROC_ADDRESS_DEFAULT, &status),
            CUDA_SUCCESS);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SUCCESS);
  auto* allocate = reinterpret_cast<decltype(&cuMemAlloc)>(f);
  CUdeviceptr p;
  ASSERT_EQ(allocate(&p, 4096), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  cuGetProcAddress("cuNoSuchThing", &f, 13000, CU_GET_PROC_ADDRESS_DEFAULT, &status);
  EXPECT_EQ(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
}

TEST_F(Execution, ProcAddressIsThePerThreadVariantIfAsked) {
  for (auto [name, exported] : {std::pair("cuStreamQuery", "cuStreamQuery_ptsz"),
                                {"cuMemcpyDtoH", "cuMemcpyDtoH_v2_ptds"},
                                {"cuLaunchKernel", "cuLaunchKernel_ptsz"}}) {
    void *legacy = nullptr, *own = nullptr;
    ASSERT_EQ(cuGetProcAddress(name, &legacy, 13000, CU_GET_PROC_ADDRESS_LEGACY_STREAM, nullptr),
              CUDA_SUCCESS);
    ASSERT_EQ(
        cuGetProcAddress(name, &own, 13000, CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM, nullptr),
        CUDA_SUCCESS);
    EXPECT_NE(own, legacy) << name;
    EXPECT_EQ(own, dlsym(RTLD_DEFAULT, exported)) << name;
  }
}

TEST_F(Execution, DriverSpeaksCuda13) {
  int version = 0;
  ASSERT_EQ(cuDriverGetVersion(&version), CUDA_SUCCESS);
  EXPECT_GE(version, 13000);
}

}  // namespace
}  // namespace contract
