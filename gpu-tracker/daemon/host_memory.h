// SPDX-License-Identifier: GPL-2.0-only
// Finds host memory that a CUDA process made with cuMemCreate (CU_MEM_LOCATION_TYPE_HOST*), its own
// or imported. NCCL's shared-memory transport does so. Driver 580 checkpoints such a process
// without complaint and then cannot restore it (error 999), even if the memory is the process's
// own.
#pragma once

#include <cstdint>

#include "gpu-tracker/base/result.h"

namespace phos {

// Bytes of such memory in process `pid`. Asks libcuda in the process itself, on its restore thread,
// which must be idle; no other thread is stopped. Takes well under a millisecond when there is
// nothing to ask about.
Result<uint64_t> find_virtual_host_memory(int pid, int restore_tid);

}  // namespace phos
