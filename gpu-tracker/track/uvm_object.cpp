// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_object.h"

// PHOS_UVM_BPF, PHOS_UVM_CALLS_BPF: paths of the objects (bpf/module.mk). Aligned as libelf wants
// it.
__asm__(
    ".pushsection .rodata\n"
    ".balign 8\n"
    "phos_uvm_bpf_begin:\n"
    ".incbin \"" PHOS_UVM_BPF
    "\"\n"
    "phos_uvm_bpf_end:\n"
    ".balign 8\n"
    "phos_uvm_calls_bpf_begin:\n"
    ".incbin \"" PHOS_UVM_CALLS_BPF
    "\"\n"
    "phos_uvm_calls_bpf_end:\n"
    ".byte 0\n"
    ".popsection\n");

extern "C" {
extern const uint8_t phos_uvm_bpf_begin[];
extern const uint8_t phos_uvm_bpf_end[];
extern const uint8_t phos_uvm_calls_bpf_begin[];
extern const uint8_t phos_uvm_calls_bpf_end[];
}

namespace phos {

std::span<const uint8_t> uvm_bpf_object() {
  return {phos_uvm_bpf_begin, phos_uvm_bpf_end};
}

std::span<const uint8_t> uvm_calls_bpf_object() {
  return {phos_uvm_calls_bpf_begin, phos_uvm_calls_bpf_end};
}

}  // namespace phos
