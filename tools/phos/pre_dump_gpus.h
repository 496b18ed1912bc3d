// SPDX-License-Identifier: GPL-2.0-only
// A pre-dump of GPU memory alone, through phosd and without CRIU: for kernels that do not track
// which pages of CPU memory are written.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::cli {

// Absent: as configured (phosd.conf).
struct PreDumpLimits {
  std::optional<unsigned> max_rounds;
  std::optional<double> seconds;       // begin no further round after this time
  std::optional<double> max_slowdown;  // share of its speed the application may lose
};

struct PreDumpRound {
  int pid = 0;
  unsigned number = 0;
  uint64_t copied_bytes = 0, total_bytes = 0;
  uint64_t microseconds = 0;       // looking, copying, writing
  uint64_t copy_microseconds = 0;  // of those, until all was in host memory
  uint64_t pages = 0, dirty_pages = 0;
  uint64_t since_microseconds = 0;  // from the last round's beginning; 0: the first
};

struct PreDumpResult {
  size_t processes = 0;  // with CUDA, among `pid` and its descendants
  std::vector<PreDumpRound> rounds;
};

// Copies what process `pid` and its descendants have on GPUs to `image_dir`. `on_round` is called
// after each round of a process, `on_log` for each line that phosd logs (level: 1 error, 2 warning,
// 3 info, 4 debug). Fails, with nothing left in the directory, when phosd does.
Result<PreDumpResult> pre_dump_gpus(int pid, int image_dir, const PreDumpLimits& limits,
                                    const std::function<void(const PreDumpRound&)>& on_round,
                                    const std::function<void(unsigned, const char*)>& on_log);

}  // namespace phos::cli
