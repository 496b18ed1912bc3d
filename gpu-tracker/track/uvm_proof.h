// SPDX-License-Identifier: GPL-2.0-only
// Does phos.ko, by this layout, read the nvidia-uvm that is loaded right? Found out in a process of
// phos's own.
#pragma once

#include "gpu-tracker/abi/kmod.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/track/uvm_layout.h"

namespace phos {

// Forks a process that makes managed ranges in an address space of its own, writes to pages of one,
// has a debugger write to others, and ends them. phos.ko's record must be exactly that, step by
// step. Takes a fraction of a second. ENOTSUP: it is not, or nvidia-uvm does not let that be done;
// the error says which step. A layout that is wrong harms nothing: phos.ko counts what it cannot
// read.
Result<void> prove_uvm_layout(const phos_kmod_layout& layout);

// The same of a layout from the table, at most once for each time nvidia-uvm is loaded.
// Thread-safe.
Result<void> prove_uvm_layout_once(const UvmLayout& layout);

}  // namespace phos
