// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/copy_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {
namespace {

constexpr uint64_t kChunk = 8u << 20;

Error cannot_write(int code, const std::string& name) {
  return Error::from_errno(code, "cannot write " + name);
}

Result<void> write_all(int fd, const uint8_t* data, size_t bytes, const std::string& name) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t n = write(fd, data + done, bytes - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return cannot_write(errno, name);
    done += static_cast<size_t>(n);
  }
  return {};
}

bool cannot_copy_in_kernel(int code) {
  return code == EXDEV || code == EINVAL || code == ENOSYS || code == EOPNOTSUPP;
}

}  // namespace

Result<void> copy_bytes(int from, const std::string& from_name, uint64_t offset, uint64_t bytes,
                        int to, const std::string& to_name, const CopyTick& tick) {
  std::vector<uint8_t> buffer;  // once the kernel has refused to do it
  auto at = static_cast<off_t>(offset);
  while (bytes > 0) {
    const size_t wanted = std::min(bytes, kChunk);
    ssize_t n = 0;
    if (buffer.empty()) {
      n = copy_file_range(from, &at, to, nullptr, wanted, 0);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0 && cannot_copy_in_kernel(errno)) {
        buffer.resize(kChunk);
        continue;
      }
      if (n < 0) {
        return Error::from_errno(errno, "cannot copy from " + from_name + " to " + to_name);
      }
    } else {
      n = pread(from, buffer.data(), wanted, at);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return Error::from_errno(errno, "cannot read " + from_name);
      if (auto ok = write_all(to, buffer.data(), static_cast<size_t>(n), to_name); !ok) return ok;
      at += n;
    }
    if (n == 0) {
      return Error(Domain::kFormat, EINVAL,
                   from_name + " is truncated: it ends after " + std::to_string(at) +
                       " bytes; copy it again from where it was dumped");
    }
    bytes -= static_cast<uint64_t>(n);
    if (auto ok = tick(static_cast<uint64_t>(n)); !ok) return ok;
  }
  return {};
}

Result<void> copy_file(int dir_fd, const std::string& name, const std::string& from_name,
                       int to_dir, const std::string& to_name, const CopyTick& tick) {
  UniqueFd from(openat(dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!from) return Error::from_errno(errno, "cannot open " + from_name);
  struct stat st;
  if (fstat(from.get(), &st) != 0) return Error::from_errno(errno, "cannot stat " + from_name);
  UniqueFd to(
      openat(to_dir, name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!to) return cannot_write(errno, to_name);
  // lseek fails with ENXIO behind the last data, and with EINVAL where holes are not known.
  off_t data = 0;
  while (data < st.st_size) {
    const off_t begin = lseek(from.get(), data, SEEK_DATA);
    if (begin < 0 && errno == ENXIO) break;
    const off_t known = begin < 0 ? -1 : lseek(from.get(), begin, SEEK_HOLE);
    const off_t first = known < 0 ? data : begin, end = known < 0 ? st.st_size : known;
    if (lseek(to.get(), first, SEEK_SET) < 0) return cannot_write(errno, to_name);
    auto ok = copy_bytes(from.get(), from_name, static_cast<uint64_t>(first),
                         static_cast<uint64_t>(end - first), to.get(), to_name, tick);
    if (!ok) return ok;
    data = end;
  }
  // Not the owner's business unless it is root who copies.
  if (fchown(to.get(), st.st_uid, st.st_gid) != 0 && errno != EPERM) {
    return cannot_write(errno, to_name);
  }
  const timespec times[] = {st.st_atim, st.st_mtim};
  if (ftruncate(to.get(), st.st_size) != 0 || fchmod(to.get(), st.st_mode & 07777) != 0 ||
      futimens(to.get(), times) != 0 || fsync(to.get()) != 0) {
    return cannot_write(errno, to_name);
  }
  return {};
}

}  // namespace phos::cli
