// SPDX-License-Identifier: GPL-2.0-only
// nvidia-uvm as a module: unloaded, and loaded from the file that PHOS_UVM_MODULE names.
#pragma once

namespace uvm_test {

// nullptr: not to be unloaded here.
const char* uvm_module();

// All return 0 or an errno value. unload() waits for what the kernel still frees in the background.
int unload_at_once(const char* module);
int load_module(const char* path);
int unload_uvm();
// And makes its device node.
int load_uvm();

}  // namespace uvm_test
