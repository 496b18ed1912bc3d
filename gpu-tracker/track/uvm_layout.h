// SPDX-License-Identifier: GPL-2.0-only
// Is the nvidia-uvm that is loaded one that the write trackers know? Asked of its BTF; without BTF,
// of a table by its version.
#pragma once

#include <string>

#include "gpu-tracker/abi/kmod.h"
#include "gpu-tracker/base/result.h"

namespace phos {

// By BTF. ENOTSUP: nvidia-uvm is not loaded, carries none, or its functions take other arguments
// than the trackers read.
Result<void> check_uvm_layout();
// The same, and where the fields lie that phos.ko reads.
Result<phos_kmod_layout> uvm_layout_by_btf();

struct UvmLayout {
  phos_kmod_layout offsets = {};
  std::string version;  // of the row in the table that it is from (uvm_layout_table.h); empty: BTF
};
// By BTF or, if nvidia-uvm carries none, by the table: then it is what the version's source says,
// and must be proved before it is relied on (uvm_proof.h). ENOTSUP: neither knows it.
Result<UvmLayout> uvm_layout();

}  // namespace phos
