// SPDX-License-Identifier: GPL-2.0-only
#include "test/unit/sync_recorder.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <utility>

namespace phos {
namespace {

std::atomic<SyncRecorder*> g_recorder{nullptr};

// "/": a directory.
std::string name_of(int fd) {
  struct stat st;
  if (fstat(fd, &st) == 0 && S_ISDIR(st.st_mode)) return "/";
  char path[PATH_MAX];
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  const ssize_t n = readlink(link.c_str(), path, sizeof path);
  const std::string full(path, n > 0 ? static_cast<size_t>(n) : 0);
  return full.substr(full.rfind('/') + 1);
}

int do_sync(long call, int fd) {
  SyncRecorder* recorder = g_recorder;
  if (recorder && recorder->note("sync", name_of(fd))) {
    errno = EIO;
    return -1;
  }
  return static_cast<int>(syscall(call, fd));
}

}  // namespace

SyncRecorder::SyncRecorder() {
  g_recorder = this;
}

SyncRecorder::~SyncRecorder() {
  g_recorder = nullptr;
}

std::vector<std::string> SyncRecorder::calls() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return calls_;
}

std::vector<std::string> SyncRecorder::take() {
  std::lock_guard<std::mutex> hold(mutex_);
  return std::exchange(calls_, {});
}

void SyncRecorder::fail(const std::string& name) {
  std::lock_guard<std::mutex> hold(mutex_);
  failing_ = name;
}

bool SyncRecorder::note(const std::string& what, const std::string& name) {
  std::lock_guard<std::mutex> hold(mutex_);
  const std::string call = what + " " + name;
  if (calls_.empty() || calls_.back() != call) calls_.push_back(call);
  return what == "sync" && name == failing_;
}

}  // namespace phos

extern "C" {

__attribute__((visibility("default"))) int fsync(int fd) {
  return phos::do_sync(SYS_fsync, fd);
}

__attribute__((visibility("default"))) int fdatasync(int fd) {
  return phos::do_sync(SYS_fdatasync, fd);
}

__attribute__((visibility("default"))) ssize_t pwrite(int fd, const void* data, size_t size,
                                                      off_t offset) {
  if (phos::SyncRecorder* recorder = phos::g_recorder) {
    const bool direct = fcntl(fd, F_GETFL) & O_DIRECT;
    recorder->note(direct ? "direct write" : "write", phos::name_of(fd));
  }
  return syscall(SYS_pwrite64, fd, data, size, offset);
}

__attribute__((visibility("default"))) int renameat(int from_dir, const char* from, int to_dir,
                                                    const char* to) noexcept {
  if (phos::SyncRecorder* recorder = phos::g_recorder) recorder->note("rename", to);
  return static_cast<int>(syscall(SYS_renameat, from_dir, from, to_dir, to));
}

}  // extern "C"
