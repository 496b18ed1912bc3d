// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/process_lock.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

constexpr char kDeleted[] = " (deleted)";  // of the kernel, in links of /proc

// Of locks of this process, by path.
struct Holder {
  std::function<bool()> gone;  // may be empty
  std::string trouble;
};
std::mutex g_mutex;
std::map<std::string, Holder> g_holders;

Error refuse_held(int pid, const std::string& path) {
  std::lock_guard<std::mutex> hold(g_mutex);
  const auto it = g_holders.find(path);
  if (it != g_holders.end() && !it->second.trouble.empty()) return refuse(pid, it->second.trouble);
  if (it != g_holders.end() && it->second.gone && it->second.gone()) {
    return Error(Domain::kErrno, EAGAIN,
                 "cannot checkpoint " + process(pid) +
                     ": its last dump or restore is just ending; try again");
  }
  return refuse(pid, "another dump of it is under way; wait for that one");
}

}  // namespace

Result<ProcessLock> ProcessLock::take(const std::string& directory, int pid, uint64_t start_time,
                                      bool what_is_left) {
  ProcessLock lock;
  lock.path_ = directory + "/" + std::to_string(pid) + "-" + std::to_string(start_time);
  UniqueFd fd(open(lock.path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Error::from_errno(errno, "creating the lock file " + lock.path_);
  if (flock(fd.get(), LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) return Error::from_errno(errno, "locking " + lock.path_);
    return refuse_held(pid, lock.path_);
  }
  // The holder removes the name before it lets go: a lock on a removed file guards nothing.
  struct stat by_fd, by_name;
  if (fstat(fd.get(), &by_fd) < 0 || stat(lock.path_.c_str(), &by_name) < 0 ||
      by_fd.st_ino != by_name.st_ino) {
    return Error(
        Domain::kErrno, EAGAIN,
        "cannot checkpoint " + process(pid) + ": another dump of it has just ended; try again");
  }
  if (by_fd.st_size > 0 && !what_is_left) {
    return Error(Domain::kErrno, EAGAIN,
                 "cannot checkpoint " + process(pid) +
                     ": a phosd that has died has left it, and another one is about to bring it "
                     "back; try again, if need be after `phos daemon stop`");
  }
  lock.fd_ = std::move(fd);
  return lock;
}

void ProcessLock::ends_soon() const {
  held_for([] { return true; });
}

void ProcessLock::held_for(std::function<bool()> gone) const {
  std::lock_guard<std::mutex> hold(g_mutex);
  g_holders[path_].gone = std::move(gone);
}

void ProcessLock::in_trouble(const std::string& why) const {
  std::lock_guard<std::mutex> hold(g_mutex);
  g_holders[path_].trouble = why;
}

void ProcessLock::keep() {
  (void)fd_.release();
}

Result<void> ProcessLock::note(CudaState found, int image_dir, const std::string& dump) {
  char path[PATH_MAX];
  const std::string link = "/proc/self/fd/" + std::to_string(image_dir);
  const ssize_t n = readlink(link.c_str(), path, sizeof path);
  if (n < 0) return Error::from_errno(errno, "asking for the path of the image directory");
  const std::string text = std::to_string(static_cast<int>(found)) + "\n" +
                           std::string(path, static_cast<size_t>(n)) + "\n" + dump + "\n";
  if (pwrite(fd_.get(), text.data(), text.size(), 0) != static_cast<ssize_t>(text.size()) ||
      ftruncate(fd_.get(), static_cast<off_t>(text.size())) < 0) {
    return Error::from_errno(errno, "writing " + path_);
  }
  // Removed, or of another mount namespace than ours.
  const std::string noted(path, static_cast<size_t>(n));
  struct stat open_one, by_path;
  auto again = open_noted_directory(noted);
  if (!again) return again.error();
  if (fstat(image_dir, &open_one) < 0 || fstat(again->get(), &by_path) < 0 ||
      open_one.st_dev != by_path.st_dev || open_one.st_ino != by_path.st_ino) {
    return Error(Domain::kErrno, ENOENT,
                 "another phosd would not find the image directory: " + noted + " is another one");
  }
  return {};
}

Result<UniqueFd> open_noted_directory(const std::string& path) {
  if (path.ends_with(kDeleted)) {
    return Error(Domain::kErrno, ENOENT, "the image directory " + path + " has been removed");
  }
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Error::from_errno(errno, "opening the image directory " + path);
  return fd;
}

std::vector<LeftProcess> read_left_processes(const std::string& directory) {
  std::vector<LeftProcess> left;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(directory.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    LeftProcess p;
    unsigned long long start = 0;
    if (sscanf(entry->d_name, "%d-%llu", &p.pid, &start) != 2 || p.pid <= 0) continue;
    p.start_time = start;
    std::ifstream in(directory + "/" + entry->d_name);
    int found = -1;
    if (!(in >> found) || found < 0 || found > static_cast<int>(CudaState::kCheckpointed)) continue;
    p.found = static_cast<CudaState>(found);
    in.ignore();
    if (!std::getline(in, p.image_dir)) continue;
    std::getline(in, p.dump);
    left.push_back(std::move(p));
  }
  return left;
}

ProcessLock::~ProcessLock() {
  if (!fd_) return;
  unlink(path_.c_str());
  std::lock_guard<std::mutex> hold(g_mutex);
  g_holders.erase(path_);
}

}  // namespace phos
