// SPDX-License-Identifier: GPL-2.0-only
// Session: what phosd does for one run of criu, free of sockets and processes' plumbing, so that
// the tests drive it with a simulated or failing driver.
//
// A process that pause() has locked is held by the session until undo() brings it back, or until
// it is gone. Whatever ends the session early, recover() brings back what is still held.
#pragma once

#include <array>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/driver/gpu_driver.h"
#include "gpu-tracker/image/image.h"

namespace phos {

struct PauseResult {
  bool is_cuda = false;
  int restore_tid = -1;
  CudaState found = CudaState::kRunning;
};

// Not thread-safe. Every call may block in the driver for as long as the target does not answer.
class Session {
 public:
  // Both outlive the session. `lock_dir`: where one lock file a process keeps two dumps apart.
  Session(GpuDriver& driver, std::string lock_dir);

  // A dump into `image_dir` (takes ownership). Removes phos images of an earlier dump there.
  Result<void> begin_dump(UniqueFd image_dir);

  // A restore from `image_dir`: refuses images this machine cannot take.
  Result<FilesImage> begin_restore(UniqueFd image_dir);

  // The task runs. Refuses what could not be restored, then locks: submitted work is finished and
  // new CUDA calls block. On failure the process is as it was found.
  Result<PauseResult> pause(int pid, unsigned timeout_ms);

  // The task is frozen, its restore thread runs. Moves device memory into the process and writes
  // phos-<pid>.img. Does nothing for a process without CUDA.
  Result<void> checkpoint(int pid);

  // Back to the state that pause() found. The restore thread runs. `found` is used for a process
  // this session does not hold: one that a session which died had paused.
  Result<void> undo(int pid, CudaState found);

  // A restored task, frozen, its restore thread runs: back to the state recorded at the dump.
  Result<PauseResult> resume(int pid);

  // The restore thread of a restored process, if its images hold one.
  Result<PauseResult> find_restored(int pid);

  Result<void> add_file(const DeviceFile& file);

  // CRIU is done. On failure or --leave-running the plugin has called undo(); on success the tasks
  // are about to be killed, unless a post-dump script keeps them: recover() tells.
  Result<void> finish(bool success);

  // Brings back every process still held, once nobody traces it any more. Returns when none is
  // left: brought back, gone, or given up with the reason in the log.
  void recover();

 private:
  struct Held {
    int restore_tid = -1;
    CudaState found = CudaState::kRunning;
    ProcessMemory memory;
    std::chrono::microseconds lock_time{0};
    uint64_t start_time = 0;
    UniqueFd lock_file;
  };

  Result<void> check_restorable(int pid, Held* held) const;
  Result<UniqueFd> lock_process(int pid, uint64_t start_time) const;
  Result<void> write_image(int pid, const Held& held, std::chrono::microseconds checkpoint_time);
  Result<void> bring_back(int pid, CudaState target);
  // True when done with it.
  bool recover_one(int pid, const Held& held);

  GpuDriver& driver_;
  const std::string lock_dir_;
  UniqueFd image_dir_;
  std::map<int, Held> held_;
  DumpId dump_id_{};
  bool dumping_ = false;
  bool finished_ = false;
  std::vector<GpuInfo> gpus_;
  FilesImage files_;
  ImageSet restored_;
  std::vector<GpuPair> gpu_pairs_;
};

}  // namespace phos
