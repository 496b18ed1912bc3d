// SPDX-License-Identifier: GPL-2.0-only
// Keeps two dumps of one process apart: a locked file named after its pid and start time.
#pragma once

#include <cstdint>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

// Held until destroyed, or until this process ends however it may. Move-only.
class ProcessLock {
 public:
  // Fails at once if another holds it.
  static Result<ProcessLock> take(const std::string& directory, int pid, uint64_t start_time);

  ProcessLock() = default;
  ProcessLock(ProcessLock&&) = default;
  ProcessLock& operator=(ProcessLock&&) = delete;
  ~ProcessLock();

 private:
  std::string path_;
  UniqueFd fd_;
};

}  // namespace phos
