// SPDX-License-Identifier: GPL-2.0-only
// Who may use a process's GPU memory from outside of the GPU: network cards (RDMA, by
// nvidia-peermem or a dma-buf), disks (GPUDirect Storage) and the CPU (GDRCopy). They address pages
// that the kernel driver has pinned for them, neither libcuda nor its lock knows of them, and what
// they have registered does not survive that the memory is freed.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

// The first of these processes that has one of the files open, or mapped, by which memory is
// registered, in words; nothing: none has. Those that have ended are left out. What is not open
// cannot be in use; what is open may be, and need not. `devices`: /proc/devices, or a test's own.
// An error: it cannot be told.
Result<std::optional<std::string>> find_outside_user(const std::vector<int>& pids,
                                                     const std::string& devices = "/proc/devices");

}  // namespace phos
