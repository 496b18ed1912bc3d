// SPDX-License-Identifier: GPL-2.0-only
// GpuDriver: the seam over NVIDIA's driver library. One real implementation (cuda_driver.h, libcuda
// opened with dlopen; the simulated libcuda.so.1 of test/sim goes through the same code) and one
// fault-injecting wrapper (fault_driver.h). Nothing outside this room includes cuda.h.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/driver/gpu_context.h"
#include "gpu-tracker/driver/rm_client.h"

namespace phos {

// "GPU-155e866b-9144-3f4c-ec25-f1c3d492b8c2", as nvidia-smi prints it.
std::string format_gpu_uuid(const GpuUuid& uuid);

struct GpuInfo {
  GpuUuid uuid{};
  std::string name;          // as cuDeviceGetName says
  uint64_t total_bytes = 0;  // device memory
};

// CUprocessState (cuda.h, CUDA 12.8+).
enum class CudaState { kRunning = 0, kLocked = 1, kCheckpointed = 2, kFailed = 3 };
const char* to_string(CudaState state);

struct GpuPair {
  GpuUuid from;  // the GPU that was checkpointed
  GpuUuid to;    // the GPU to restore onto
};

// Codes of Domain::kCuda that callers tell apart; the numbers are CUresult's.
inline constexpr int kCudaErrorOutOfMemory = 2;
inline constexpr int kCudaErrorNotInitialized = 3;     // pid has no CUDA (no restore thread)
inline constexpr int kCudaErrorOperatingSystem = 304;  // no such pid, or no permission
inline constexpr int kCudaErrorIllegalState = 401;
inline constexpr int kCudaErrorNotReady = 600;  // lock: timed out
inline constexpr int kCudaErrorNotSupported = 801;

// All calls may be made from any thread of any sufficiently privileged process and need no CUDA
// context (measured on driver 580: not even cuInit). A call that talks to a process blocks until
// that process's restore thread answers; a stopped process (SIGSTOP, ptrace, frozen cgroup)
// answers only once it runs again.
class GpuDriver {
 public:
  virtual ~GpuDriver() = default;

  // cuDriverGetVersion: 13000 for CUDA 13.0.
  virtual Result<int> api_version() = 0;
  // The kernel driver's release ("580.159.04"), or "simulated".
  virtual Result<std::string> release() = 0;
  // GPUs this process sees. Initialises the driver library (tens of milliseconds a GPU).
  virtual Result<std::vector<GpuInfo>> gpus() = 0;

  // phosd's own context on that GPU; initialises the driver library. The default is a refusal, for
  // drivers that know processes only (of tests).
  virtual Result<std::unique_ptr<GpuContext>> open_context(const GpuUuid& uuid);

  // Device memory `pid` owns and has imported, as the kernel driver accounts it.
  virtual Result<ProcessMemory> process_memory(int pid) = 0;
  // Bytes of that GPU that nobody has. Needs no context, which would itself take some. The default
  // is a refusal, as above.
  virtual Result<uint64_t> free_memory(const GpuUuid& uuid);

  // Thread of `pid` that serves the calls below. Error kCudaErrorNotInitialized: not a CUDA
  // process.
  virtual Result<int> restore_thread_id(int pid) = 0;
  virtual Result<CudaState> state(int pid) = 0;
  // Waits for submitted work and calls in progress, then blocks new calls. timeout_ms 0: no limit.
  virtual Result<void> lock(int pid, unsigned timeout_ms) = 0;
  // Moves device memory into the process's host memory and lets go of the device. Needs kLocked.
  virtual Result<void> checkpoint(int pid) = 0;
  // The reverse. `pairs` empty: same GPUs; otherwise it must list every GPU. Leaves kLocked.
  // kCudaErrorOutOfMemory: the process stays checkpointed, and driver 580 has lost it: every later
  // call answers kCudaErrorOperatingSystem, whatever is free by then (test/contract). So ask
  // free_memory() before.
  virtual Result<void> restore(int pid, const std::vector<GpuPair>& pairs) = 0;
  virtual Result<void> unlock(int pid) = 0;
};

}  // namespace phos
