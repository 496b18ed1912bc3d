// SPDX-License-Identifier: GPL-2.0-only
// ReadTurns: of several processes whose pages are read ahead, those that are restored first have
// theirs read first, as far as they go to the same place: one GPU's memory, or the host's.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <set>
#include <stop_token>
#include <vector>

#include "gpu-tracker/image/image.h"

namespace phos {

// Thread-safe.
class ReadTurns {
 public:
  // The host's memory, among the GPUs.
  static constexpr GpuUuid kHost{};

  // A place behind all that were given so far, for who fills these. To be left.
  size_t line_up(std::set<GpuUuid> fills);
  // Waits until nobody before `place` fills any of what it does. False: `stop` was requested.
  bool wait(size_t place, const std::stop_token& stop);
  // It has nothing more to read, or gives up. May be called again.
  void leave(size_t place);

 private:
  bool is_next(size_t place) const;

  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::vector<std::set<GpuUuid>> line_;  // by place; empty: left
};

}  // namespace phos
