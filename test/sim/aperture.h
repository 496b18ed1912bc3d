// SPDX-License-Identifier: GPL-2.0-only
// How device memory looks in /proc/PID/maps of a process on the simulated driver.
#pragma once

#include <cstdint>
#include <cstdio>

namespace phos_sim {

// A memfd of device memory; which machine and GPU it is of follows where the machine has a file.
inline constexpr char kMemfdName[] = "phos-sim-vram";
inline constexpr char kMemfdPath[] = "/memfd:phos-sim-vram";
// Clear of the heap, of mmap's own area, and of what AddressSanitizer takes.
inline constexpr uint64_t kOwnApertures = 0x6a0000000000;
inline constexpr uint64_t kImportedApertures = 0x6c0000000000;
inline constexpr uint64_t kApertureSpan = 0x020000000000;

// "phos-sim-vram-<machine>-<uuid>", or without a machine file "phos-sim-vram".
inline constexpr int kMemfdNameSize = 80;
inline void format_memfd_name(char* out, uint32_t machine, const char* uuid) {
  int n = snprintf(out, kMemfdNameSize, "%s", kMemfdName);
  if (!machine) return;
  n += snprintf(out + n, kMemfdNameSize - n, "-%08x-", machine);
  for (int i = 0; i < 16; i++) {
    n += snprintf(out + n, kMemfdNameSize - n, "%02x", static_cast<unsigned char>(uuid[i]));
  }
}

}  // namespace phos_sim
