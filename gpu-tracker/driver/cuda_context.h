// SPDX-License-Identifier: GPL-2.0-only
// GpuContext over libcuda; private to this room.
#pragma once

#include <memory>

#include "gpu-tracker/driver/cuda_entry_points.h"
#include "gpu-tracker/driver/gpu_context.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// The device's primary context: a context made by cuCtxCreate costs as much device memory, and
// would cost it again for each one who opens the same GPU.
Result<std::unique_ptr<GpuContext>> open_cuda_context(const CudaEntryPoints& cu,
                                                      const GpuUuid& uuid);

}  // namespace phos
