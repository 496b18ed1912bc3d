// SPDX-License-Identifier: GPL-2.0-only
// The compiled bpf/uvm.bpf.c and bpf/uvm_calls.bpf.c, embedded.
#pragma once

#include <cstdint>
#include <span>

namespace phos {

std::span<const uint8_t> uvm_bpf_object();
std::span<const uint8_t> uvm_calls_bpf_object();

}  // namespace phos
