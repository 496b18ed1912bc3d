// SPDX-License-Identifier: GPL-2.0-only
// Keeps two dumps of one process apart: a locked file named after its pid and start time. It says
// what is held, for the next phosd, should this one be killed together with its client.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// What a phosd held when it was killed.
struct LeftProcess {
  int pid = 0;
  uint64_t start_time = 0;
  CudaState found = CudaState::kRunning;  // to be brought back to
  std::string image_dir;                  // where its memory is, if it is away; as phosd saw it
  std::string dump;                       // which was being made there; empty: a restore
};
// Opens the directory of images that a phosd which died has noted. Refuses one that was removed:
// what is there by that name now is another.
Result<UniqueFd> open_noted_directory(const std::string& path);

// Those with a file in `directory`, held by somebody now or not. Files that say nothing are left
// out: of those processes nothing had been changed yet.
std::vector<LeftProcess> read_left_processes(const std::string& directory);
// Those that nobody holds: phosds that died have left them. Removes the files of such as had noted
// nothing. `held_elsewhere`: does another phosd hold some?
std::vector<LeftProcess> find_abandoned(const std::string& directory, bool* held_elsewhere);

// Held until destroyed, or until this process ends however it may. Move-only.
class ProcessLock {
 public:
  // Fails at once if another holds it. EBUSY; EAGAIN: who holds it is about to let go. So also if a
  // phosd has noted something and died: it must be undone first, by who takes it with
  // `what_is_left`.
  // `gone`: as held_for().
  static Result<ProcessLock> take(const std::string& directory, int pid, uint64_t start_time,
                                  bool what_is_left = false, std::function<bool()> gone = {});

  // From now on the process may be changed: brought back to `found`, with `image_dir` (an open
  // directory). `dump`: which is made there, if one is. ENOENT: noted, but the directory is not to
  // be found again by its path.
  Result<void> note(CudaState found, int image_dir, const std::string& dump = {});

  // Nothing will happen to the process any more, but what belongs to it takes a while to go.
  void ends_soon() const;
  // The same as soon as gone() says that whoever it is held for has gone: he may do so, and want
  // the process for something else, before we have come to notice. Called on other threads, at
  // once, and no more after ends_soon().
  void held_for(std::function<bool()> gone) const;
  // The process is not as it was, and what is to be done: for whoever wants it meanwhile.
  void in_trouble(const std::string& why) const;
  // Until this phosd ends; what has been noted stays for the next one.
  void keep();
  // Lets go of it, and what has been noted stays for whoever takes it next.
  void leave();

  ProcessLock() = default;
  ProcessLock(ProcessLock&&) = default;
  ProcessLock& operator=(ProcessLock&&) = delete;
  ~ProcessLock();

 private:
  std::string path_;
  UniqueFd fd_;
};

}  // namespace phos
