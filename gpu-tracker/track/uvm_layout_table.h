// SPDX-License-Identifier: GPL-2.0-only
// Where the fields of nvidia-uvm's structures lie, by the driver's version: for an nvidia-uvm that
// carries no BTF. They hold for kernels whose struct mutex has the size that each layout names,
// which phos.ko checks, and for builds without NVIDIA's own debugging, which uvm_proof.h finds out.
#pragma once

#include <string_view>

#include "gpu-tracker/abi/kmod.h"

namespace phos {

// `version` as /sys/module/nvidia_uvm/version has it; nullptr: not known.
const phos_kmod_layout* find_uvm_layout(std::string_view version);

}  // namespace phos
