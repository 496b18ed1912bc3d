// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>
#include <memory>

#ifndef SYS_cachestat  // Linux 6.5
#define SYS_cachestat 451
#endif

namespace phos {
namespace {

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

// Slicing by eight: table k holds the checksum of a byte that k zero bytes follow.
constexpr CrcTables make_crc_tables() {
  CrcTables tables{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    tables[0][i] = crc;
  }
  for (size_t k = 1; k < tables.size(); k++) {
    for (size_t i = 0; i < 256; i++) {
      uint32_t crc = tables[k - 1][i];
      tables[k][i] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  }
  return tables;
}
constexpr CrcTables kCrc = make_crc_tables();

#ifdef __x86_64__
// SSE 4.2 has an instruction for this polynomial.
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(const uint8_t* p, size_t size,
                                                        uint64_t crc) {
  for (; size >= 8; size -= 8, p += 8) {
    uint64_t word;
    memcpy(&word, p, 8);
    crc = __builtin_ia32_crc32di(crc, word);
  }
  auto rest = static_cast<uint32_t>(crc);
  for (; size > 0; size--, p++) rest = __builtin_ia32_crc32qi(rest, *p);
  return rest;
}
#endif

}  // namespace

// The hashes of a terabyte of pages are 256 MiB, checksummed while the processes stand still.
uint32_t crc32c(const void* data, size_t size, uint32_t before) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
#ifdef __x86_64__
  static const bool kHasInstruction = __builtin_cpu_supports("sse4.2");
  if (kHasInstruction) return ~crc32c_sse42(p, size, ~before);
#endif
  return crc32c_by_tables(p, size, before);
}

uint32_t crc32c_by_tables(const void* data, size_t size, uint32_t before) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint32_t crc = ~before;
  for (; size >= 8; size -= 8, p += 8) {
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + 4, 4);
    low ^= crc;
    crc = kCrc[7][low & 0xff] ^ kCrc[6][low >> 8 & 0xff] ^ kCrc[5][low >> 16 & 0xff] ^
          kCrc[4][low >> 24] ^ kCrc[3][high & 0xff] ^ kCrc[2][high >> 8 & 0xff] ^
          kCrc[1][high >> 16 & 0xff] ^ kCrc[0][high >> 24];
  }
  for (; size > 0; size--, p++) crc = (crc >> 8) ^ kCrc[0][(crc ^ *p) & 0xff];
  return ~crc;
}

std::string directory_path(int dir_fd) {
  char target[PATH_MAX];
  std::string link = "/proc/self/fd/" + std::to_string(dir_fd);
  ssize_t n = readlink(link.c_str(), target, sizeof target);
  return n > 0 ? std::string(target, static_cast<size_t>(n)) : std::string();
}

Result<std::vector<std::string>> directory_names(int dir_fd) {
  int fd = openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  std::unique_ptr<DIR, int (*)(DIR*)> dir(fd >= 0 ? fdopendir(fd) : nullptr, closedir);
  if (!dir) {
    int code = errno;
    if (fd >= 0) close(fd);
    return Error::from_errno(code, "cannot open the image directory");
  }
  std::vector<std::string> names;
  errno = 0;
  while (dirent* entry = readdir(dir.get())) names.emplace_back(entry->d_name);
  if (errno) return Error::from_errno(errno, "cannot list " + describe_file(dir_fd, "."));
  std::sort(names.begin(), names.end());
  return names;
}

std::string describe_file(int dir_fd, const std::string& name) {
  std::string dir = directory_path(dir_fd);
  return dir.empty() ? name : printable(dir) + "/" + name;
}

std::string printable(const std::string& text) {
  std::string out = text;
  for (char& c : out) {
    if (c < 0x20 || c > 0x7e) c = '?';
  }
  return out;
}

Error image_error(ImageError code, const std::string& message) {
  return Error(Domain::kFormat, static_cast<int>(code), message);
}

Error write_error(int code, int dir_fd, const std::string& name, uint64_t size) {
  Error error = Error::from_errno(code, "cannot write " + describe_file(dir_fd, name));
  if (code != ENOSPC && code != EDQUOT) return error;
  std::string dir = printable(directory_path(dir_fd));
  std::string full = code == EDQUOT ? "the quota" : "the file system";
  std::string free;
  struct statvfs vfs;
  if (code == ENOSPC && fstatvfs(dir_fd, &vfs) == 0) {
    free = " (" + std::to_string(uint64_t{vfs.f_bavail} * vfs.f_frsize) + " are free)";
  }
  return Error(Domain::kErrno, code,
               error.message() + ": " + full + " of the image directory " + dir + " is full and " +
                   std::to_string(size) + " bytes are needed" + free +
                   "; free space there, or dump into a directory on another file system");
}

TempFile::TempFile(int dir_fd, std::string name, int flags)
    : dir_fd_(dir_fd), name_(std::move(name)) {
  // A fixed temporary name: what a killed writer left is replaced, not collected.
  const std::string temp = name_ + ".tmp";
  if (unlinkat(dir_fd, temp.c_str(), 0) != 0 && errno != ENOENT) return;
  fd_.reset(openat(dir_fd, temp.c_str(), O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC | flags, 0600));
  if (!fd_) return;
  exists_ = true;
  // Whatever the umask says.
  if (int code = fchmod(fd_.get(), 0600) == 0 ? 0 : errno) {
    fd_.reset();
    errno = code;
  }
}

