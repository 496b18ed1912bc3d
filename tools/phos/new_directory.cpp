// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/new_directory.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "tools/phos/image_dir.h"

namespace phos::cli {
namespace {

Error exists(const std::string& path) {
  return Error(Domain::kUsage, EEXIST, path + " exists already; choose another name, or remove it");
}

}  // namespace

Result<NewDirectory> NewDirectory::create(const std::string& path) {
  std::error_code code;
  std::filesystem::path whole = std::filesystem::absolute(path, code).lexically_normal();
  if (!whole.has_filename()) whole = whole.parent_path();  // "dir/"
  const std::string name = whole.filename();
  if (code || name.empty() || name == "." || name == "..") {
    return Error(Domain::kUsage, EINVAL, "'" + path + "' is not a name for a new directory");
  }
  NewDirectory dir;
  dir.path_ = path;
  dir.parent_ = std::filesystem::canonical(whole.parent_path(), code);
  if (code) return Error::from_errno(code.value(), "cannot make " + path);
  if (std::filesystem::exists(std::filesystem::symlink_status(whole, code)) &&
      !(std::filesystem::is_directory(whole, code) && std::filesystem::is_empty(whole, code))) {
    return exists(path);
  }
  dir.real_path_ = dir.parent_ + "/" + name;
  std::string temporary = dir.parent_ + "/." + name + ".XXXXXX";
  if (!mkdtemp(temporary.data())) return Error::from_errno(errno, "cannot make " + path);
  dir.temporary_ = temporary;
  dir.fd_.reset(open(temporary.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir.fd_) return Error::from_errno(errno, "cannot make " + path);
  return dir;
}

NewDirectory::NewDirectory(NewDirectory&& other) noexcept
    : path_(std::move(other.path_)),
      real_path_(std::move(other.real_path_)),
      parent_(std::move(other.parent_)),
      temporary_(std::exchange(other.temporary_, "")),
      fd_(std::move(other.fd_)) {}

NewDirectory::~NewDirectory() {
  if (temporary_.empty()) return;
  if (fd_) {
    auto names = list_directory(fd_.get(), temporary_);
    if (names) {
      for (const std::string& name : *names) unlinkat(fd_.get(), name.c_str(), 0);
    }
  }
  rmdir(temporary_.c_str());
}

Result<void> NewDirectory::commit() {
  if (auto ok = sync_directory(fd_.get(), path_); !ok) return ok;
  // Takes the place of an empty directory, and of nothing else.
  if (rename(temporary_.c_str(), real_path_.c_str()) != 0) {
    const bool taken = errno == EEXIST || errno == ENOTEMPTY || errno == ENOTDIR;
    return taken ? exists(path_) : Error::from_errno(errno, "cannot make " + path_);
  }
  temporary_.clear();
  UniqueFd parent(open(parent_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!parent) return Error::from_errno(errno, "cannot sync " + parent_);
  return sync_directory(parent.get(), parent_);
}

}  // namespace phos::cli
