// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/read_turns.h"

#include <algorithm>
#include <utility>

namespace phos {

size_t ReadTurns::line_up(std::set<GpuUuid> fills) {
  std::lock_guard<std::mutex> hold(mutex_);
  line_.push_back(std::move(fills));
  return line_.size() - 1;
}

bool ReadTurns::wait(size_t place, const std::stop_token& stop) {
  std::unique_lock<std::mutex> hold(mutex_);
  return changed_.wait(hold, stop, [&] { return is_next(place); });
}

void ReadTurns::leave(size_t place) {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    line_[place].clear();
  }
  changed_.notify_all();
}

// With the mutex held.
bool ReadTurns::is_next(size_t place) const {
  const std::set<GpuUuid>& fills = line_[place];
  return std::none_of(line_.begin(), line_.begin() + static_cast<ptrdiff_t>(place),
                      [&](const std::set<GpuUuid>& before) {
                        return std::any_of(before.begin(), before.end(),
                                           [&](const GpuUuid& gpu) { return fills.contains(gpu); });
                      });
}

}  // namespace phos
