// SPDX-License-Identifier: GPL-2.0-only
// Read-only questions to NVIDIA's kernel driver (the resource manager, RM): how much device memory
// a process owns, how much of another process's memory it has imported, and how much nobody has.
//
// libcuda offers no such view from outside a process, and the driver's checkpoint needs it: a
// process that holds imported memory checkpoints "successfully" and can never be restored.
#pragma once

#include <array>
#include <cstdint>
#include <map>

#include "gpu-tracker/base/result.h"

namespace phos {

using GpuUuid = std::array<uint8_t, 16>;

// Device memory of one process, summed over all GPUs. Bytes.
struct ProcessMemory {
  uint64_t own = 0;       // allocated by the process, shared with others or not
  uint64_t imported = 0;  // allocated by another process (CUDA IPC or a file descriptor)
  std::map<GpuUuid, uint64_t> own_on;  // `own`, GPU by GPU; empty: not known
};

// Asks RM through /dev/nvidiactl (open-gpu-kernel-modules: subdeviceCtrlCmdGpuGetPidInfo_IMPL,
// available to unprivileged clients). `pid` is taken in the caller's pid namespace. Fails where
// the device nodes are missing or the driver's ABI is not the one this code knows.
// Does not see host memory, nor an import whose exporter has already freed the memory.
Result<ProcessMemory> query_process_memory(int pid);

// Bytes of that GPU that nobody has, as nvidia-smi shows it. Asked in the same way.
Result<uint64_t> query_free_memory(const GpuUuid& gpu);

}  // namespace phos
