// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/output_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <utility>

namespace phos::cli {
namespace {

Error exists(const std::string& path) {
  return Error(Domain::kUsage, EEXIST,
               path + " exists already; choose another name, or replace it with --force");
}

// False: the file system has no such call (NFS, for one).
bool can_rename_exclusively(int code) {
  return code != EINVAL && code != ENOSYS && code != ENOTSUP;
}

}  // namespace

OutputFile::OutputFile(OutputFile&& other) noexcept
    : path_(std::move(other.path_)),
      temporary_(std::exchange(other.temporary_, "")),
      replace_(other.replace_),
      file_(std::move(other.file_)),
      fd_(other.fd_) {}

OutputFile::~OutputFile() {
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

Error OutputFile::failed(int code) const {
  return Error::from_errno(code, "cannot write " + path_);
}

Result<OutputFile> OutputFile::create(const std::string& path, bool replace) {
  OutputFile out;
  out.path_ = path;
  out.replace_ = replace;
  struct stat st;
  if (lstat(path.c_str(), &st) == 0) {
    if (!S_ISREG(st.st_mode)) {
      return Error(Domain::kUsage, EEXIST,
                   path + " is not a regular file, and is not replaced; choose another name");
    }
    if (!replace) return exists(path);
  } else if (errno != ENOENT) {
    return out.failed(errno);
  }
  const size_t slash = path.rfind('/');
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  if (name.empty()) {
    return Error(Domain::kUsage, EINVAL, "'" + path + "' is not the name of a file");
  }
  std::string temporary = path.substr(0, path.size() - name.size()) + "." + name + ".XXXXXX";
  out.file_ = UniqueFd(mkostemp(temporary.data(), O_CLOEXEC));  // mode 0600
  if (!out.file_) return out.failed(errno);
  out.fd_ = out.file_.get();
  out.temporary_ = temporary;
  return out;
}

Result<OutputFile> OutputFile::standard_output() {
  if (isatty(STDOUT_FILENO)) {
    return Error(Domain::kUsage, EINVAL,
                 "standard output is a terminal; send it to a file or a program");
  }
  OutputFile out;
  out.path_ = "standard output";
  out.fd_ = STDOUT_FILENO;
  return out;
}

Result<void> OutputFile::write(const void* data, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = ::write(fd_, static_cast<const char*>(data) + done, bytes - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failed(errno);
    done += static_cast<size_t>(n);
  }
  return {};
}

Result<void> OutputFile::commit() {
  if (!file_) return {};
  if (fsync(file_.get()) != 0) return failed(errno);
  // Some network file systems report a failed write only here.
  if (close(file_.release()) != 0 && errno != EINTR) return failed(errno);
  const char *from = temporary_.c_str(), *to = path_.c_str();
  int code = 0;
  if (replace_) {
    code = rename(from, to) == 0 ? 0 : errno;
  } else {
    code = renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0 ? 0 : errno;
    if (code && !can_rename_exclusively(code)) {
      // A second name for the file; the first one goes with this object.
      if (link(from, to) != 0) return errno == EEXIST ? exists(path_) : failed(errno);
      return {};
    }
  }
  if (code == EEXIST) return exists(path_);
  if (code) return failed(code);
  temporary_.clear();
  return {};
}

}  // namespace phos::cli
