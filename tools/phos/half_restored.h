// SPDX-License-Identifier: GPL-2.0-only
// What a criu that was killed leaves of a restore: processes that wait for it for ever, with pids
// that the next restore needs.
#pragma once

#include <string>

namespace phos::cli {

// One for a restore in the background, made before criu is started.
class HalfRestored {
 public:
  // Processes whose parent dies become children of this one, as long as the object lives: unless it
  // has children, or is the init of its pid namespace, when it could not tell whose they are.
  HalfRestored();
  ~HalfRestored();
  HalfRestored(const HalfRestored&) = delete;
  HalfRestored& operator=(const HalfRestored&) = delete;

  // criu was killed; `log`: its log, which says whether the processes run already (they are left
  // alone then, as they are if that cannot be read). Kills all that it has left, but a phosd that
  // it has started, and waits for that, for a few seconds at the most.
  void kill(const std::string& log) const;

 private:
  const bool alone_;
};

}  // namespace phos::cli
