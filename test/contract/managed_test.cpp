// SPDX-License-Identifier: GPL-2.0-only
// What saving managed memory, freeing it and having it again relies on
// (gpu-tracker/agent/managed.c, refill.c, policy.c, faults.c).
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <set>

#include "gpu-tracker/gate/stopped_process.h"
#include "test/contract/fixture.h"

namespace contract {
namespace {

// In which libcuda has addresses from the kernel.
constexpr uint64_t kRegion = 32 * kMiB;

class Managed : public CudaTest {
 protected:
  static CUdeviceptr allocate(uint64_t size) {
    CUdeviceptr p = 0;
    EXPECT_EQ(cuMemAllocManaged(&p, size, CU_MEM_ATTACH_GLOBAL), CUDA_SUCCESS);
    return p;
  }
  static int ask(CUmem_range_attribute name, CUdeviceptr p, uint64_t size) {
    int value = -99;
    EXPECT_EQ(cuMemRangeGetAttribute(&value, sizeof value, name, p, size), CUDA_SUCCESS) << name;
    return value;
  }
  CUmemLocation gpu() const { return {CU_MEM_LOCATION_TYPE_DEVICE, {device_}}; }
  static CUmemLocation cpu() { return {CU_MEM_LOCATION_TYPE_HOST, {0}}; }
};

TEST_F(Managed, BothSidesMayUseItAtOnce) {
  int concurrent = 0;
  ASSERT_EQ(
      cuDeviceGetAttribute(&concurrent, CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, device_),
      CUDA_SUCCESS);
  EXPECT_EQ(concurrent, 1);
}

TEST_F(Managed, ItsContextIsTold) {
  const CUdeviceptr p = allocate(4 * kMiB);
  CUcontext owner = nullptr, current = nullptr;
  ASSERT_EQ(cuPointerGetAttribute(&owner, CU_POINTER_ATTRIBUTE_CONTEXT, p), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxGetCurrent(&current), CUDA_SUCCESS);
  EXPECT_EQ(owner, current);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(Managed, SmallOnesShareABlock) {
  std::vector<CUdeviceptr> p;
  for (const uint64_t size : {4ul, 4096ul, 65537ul, 4ul}) p.push_back(allocate(size));
  EXPECT_EQ(p[0] % kRegion, 0u);
  EXPECT_EQ(p[1], p[0] + 512);
  EXPECT_EQ(p[2], p[1] + 4096);
  EXPECT_EQ(p[3], p[2] + 66048);
  // The smallest piece that is large enough.
  EXPECT_EQ(cuMemFree(p[1]), CUDA_SUCCESS);
  p[1] = allocate(700);
  EXPECT_EQ(p[1], p[0] + 512);
  p.push_back(allocate(2 * kMiB - 1));
  EXPECT_EQ(p.back(), p[0] + 2 * kMiB);
  for (const CUdeviceptr at : p) EXPECT_EQ(cuMemFree(at), CUDA_SUCCESS);
}

TEST_F(Managed, LargeOnesHaveBlocksOfTheirOwn) {
  std::vector<CUdeviceptr> p;
  for (const uint64_t size : {4 * kMiB, 2 * kMiB, 2 * kMiB + 4, 3 * kMiB}) {
    p.push_back(allocate(size));
  }
  EXPECT_EQ(p[0] % kRegion, 0u);
  EXPECT_EQ(p[1], p[0] + 4 * kMiB);
  EXPECT_EQ(p[2], p[1] + 2 * kMiB);
  EXPECT_EQ(p[3], p[2] + 4 * kMiB);
  const CUdeviceptr small = allocate(4);
  EXPECT_EQ(small, p[3] + 4 * kMiB);
  EXPECT_EQ(cuMemFree(small), CUDA_SUCCESS);
  for (const CUdeviceptr at : p) EXPECT_EQ(cuMemFree(at), CUDA_SUCCESS);
}

TEST_F(Managed, NewMemoryHoldsZeros) {
  for (int i = 0; i < 2; i++) {
    const CUdeviceptr p = allocate(4 * kMiB);
    const auto values = read_back(p, kMiB);
    EXPECT_TRUE(std::all_of(values.begin(), values.end(), [](uint32_t v) { return v == 0; }));
    ASSERT_EQ(kernels_.fill(p, kMiB, 3), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
    EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  }
}

TEST_F(Managed, AdviceIsToldOfEachPart) {
  const CUdeviceptr p = allocate(8 * kMiB);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_READ_MOSTLY, p, 8 * kMiB), 0);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE, p, 8 * kMiB),
            CU_MEM_LOCATION_TYPE_INVALID);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_ACCESSED_BY, p, 8 * kMiB), CU_DEVICE_INVALID);
  ASSERT_EQ(cuMemAdvise(p, 2 * kMiB, CU_MEM_ADVISE_SET_READ_MOSTLY, gpu()), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAdvise(p + 2 * kMiB, 2 * kMiB, CU_MEM_ADVISE_SET_PREFERRED_LOCATION, gpu()),
            CUDA_SUCCESS);
  ASSERT_EQ(cuMemAdvise(p + 4 * kMiB, 2 * kMiB, CU_MEM_ADVISE_SET_PREFERRED_LOCATION, cpu()),
            CUDA_SUCCESS);
  ASSERT_EQ(cuMemAdvise(p + 4 * kMiB, 4 * kMiB, CU_MEM_ADVISE_SET_ACCESSED_BY, gpu()),
            CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_READ_MOSTLY, p, 2 * kMiB), 1);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_READ_MOSTLY, p, 4 * kMiB), 0);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE, p + 2 * kMiB, 2 * kMiB),
            CU_MEM_LOCATION_TYPE_DEVICE);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_ID, p + 2 * kMiB, 2 * kMiB), device_);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE, p + 4 * kMiB, 2 * kMiB),
            CU_MEM_LOCATION_TYPE_HOST);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE, p, 8 * kMiB),
            CU_MEM_LOCATION_TYPE_INVALID);
  int accessed_by[4] = {};
  ASSERT_EQ(cuMemRangeGetAttribute(accessed_by, sizeof accessed_by,
                                   CU_MEM_RANGE_ATTRIBUTE_ACCESSED_BY, p + 4 * kMiB, 4 * kMiB),
            CUDA_SUCCESS);
  EXPECT_EQ(accessed_by[0], device_);
  EXPECT_EQ(accessed_by[1], CU_DEVICE_INVALID);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

