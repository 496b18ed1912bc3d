// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/driver/cuda_driver.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>

#include "gpu-tracker/driver/cuda_context.h"
#include "gpu-tracker/driver/cuda_entry_points.h"

namespace phos {
namespace {

Error missing_entry_point(const std::string& path, const char* name, int since) {
  if (since == 0) {
    return Error(Domain::kUsage, ENOSYS, path + " has no " + name + ": it is not NVIDIA's libcuda");
  }
  return Error(Domain::kUsage, ENOSYS,
               "NVIDIA's driver is too old: its " + path + " has no " + name +
                   ", which came with release " + std::to_string(since) + "; install driver 570 " +
                   "(CUDA 12.8) or newer");
}

// gpuPairs appeared in CUDA 13.0 (driver 580).
constexpr int kFirstApiWithGpuPairs = 13000;

class CudaDriver final : public GpuDriver {
 public:
  // The simulated driver's stand-in for rm_client.h; null on a real driver.
  struct Simulated {
    int (*memory)(int pid, uint64_t* own, uint64_t* imported);
    int (*memory_on)(int pid, const uint8_t* uuid, uint64_t* own);
    int (*free)(const uint8_t* uuid, uint64_t* bytes);
  };

  CudaDriver(const CudaEntryPoints& cu, const Simulated& simulated)
      : cu_(cu), simulated_(simulated) {}

  Result<int> api_version() override {
    int version = 0;
    if (CUresult r = cu_.cuDriverGetVersion(&version)) return error("cuDriverGetVersion", 0, r);
    return version;
  }

  Result<std::string> release() override {
    if (simulated_.memory) return std::string("simulated");
    // "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build ..."
    FILE* f = fopen("/proc/driver/nvidia/version", "re");
    if (!f) {
      return Error(Domain::kUsage, ENOENT,
                   "no NVIDIA kernel driver is loaded (/proc/driver/nvidia/version is missing)");
    }
    char line[512] = "";
    const char* got = fgets(line, sizeof line, f);
    fclose(f);
    char* rest = nullptr;
    for (char* word = got ? strtok_r(line, " \t\n", &rest) : nullptr; word;
         word = strtok_r(nullptr, " \t\n", &rest)) {
      int major = 0, minor = 0;
      if (sscanf(word, "%d.%d", &major, &minor) == 2) return std::string(word);
    }
    return Error(Domain::kFormat, EINVAL, "/proc/driver/nvidia/version: no release number in it");
  }

  Result<std::vector<GpuInfo>> gpus() override {
    if (CUresult r = cu_.cuInit(0)) return error("cuInit", 0, r);
    int count = 0;
    if (CUresult r = cu_.cuDeviceGetCount(&count)) return error("cuDeviceGetCount", 0, r);
    std::vector<GpuInfo> gpus;
    for (int i = 0; i < count; i++) {
      CUdevice device;
      CUuuid uuid;
      char name[256] = "";
      size_t bytes = 0;
      CUresult r = cu_.cuDeviceGet(&device, i);
      if (!r) r = cu_.cuDeviceGetName(name, sizeof name, device);
      if (!r) r = cu_.cuDeviceGetUuid_v2(&uuid, device);
      if (!r) r = cu_.cuDeviceTotalMem_v2(&bytes, device);
      if (r) return error("asking GPU " + std::to_string(i) + " for its name", 0, r);
      GpuInfo info;
      static_assert(sizeof uuid.bytes == sizeof(GpuUuid));
      memcpy(info.uuid.data(), uuid.bytes, info.uuid.size());
      info.name = name;
      info.total_bytes = bytes;
      gpus.push_back(std::move(info));
    }
    return gpus;
  }

  Result<std::unique_ptr<GpuContext>> open_context(const GpuUuid& uuid) override {
    return open_cuda_context(cu_, uuid);
  }

  Result<ProcessMemory> process_memory(int pid) override {
    if (!simulated_.memory) return query_process_memory(pid);
    ProcessMemory memory;
    int r = simulated_.memory(pid, &memory.own, &memory.imported);
    if (r) return error("phos_sim_memory", pid, static_cast<CUresult>(r));
    auto all = gpus();
    if (!all) return all.error();
    for (const GpuInfo& gpu : *all) {
      r = simulated_.memory_on(pid, gpu.uuid.data(), &memory.own_on[gpu.uuid]);
      if (r) return error("phos_sim_memory_on", pid, static_cast<CUresult>(r));
    }
    return memory;
  }

  Result<uint64_t> free_memory(const GpuUuid& uuid) override {
    if (!simulated_.free) return query_free_memory(uuid);
    uint64_t bytes = 0;
    if (int r = simulated_.free(uuid.data(), &bytes)) {
      return error("phos_sim_free", 0, static_cast<CUresult>(r));
    }
    return bytes;
  }

