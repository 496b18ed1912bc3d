// SPDX-License-Identifier: GPL-2.0-only
// GpuDriver over libcuda, opened with dlopen so that phos runs where no NVIDIA driver is installed.
#pragma once

#include <memory>
#include <string>

#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// Opens `path` (a file name for the dynamic linker's search, or a path). Fails with a message that
// names the driver version needed when the library is missing or lacks the checkpoint API.
// The library stays loaded for the life of the process.
Result<std::unique_ptr<GpuDriver>> open_cuda_driver(const std::string& path = "libcuda.so.1");

}  // namespace phos