TEST_F(Managed, WhereItWasPrefetchedToIsTold) {
  const CUdeviceptr p = allocate(4 * kMiB);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION_TYPE, p, 4 * kMiB),
            CU_MEM_LOCATION_TYPE_INVALID);
  ASSERT_EQ(cuMemPrefetchAsync(p, 4 * kMiB, gpu(), 0, nullptr), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION_TYPE, p, 4 * kMiB),
            CU_MEM_LOCATION_TYPE_DEVICE);
  EXPECT_EQ(ask(CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION_ID, p, 4 * kMiB), device_);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
}

// The window: memory of a file, mapped by two processes.
TEST_F(Managed, GoesToAndFromRegisteredSharedMemory) {
  constexpr size_t kSize = 2 * kMiB;
  const int fd = memfd_create("window", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, kSize), 0);
  void* window = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(window, MAP_FAILED);
  EXPECT_EQ(cuMemHostRegister(window, kSize, 0), CUDA_SUCCESS);
  const CUdeviceptr from = allocate(kSize), to = allocate(kSize);
  CUstream stream = nullptr;
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(kernels_.fill(from, kSize / 4, 5), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(window, from, kSize, stream), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyHtoDAsync(to, window, kSize, stream), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(count_wrong(read_back(to, kSize / 4), 5), 0u);
  EXPECT_EQ(cuStreamDestroy(stream), CUDA_SUCCESS);
  EXPECT_EQ(cuMemHostUnregister(window), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(from), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(to), CUDA_SUCCESS);
  munmap(window, kSize);
  close(fd);
}

