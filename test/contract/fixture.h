// SPDX-License-Identifier: GPL-2.0-only
// Fixtures: CUDA in the test process itself, and CUDA in workers only.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>

#include "test/contract/cuda_helpers.h"
#include "test/contract/worker.h"

namespace contract {

// Device 0's primary context is current, the test kernels are loaded.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (CUresult r = cuInit(0)) {
      if (getenv("REQUIRE_GPU")) FAIL() << "cuInit says " << r;
      GTEST_SKIP() << "no CUDA device here: cuInit says " << r;
    }
    ASSERT_EQ(cuDeviceGet(&device_, 0), CUDA_SUCCESS);
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context_, device_), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    ASSERT_EQ(kernels_.load(), CUDA_SUCCESS);
  }
  void TearDown() override {
    if (!context_) return;
    cuModuleUnload(kernels_.module());
    cuCtxSetCurrent(nullptr);
    cuDevicePrimaryCtxRelease(device_);
  }

  std::vector<uint32_t> read_back(CUdeviceptr p, uint32_t n) {
    std::vector<uint32_t> values(n);
    EXPECT_EQ(cuMemcpyDtoH(values.data(), p, uint64_t{n} * 4), CUDA_SUCCESS);
    return values;
  }

  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  Kernels kernels_;
};

// CUDA in workers; this process only calls cuCheckpointProcess*.
class WorkerTest : public testing::Test {
 protected:
  void SetUp() override {
    Worker probe;
    if (probe.ask("ping") == "ok") return;
    if (getenv("REQUIRE_GPU")) FAIL() << "a worker cannot start CUDA";
    GTEST_SKIP() << "no CUDA device here";
  }
};

inline int state_of(pid_t pid) {
  CUprocessState state = static_cast<CUprocessState>(-1);
  EXPECT_EQ(cuCheckpointProcessGetState(pid, &state), CUDA_SUCCESS);
  return state;
}

inline CUresult lock(pid_t pid, unsigned timeout_ms = 0) {
  CUcheckpointLockArgs args = {};
  args.timeoutMs = timeout_ms;
  return cuCheckpointProcessLock(pid, &args);
}
inline CUresult checkpoint(pid_t pid) {
  return cuCheckpointProcessCheckpoint(pid, nullptr);
}
inline CUresult restore(pid_t pid) {
  return cuCheckpointProcessRestore(pid, nullptr);
}
inline CUresult unlock(pid_t pid) {
  return cuCheckpointProcessUnlock(pid, nullptr);
}

// "ok VALUE" -> "VALUE"
inline std::string value_of(const std::string& reply) {
  EXPECT_EQ(reply.substr(0, 3), "ok ") << reply;
  return reply.size() > 3 ? reply.substr(3) : "";
}

}  // namespace contract
