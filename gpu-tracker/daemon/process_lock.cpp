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

// Of each lock of this process, by path.
struct Holder {
  std::function<bool()> gone;  // may be empty
  std::string trouble;
};
std::mutex g_mutex;
std::map<std::string, Holder> g_holders;

// The caller has g_mutex.
Error refuse_held(int pid, const std::string& path) {
  const auto it = g_holders.find(path);
  if (it != g_holders.end() && !it->second.trouble.empty()) return refuse(pid, it->second.trouble);
  if (it != g_holders.end() && it->second.gone && it->second.gone()) {
    return Error(Domain::kErrno, EAGAIN,
                 "cannot checkpoint " + process(pid) +
                     ": its last dump or restore is just ending; try again");
  }
  return refuse(pid, "another dump of it is under way; wait for that one");
}

std::string lock_name(int pid, uint64_t start_time) {
  return std::to_string(pid) + "-" + std::to_string(start_time);
}

bool is_name_of(const std::string& path, int fd) {
  struct stat by_fd, by_name;
  return fstat(fd, &by_fd) == 0 && stat(path.c_str(), &by_name) == 0 &&
         by_fd.st_dev == by_name.st_dev && by_fd.st_ino == by_name.st_ino;
}

// What the names of the files say.
std::vector<LeftProcess> read_lock_names(const std::string& directory) {
  std::vector<LeftProcess> all;
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(directory.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    LeftProcess p;
    unsigned long long start = 0;
    if (sscanf(entry->d_name, "%d-%llu", &p.pid, &start) != 2 || p.pid <= 0) continue;
    p.start_time = start;
    all.push_back(std::move(p));
  }
  return all;
}

// False: the file says nothing.
bool read_noted(const std::string& directory, LeftProcess* p) {
  std::ifstream in(directory + "/" + lock_name(p->pid, p->start_time));
  int found = -1;
  if (!(in >> found) || found < 0 || found > static_cast<int>(CudaState::kCheckpointed)) {
    return false;
  }
  p->found = static_cast<CudaState>(found);
  in.ignore();
  if (!std::getline(in, p->image_dir)) return false;
  std::getline(in, p->dump);
  return true;
}

}  // namespace

Result<ProcessLock> ProcessLock::take(const std::string& directory, int pid, uint64_t start_time,
                                      bool what_is_left, std::function<bool()> gone) {
  // Nobody of this process lets go of one meanwhile, or only looks whether it is held
  // (find_abandoned): who is refused it finds its holder.
  std::lock_guard<std::mutex> hold(g_mutex);
  ProcessLock lock;
  lock.path_ = directory + "/" + lock_name(pid, start_time);
  UniqueFd fd(open(lock.path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Error::from_errno(errno, "creating the lock file " + lock.path_);
  if (flock(fd.get(), LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) return Error::from_errno(errno, "locking " + lock.path_);
    return refuse_held(pid, lock.path_);
  }
  // The holder removes the name before it lets go: a lock on a removed file guards nothing.
  struct stat by_fd;
  if (!is_name_of(lock.path_, fd.get()) || fstat(fd.get(), &by_fd) < 0) {
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
  g_holders[lock.path_] = {std::move(gone), {}};
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

void ProcessLock::leave() {
  std::lock_guard<std::mutex> hold(g_mutex);
  g_holders.erase(path_);
  fd_.reset();
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
  for (LeftProcess& p : read_lock_names(directory)) {
    if (read_noted(directory, &p)) left.push_back(std::move(p));
  }
  return left;
}

std::vector<LeftProcess> find_abandoned(const std::string& directory, bool* held_elsewhere) {
  std::vector<LeftProcess> abandoned;
  *held_elsewhere = false;
  std::lock_guard<std::mutex> hold(g_mutex);
  for (LeftProcess& p : read_lock_names(directory)) {
    const std::string path = directory + "/" + lock_name(p.pid, p.start_time);
    if (g_holders.count(path)) continue;
    UniqueFd fd(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
    if (!fd) continue;
    if (flock(fd.get(), LOCK_EX | LOCK_NB) < 0) {
      *held_elsewhere = true;
    } else if (read_noted(directory, &p)) {
      abandoned.push_back(std::move(p));
    } else if (is_name_of(path, fd.get())) {
      unlink(path.c_str());
    }
  }
  return abandoned;
}

ProcessLock::~ProcessLock() {
  if (!fd_) return;
  std::lock_guard<std::mutex> hold(g_mutex);
  unlink(path_.c_str());
  fd_.reset();
  g_holders.erase(path_);
}

}  // namespace phos