TempFile::~TempFile() {
  if (exists_) unlinkat(dir_fd_, (name_ + ".tmp").c_str(), 0);
}

Result<void> TempFile::commit(uint64_t size, UnsyncedFiles* later) {
  auto failed = [&] { return write_error(errno, dir_fd_, name_, size); };
  if (!later) {
    if (fsync(fd_.get()) != 0) return failed();
    // Some network file systems report a failed write only here.
    if (close(fd_.release()) != 0 && errno != EINTR) return failed();
  }
  if (renameat(dir_fd_, (name_ + ".tmp").c_str(), dir_fd_, name_.c_str()) != 0) return failed();
  exists_ = false;
  if (later) {
    later->add(name_, std::move(fd_));
    return {};
  }
  if (auto synced = sync_directory(dir_fd_); !synced) {
    unlinkat(dir_fd_, name_.c_str(), 0);
    return synced.error();
  }
  return {};
}

Result<UniqueFd> open_image(int dir_fd, const std::string& name, int flags, uint64_t* size) {
  // O_NONBLOCK: opening a FIFO must not hang.
  UniqueFd fd(openat(dir_fd, name.c_str(),
                     O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY | flags));
  const std::string path = describe_file(dir_fd, name);
  if (!fd && errno == ELOOP) {
    return image_error(ImageError::kUntrusted,
                       path +
                           " is a symbolic link: phos does not follow links to images; put the "
                           "file itself there");
  }
  if (!fd) return Error::from_errno(errno, "cannot open " + path);
  struct stat st;
  if (fstat(fd.get(), &st) != 0) return Error::from_errno(errno, "cannot stat " + path);
  if (!S_ISREG(st.st_mode)) {
    return image_error(ImageError::kUntrusted, path + " is not a regular file: remove it");
  }
  if (auto ok = check_trusted(st, path); !ok) return ok.error();
  *size = static_cast<uint64_t>(st.st_size);
  return fd;
}

Result<void> check_trusted(const struct stat& st, const std::string& path) {
  if (st.st_uid != 0 && st.st_uid != geteuid()) {
    return image_error(ImageError::kUntrusted,
                       path + " belongs to user " + std::to_string(st.st_uid) +
                           ", who is neither root nor you: if you trust it, run: chown root " +
                           path);
  }
  if (st.st_mode & (S_IWGRP | S_IWOTH)) {
    return image_error(ImageError::kUntrusted,
                       path +
                           " can be changed by its group or by others: if you trust it, run: "
                           "chmod go-w " +
                           path);
  }
  return {};
}

Result<void> check_directory_mode(mode_t mode, const std::string& path) {
  if (!(mode & (S_IWGRP | S_IWOTH)) || (mode & S_ISVTX)) return {};
  return image_error(ImageError::kUntrusted,
                     "in the directory " + path +
                         " its group or others can replace images: if you trust what is in it, "
                         "run: chmod go-w " +
                         path);
}

Result<size_t> read_at(int fd, void* buffer, size_t size, off_t offset, const std::string& path) {
  size_t done = 0;
  while (done < size) {
    ssize_t n = pread(fd, static_cast<char*>(buffer) + done, size - done,
                      offset + static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(errno, "cannot read " + path);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  return done;
}

bool is_in_use(int dir_fd, const std::string& name) {
  UniqueFd fd(openat(dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  return !fd || fcntl(fd.get(), F_SETLEASE, F_WRLCK) != 0;
}

bool is_cached(int fd, uint64_t size) {
  // The kernel looks at every page that it is asked about: 0.1 s for a large file.
  constexpr uint64_t kSamples = 32, kSample = 512 << 10;
  const bool all = size <= kSamples * kSample;
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  uint64_t asked = 0, cached = 0;
  for (uint64_t i = 0; i < (all ? 1 : kSamples); i++) {
    const uint64_t begin = all ? 0 : (size - kSample) / (kSamples - 1) * i / page * page;
    const uint64_t range[2] = {begin, all ? size : kSample};  // struct cachestat_range
    uint64_t pages[5] = {};  // struct cachestat: nr_cache comes first
    if (syscall(SYS_cachestat, fd, range, pages, 0) != 0) return false;
    asked += range[1];
    cached += pages[0] * page;
  }
  return cached > asked / 2;
}

Result<void> sync_directory(int dir_fd) {
  // A descriptor of our own: the caller's may be O_PATH, which fsync refuses.
  UniqueFd dir(openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir) return Error::from_errno(errno, "cannot open the image directory");
  // EINVAL: a file system without directories to sync.
  if (fsync(dir.get()) != 0 && errno != EINVAL) {
    return Error::from_errno(errno, "cannot sync " + describe_file(dir_fd, "."));
  }
  return {};
}

}  // namespace phos
