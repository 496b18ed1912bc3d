// SPDX-License-Identifier: GPL-2.0-only
// Session: images of a dump that has not succeeded, as far as nobody needs them.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {

bool Session::needs_images() const {
  return std::any_of(held_.begin(), held_.end(), [](const auto& h) {
    const auto& [pid, held] = h;
    return held.release && held.release->is_away() &&
           !has_ended(pid, held.restore_tid, held.start_time);
  });
}

// A process that was killed with criu while its memory came back. CRIU writes its inventory last:
// with that the images are complete, if nobody has said that the dump has failed.
bool Session::is_all_there_is() const {
  return ended_with_managed_ && !failed_ && faccessat(image_dir_.get(), kInventory, F_OK, 0) == 0;
}

void Session::remove_unfinished_images() {
  if (!dumping_ || finished_ || is_all_there_is()) return;
  if (auto r = remove_images(image_dir_.get(), dump_id_); !r) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
}

Result<void> Session::open_noted_dir() {
  if (image_dir_ || noted_dir_.empty()) return {};
  auto directory = open_noted_directory(noted_dir_);
  if (!directory) return directory.error();
  log(LogLevel::kInfo, "daemon", "images are taken from %s", noted_dir_.c_str());
  image_dir_ = std::move(*directory);
  return {};
}

// Its lock is still ours: nobody else writes images of it. Those that the dead phosd had not
// finished do not even say what dump they are of.
void Session::note_went_on(int pid) {
  went_on_ = true;
  auto status = read_proc_status(pid);
  if (left_dump_.empty() || !status || !open_noted_dir()) return;
  if (auto r = phos::remove_unfinished_images(image_dir_.get(), status->vpid); !r) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
}

// A dump that its phosd did not live to see the end of, and whose processes run on. It has failed
// if its criu says so, or has died before it wrote the inventory, which it does last; until then
// the pages of any of its processes may be needed.
void Session::remove_left_images() {
  if (left_dump_.empty() || !went_on_ || finished_) return;
  for (const LeftProcess& other : read_left_processes(lock_dir_)) {
    if (other.dump == left_dump_) return;
  }
  const auto id = parse_dump_id(left_dump_);
  if (!id || !open_noted_dir()) return;
  if (!failed_ && faccessat(image_dir_.get(), kInventory, F_OK, 0) == 0) return;
  if (auto r = remove_images(image_dir_.get(), *id); !r) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
}

}  // namespace phos
