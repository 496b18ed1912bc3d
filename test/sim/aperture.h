// SPDX-License-Identifier: GPL-2.0-only
// How device memory looks in /proc/PID/maps of a process on the simulated driver.
#pragma once

#include <cstdint>

namespace phos_sim {

inline constexpr char kMemfdName[] = "phos-sim-vram";
inline constexpr char kMemfdPath[] = "/memfd:phos-sim-vram";
// Clear of the heap, of mmap's own area, and of what AddressSanitizer takes.
inline constexpr uint64_t kOwnApertures = 0x6a0000000000;
inline constexpr uint64_t kImportedApertures = 0x6c0000000000;
inline constexpr uint64_t kApertureSpan = 0x020000000000;

}  // namespace phos_sim
