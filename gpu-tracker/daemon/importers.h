// SPDX-License-Identifier: GPL-2.0-only
// Who else uses a process's memory: it must not be released, or the two would go on with different
// memory.
#pragma once

#include <optional>
#include <vector>

#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// A process of this machine, none of `owners` and no phosd, that has imported memory on a GPU on
// which one of `owners` has some. Whose memory it is the kernel driver does not tell. Nothing:
// there is none, as far as can be seen. Takes a look at every thread of the machine.
std::optional<int> find_importer(GpuDriver& driver, const std::vector<int>& owners);

}  // namespace phos