  Result<int> restore_thread_id(int pid) override {
    int tid = -1;
    CUresult r = cu_.cuCheckpointProcessGetRestoreThreadId(pid, &tid);
    if (r) return error("cuCheckpointProcessGetRestoreThreadId", pid, r);
    return tid;
  }

  Result<CudaState> state(int pid) override {
    CUprocessState s = CU_PROCESS_STATE_RUNNING;
    CUresult r = cu_.cuCheckpointProcessGetState(pid, &s);
    if (r) return error("cuCheckpointProcessGetState", pid, r);
    switch (s) {
      case CU_PROCESS_STATE_RUNNING:
        return CudaState::kRunning;
      case CU_PROCESS_STATE_LOCKED:
        return CudaState::kLocked;
      case CU_PROCESS_STATE_CHECKPOINTED:
        return CudaState::kCheckpointed;
      case CU_PROCESS_STATE_FAILED:
        return CudaState::kFailed;
      default:  // newer drivers have more (13.1: checkpointing, restoring)
        break;
    }
    return Error(Domain::kCuda, CUDA_ERROR_UNKNOWN,
                 "process " + std::to_string(pid) + " is in CUDA state " + std::to_string(s) +
                     ", which this version of phos does not know");
  }

  Result<void> lock(int pid, unsigned timeout_ms) override {
    CUcheckpointLockArgs args = {};
    args.timeoutMs = timeout_ms;
    return done("cuCheckpointProcessLock", pid, cu_.cuCheckpointProcessLock(pid, &args));
  }

  Result<void> checkpoint(int pid) override {
    return done("cuCheckpointProcessCheckpoint", pid,
                cu_.cuCheckpointProcessCheckpoint(pid, nullptr));
  }

  Result<void> restore(int pid, const std::vector<GpuPair>& pairs) override {
    std::vector<CUcheckpointGpuPair> cu_pairs(pairs.size());
    for (size_t i = 0; i < pairs.size(); i++) {
      memcpy(cu_pairs[i].oldUuid.bytes, pairs[i].from.data(), pairs[i].from.size());
      memcpy(cu_pairs[i].newUuid.bytes, pairs[i].to.data(), pairs[i].to.size());
    }
    CUcheckpointRestoreArgs args = {};
    args.gpuPairs = cu_pairs.data();
    args.gpuPairsCount = static_cast<unsigned>(cu_pairs.size());
    if (!pairs.empty()) {
      auto version = api_version();
      if (!version) return version.error();
      if (*version < kFirstApiWithGpuPairs) {
        return Error(Domain::kCuda, kCudaErrorNotSupported,
                     "restoring onto other GPUs needs NVIDIA driver 580 (CUDA 13.0) or newer; this "
                     "machine's driver speaks CUDA " +
                         std::to_string(*version / 1000) + "." +
                         std::to_string(*version % 1000 / 10));
      }
    }
    return done("cuCheckpointProcessRestore", pid,
                cu_.cuCheckpointProcessRestore(pid, pairs.empty() ? nullptr : &args));
  }

  Result<void> unlock(int pid) override {
    return done("cuCheckpointProcessUnlock", pid, cu_.cuCheckpointProcessUnlock(pid, nullptr));
  }

 private:
  // pid 0: the call concerns no process.
  Error error(const std::string& call, int pid, CUresult r) const {
    return cu_.error(call + (pid ? " on process " + std::to_string(pid) : ""), r);
  }

  Result<void> done(const char* call, int pid, CUresult r) const {
    if (r) return error(call, pid, r);
    return {};
  }

  const CudaEntryPoints cu_;
  const Simulated simulated_;
};

}  // namespace

Result<std::unique_ptr<GpuDriver>> open_cuda_driver(const std::string& path) {
  void* lib = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!lib) {
    return Error(Domain::kUsage, ENOENT,
                 std::string("NVIDIA's driver library cannot be opened (") + dlerror() +
                     "); install NVIDIA driver 570 or newer");
  }
  CudaEntryPoints cu;
#define X(name, since)                                              \
  cu.name = reinterpret_cast<decltype(cu.name)>(dlsym(lib, #name)); \
  if (!cu.name) return missing_entry_point(path, #name, since);
  PHOS_CUDA_ENTRY_POINTS(X)
#undef X
  CudaDriver::Simulated sim;
  sim.memory = reinterpret_cast<decltype(sim.memory)>(dlsym(lib, "phos_sim_memory"));
  sim.memory_on = reinterpret_cast<decltype(sim.memory_on)>(dlsym(lib, "phos_sim_memory_on"));
  sim.free = reinterpret_cast<decltype(sim.free)>(dlsym(lib, "phos_sim_free"));
  return std::unique_ptr<GpuDriver>(std::make_unique<CudaDriver>(cu, sim));
}

}  // namespace phos
