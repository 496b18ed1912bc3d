// SPDX-License-Identifier: GPL-2.0-only
// The compiled bpf/gate.bpf.c, embedded.
#pragma once

#include <cstdint>
#include <span>

namespace phos {

std::span<const uint8_t> gate_bpf_object();

}  // namespace phos
