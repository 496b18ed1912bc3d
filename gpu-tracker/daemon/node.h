// SPDX-License-Identifier: GPL-2.0-only
// Node: what the sessions of one phosd share: the driver, the settings, the list of who is there.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/config.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/session_log.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

struct SessionStatus {
  unsigned id = 0;
  int client_pid = 0;
  Phos__Wire__Stage stage{};
  int pid = 0;             // 0: not known yet
  std::string checkpoint;  // empty: not known yet
  bool recovering = false;
  uint64_t unsynced_bytes = 0;
};

struct NodeStatus {
  int pid = 0;
  DaemonConfig config;
  uint64_t pool_made = 0;  // bytes of pinned memory that there are
  uint64_t pool_peak = 0;  // of these, the most that was in use at a time
  std::vector<SessionStatus> sessions;
};

// One admitted session. Lives until its connection lets go of it.
struct SessionEntry {
  SessionEntry(unsigned session_id, int client, Phos__Wire__Stage session_stage)
      : id(session_id), client_pid(client), stage(session_stage), log(session_id) {}

  const unsigned id;
  const int client_pid;
  const Phos__Wire__Stage stage;
  SessionLog log;
  std::atomic<bool> recovering{false};
  std::atomic<uint64_t> unsynced_bytes{0};  // not 0: all that is left of it is to write these
};

// Thread-safe.
class Node {
 public:
  // How the driver is opened: open_cuda_driver(), or a test's own.
  using OpenDriver = Result<std::unique_ptr<GpuDriver>> (*)();

  static Result<std::unique_ptr<Node>> make(DaemonConfig config, OpenDriver open_driver);

  const DaemonConfig& config() const { return config_; }

  // The one driver, opened when it is first needed; a failure is tried again the next time. Its
  // calls are thread-safe (gpu_driver.h).
  Result<GpuDriver*> driver();

  // phosd's own side of the GPUs; opened when it is first used.
  Result<GpuEngines*> engines();

  // Refused when there are max_sessions already (without those that only write images behind), or
  // phosd is to stop; a session that takes over from a dead phosd is always admitted, since a
  // process waits for it.
  Result<std::shared_ptr<SessionEntry>> admit(int client_pid, Phos__Wire__Stage stage);
  void leave(const SessionEntry& entry);

  NodeStatus status() const;

  // From now on no session is admitted; those under way go on.
  void stop();
  // The same, unless there are sessions.
  Result<void> stop_if_idle();
  // Readable once stop() has been called, for ever.
  int stop_fd() const { return stop_fd_.get(); }

 private:
  Node(DaemonConfig config, OpenDriver open_driver, UniqueFd stop_fd)
      : config_(std::move(config)), open_driver_(open_driver), stop_fd_(std::move(stop_fd)) {}

  void stop_locked();

  const DaemonConfig config_;
  const OpenDriver open_driver_;
  const UniqueFd stop_fd_;

  mutable std::mutex driver_mutex_;  // taken alone
  std::unique_ptr<GpuDriver> driver_;
  std::unique_ptr<GpuEngines> engines_;

  mutable std::mutex mutex_;  // before a SessionLog's
  std::map<unsigned, std::shared_ptr<SessionEntry>> sessions_;
  unsigned last_id_ = 0;
  bool stopping_ = false;
};

}  // namespace phos
