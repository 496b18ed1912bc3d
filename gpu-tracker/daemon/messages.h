// SPDX-License-Identifier: GPL-2.0-only
// Wording and small tests that the daemon's files share.
#pragma once

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <string>

#include "gpu-tracker/base/result.h"

namespace phos {

inline std::chrono::microseconds since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() -
                                                               start);
}

inline std::string process(int pid) {
  return "process " + std::to_string(pid);
}

inline bool is_cuda_error(const Error& e, int code) {
  return e.domain() == Domain::kCuda && e.code() == code;
}

// `why` says what stands in the way and what the user can do.
inline Error refuse(int pid, const std::string& why) {
  return Error(Domain::kUsage, EBUSY, "cannot checkpoint " + process(pid) + ": " + why);
}

inline constexpr char kInventory[] = "inventory.img";  // CRIU's, which it writes last

inline std::string megabytes(uint64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

// Is the process that had this restore thread and start time dead or dying? By the restore thread,
// not by the leader, which may end before the others.
bool has_ended(int pid, int restore_tid, uint64_t start_time);

// The same after a driver call failed with `error`: a process that is being killed stops answering
// before /proc shows it dead, so an error of the operating system is given a moment.
bool has_ended(int pid, int restore_tid, uint64_t start_time, const Error& error);

}  // namespace phos
