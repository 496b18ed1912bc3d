// SPDX-License-Identifier: GPL-2.0-only
// Where an entry point can be probed without a trace in the process. A uprobe on an instruction
// that the kernel cannot emulate is executed out of line, in an [uprobes] area that the kernel maps
// into the process for good; CRIU refuses to dump that.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

namespace phos {

// The offset in `code`, the first bytes of a function (16 are enough), at which the kernel emulates
// the instruction and that every call passes: 0, or 4 behind an `endbr64`. Nothing if there is
// none. Knows what every kernel with x86-64 uprobes emulates since 4.18 (arch/x86/kernel/uprobes.c:
// push_setup_xol_ops, branch_setup_xol_ops) and nothing else; the five-byte nop is left out, since
// 6.18 maps a trampoline for it.
std::optional<unsigned> emulated_entry(std::span<const uint8_t> code);

}  // namespace phos
