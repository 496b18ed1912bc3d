// SPDX-License-Identifier: GPL-2.0-only
// The compiled bpf/activity.bpf.c, embedded.
#pragma once

#include <cstdint>
#include <span>

namespace phos {

std::span<const uint8_t> activity_bpf_object();

}  // namespace phos
