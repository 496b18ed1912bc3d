// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/gate_object.h"

// PHOS_GATE_BPF: the path of the object (bpf/module.mk). Aligned as libelf wants it.
__asm__(
    ".pushsection .rodata\n"
    ".balign 8\n"
    "phos_gate_bpf_begin:\n"
    ".incbin \"" PHOS_GATE_BPF
    "\"\n"
    "phos_gate_bpf_end:\n"
    ".byte 0\n"
    ".popsection\n");

extern "C" {
extern const uint8_t phos_gate_bpf_begin[];
extern const uint8_t phos_gate_bpf_end[];
}

namespace phos {

std::span<const uint8_t> gate_bpf_object() {
  return {phos_gate_bpf_begin, phos_gate_bpf_end};
}

}  // namespace phos
