// SPDX-License-Identifier: GPL-2.0-only
// Is the nvidia-uvm that is loaded one that the write tracker knows? Asked of its BTF.
#pragma once

#include "gpu-tracker/abi/kmod.h"
#include "gpu-tracker/base/result.h"

namespace phos {

// Both fail with ENOTSUP: nvidia-uvm is not loaded, carries no BTF, or its functions take other
// arguments than the tracker reads.
Result<void> check_uvm_layout();
// The same, and where the fields lie that phos.ko reads.
Result<phos_kmod_layout> uvm_layout();

}  // namespace phos
