// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/durability.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "gpu-tracker/image/file.h"

namespace phos {

Result<Durability> parse_durability(const std::string& text) {
  if (text == "disk") return Durability::kDisk;
  if (text == "memory") return Durability::kMemory;
  return Error(Domain::kUsage, EINVAL, "must be disk or memory");
}

void UnsyncedFiles::add(const std::string& name, UniqueFd file) {
  std::lock_guard<std::mutex> hold(mutex_);
  files_.insert_or_assign(name, std::move(file));
}

bool UnsyncedFiles::empty() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return files_.empty();
}

uint64_t UnsyncedFiles::bytes() const {
  std::lock_guard<std::mutex> hold(mutex_);
  uint64_t sum = 0;
  for (const auto& [name, file] : files_) {
    struct stat st;
    if (fstat(file.get(), &st) == 0) sum += static_cast<uint64_t>(st.st_size);
  }
  return sum;
}

std::string UnsyncedFiles::directory() const {
  return printable(directory_path(directory_.get()));
}

Result<void> UnsyncedFiles::sync() {
  std::map<std::string, UniqueFd> files;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    files.swap(files_);
  }
  std::string lost;
  int code = 0;
  for (auto& [name, file] : files) {
    // Some network file systems report a failed write only when the file is closed.
    int failed = fsync(file.get()) == 0 ? 0 : errno;
    if (close(file.release()) != 0 && errno != EINTR && !failed) failed = errno;
    if (!failed) continue;
    lost += (lost.empty() ? "" : ", ") + name;
    if (!code) code = failed;
  }
  if (code) return Error::from_errno(code, "cannot write " + lost + " in " + directory());
  return sync_directory(directory_.get());
}

}  // namespace phos
