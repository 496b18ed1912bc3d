// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/process_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "gpu-tracker/daemon/messages.h"

namespace phos {

Result<ProcessLock> ProcessLock::take(const std::string& directory, int pid, uint64_t start_time) {
  ProcessLock lock;
  lock.path_ = directory + "/" + std::to_string(pid) + "-" + std::to_string(start_time);
  UniqueFd fd(open(lock.path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Error::from_errno(errno, "creating the lock file " + lock.path_);
  if (flock(fd.get(), LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) return Error::from_errno(errno, "locking " + lock.path_);
    return refuse(pid, "another dump of it is under way; wait for that one");
  }
  // The holder removes the name before it lets go: a lock on a removed file guards nothing.
  struct stat by_fd, by_name;
  if (fstat(fd.get(), &by_fd) < 0 || stat(lock.path_.c_str(), &by_name) < 0 ||
      by_fd.st_ino != by_name.st_ino) {
    return refuse(pid, "another dump of it has just ended; try again");
  }
  lock.fd_ = std::move(fd);
  return lock;
}

ProcessLock::~ProcessLock() {
  if (fd_) unlink(path_.c_str());
}

}  // namespace phos