TEST_F(Managed, CanBeReadByTheGpuAndFreedWhileItIsReadOnly) {
  constexpr size_t kSize = 4 * kMiB;
  for (const CUmemLocation& place : {gpu(), cpu()}) {
    const CUdeviceptr p = allocate(kSize);
    ASSERT_EQ(kernels_.fill(p, kSize / 4, 6), CUDA_SUCCESS);
    ASSERT_EQ(cuMemPrefetchAsync(p, kSize, place, 0, nullptr), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
    ASSERT_EQ(mprotect(reinterpret_cast<void*>(p), kSize, PROT_READ), 0);
    EXPECT_EQ(count_wrong(read_back(p, kSize / 4), 6), 0u);
    // And be used again.
    ASSERT_EQ(mprotect(reinterpret_cast<void*>(p), kSize, PROT_READ | PROT_WRITE), 0);
    ASSERT_EQ(kernels_.fill(p, kSize / 4, 7), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSynchronize(), CUDA_SUCCESS);
    EXPECT_EQ(count_wrong(read_back(p, kSize / 4), 7), 0u);
    *reinterpret_cast<volatile uint32_t*>(p) = 1;
    ASSERT_EQ(mprotect(reinterpret_cast<void*>(p), kSize, PROT_READ), 0);
    EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  }
}

// Nothing else gets into a region of managed memory.
TEST_F(Managed, HasRegionsOfItsOwn) {
  const CUdeviceptr p = allocate(34 * kMiB), next = allocate(20 * kMiB);
  EXPECT_EQ(p % kRegion, 0u);
  EXPECT_EQ(next, p + 34 * kMiB);
  ASSERT_EQ(cuMemFree(p), CUDA_SUCCESS);
  CUdeviceptr at = 0, device = 0;
  ASSERT_EQ(cuMemAddressReserve(&at, 30 * kMiB, 0, p, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&device, 3 * kMiB), CUDA_SUCCESS);
  EXPECT_TRUE(at + 30 * kMiB <= p || at >= p + 2 * kRegion) << std::hex << at << " " << p;
  EXPECT_TRUE(device + 4 * kMiB <= p || device >= p + 2 * kRegion) << std::hex << device;
  EXPECT_EQ(cuMemAddressFree(at, 30 * kMiB), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(device), CUDA_SUCCESS);
  // Managed memory does.
  EXPECT_EQ(allocate(20 * kMiB), p);
  EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  EXPECT_EQ(cuMemFree(next), CUDA_SUCCESS);
}

TEST_F(Managed, EmptyRegionGoesBackToTheKernel) {
  for (const uint64_t size : {64 * kMiB, 200 * kMiB}) {
    const CUdeviceptr p = allocate(size);
    ASSERT_EQ(cuMemFree(p), CUDA_SUCCESS);
    EXPECT_EQ(msync(reinterpret_cast<void*>(p), kRegion, MS_ASYNC), -1);
    EXPECT_EQ(errno, ENOMEM);
    CUdeviceptr at = 0;
    ASSERT_EQ(cuMemAddressReserve(&at, size, 0, p, 0), CUDA_SUCCESS);
    EXPECT_EQ(at, p) << size;
    const CUdeviceptr elsewhere = allocate(size);
    EXPECT_NE(elsewhere, p);
    EXPECT_EQ(cuMemAddressFree(at, size), CUDA_SUCCESS);
    EXPECT_EQ(cuMemFree(elsewhere), CUDA_SUCCESS);
  }
}

TEST_F(Managed, ProcessWithoutItAnyMoreIsCheckpointed) {
  Worker worker;
  const std::string p = value_of(worker.ask("managed 4194304"));
  ASSERT_EQ(worker.ask("fill " + p + " 1024 3"), "ok");
  ASSERT_EQ(worker.ask("free " + p), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  const std::string again = value_of(worker.ask("managed 4194304"));
  EXPECT_EQ(worker.ask("fill " + again + " 1024 4"), "ok");
  EXPECT_EQ(worker.ask("check " + again + " 1024 4 0"), "ok 0");
}

// As when CRIU has frozen the process, but for the agent and the restore thread.
TEST_F(Managed, IsReadFreedAndHadAgainWhileOtherThreadsAreStopped) {
  Worker worker;
  const std::string p = value_of(worker.ask("managed 4194304"));
  ASSERT_EQ(worker.ask("fill " + p + " 1048576 3"), "ok");
  int restore_tid = 0;
  ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(worker.pid(), &restore_tid), CUDA_SUCCESS);
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  auto stopped = phos::StoppedProcess::stop(worker.pid(), {worker.pid(), restore_tid},
                                            std::chrono::milliseconds(5000));
  ASSERT_TRUE(stopped) << stopped.error().message();
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("check " + p + " 1048576 3 0"), "ok 0");
  EXPECT_EQ(worker.ask("free " + p), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  const std::string again = value_of(worker.ask("managed 4194304"));
  EXPECT_EQ(worker.ask("fill " + again + " 1048576 4"), "ok");
  EXPECT_EQ(worker.ask("check " + again + " 1048576 4 0"), "ok 0");
  EXPECT_EQ(worker.ask("free " + again), "ok");
}

// The process that is not to be stopped after all is unharmed.
TEST_F(Managed, ProcessOfWhichAThreadCannotBeStoppedGoesOn) {
  Worker worker;
  std::set<int> threads;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/" + std::to_string(worker.pid()) + "/task")) {
    threads.insert(std::stoi(entry.path().filename()));
  }
  ASSERT_GE(threads.size(), 2u);
  const int last = *threads.rbegin();
  ASSERT_EQ(ptrace(PTRACE_SEIZE, last, nullptr, nullptr), 0) << strerror(errno);
  auto stopped = phos::StoppedProcess::stop(worker.pid(), {}, std::chrono::milliseconds(1000));
  ASSERT_FALSE(stopped);
  EXPECT_EQ(stopped.error().code(), EPERM) << stopped.error().message();
  ASSERT_EQ(ptrace(PTRACE_INTERRUPT, last, nullptr, nullptr), 0);
  ASSERT_EQ(waitpid(last, nullptr, __WALL), last);
  ASSERT_EQ(ptrace(PTRACE_DETACH, last, nullptr, nullptr), 0);
  const std::string p = value_of(worker.ask("managed 4194304"));
  EXPECT_EQ(worker.ask("fill " + p + " 1024 4"), "ok");
  EXPECT_EQ(worker.ask("free " + p), "ok");
}

}  // namespace
}  // namespace contract
