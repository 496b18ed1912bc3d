// SPDX-License-Identifier: GPL-2.0-only
// The phos command as a client of this node's phosd.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/base/result.h"

namespace phos::cli {

struct DaemonSession {
  unsigned id = 0;
  std::string stage;  // "dump", "restore", "take-over"
  int client_pid = 0;
  int pid = 0;             // 0: not known yet
  std::string checkpoint;  // empty: not known yet
  bool recovering = false;
  uint64_t unsynced_bytes = 0;  // of images that are written behind
};

struct DaemonInfo {
  int pid = 0;
  std::string version;
  unsigned protocol = 0;
  std::string socket;
  unsigned max_sessions = 0;
  uint64_t pool_size = 0;     // bytes
  uint64_t pool_made = 0;     // of these, that there are
  uint64_t pool_peak = 0;     // of these, the most that was in use at a time
  unsigned idle_timeout = 0;  // seconds; 0: never leaves
  std::vector<DaemonSession> sessions;
};

// Nothing: none runs. Starts none (but systemd does, if it holds the socket), unless one was killed
// that held processes, which then wait for another.
Result<std::optional<DaemonInfo>> ask_daemon();

// Starts phosd if none runs, and asks it.
Result<DaemonInfo> start_daemon();

// Waits until it lets nobody in any more. False: none ran. Fails while there are sessions.
Result<bool> stop_daemon();

// One line: "phosd 0.1.0, pid 7: 1 of 32 sessions, 16.0 GiB pool (0.5 GiB made, 0.2 GiB at most in
// use), /run/phos/phosd.sock".
std::string describe(const DaemonInfo& info);

// The value that `phos status --json` and `phos daemon status --json` have in common; null: none.
void write_daemon(JsonWriter& w, const std::optional<DaemonInfo>& info);

}  // namespace phos::cli
