// SPDX-License-Identifier: GPL-2.0-only
// A GpuContext whose calls fail by a FaultDriver's plan.
#pragma once

#include <memory>

#include "gpu-tracker/driver/fault_driver.h"
#include "gpu-tracker/driver/gpu_context.h"

namespace phos {

// `plan` outlives the context.
std::unique_ptr<GpuContext> make_fault_context(std::unique_ptr<GpuContext> context,
                                               FaultPlan& plan);

}  // namespace phos
