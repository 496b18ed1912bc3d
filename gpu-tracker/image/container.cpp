// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/container.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

constexpr std::array<uint32_t, 256> make_crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0u);
    table[i] = crc;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = make_crc_table();

uint32_t header_checksum(const FileHeader& h) {
  return crc32c(&h, offsetof(FileHeader, header_crc));
}

std::string directory_path(int dir_fd) {
  char target[PATH_MAX];
  std::string link = "/proc/self/fd/" + std::to_string(dir_fd);
  ssize_t n = readlink(link.c_str(), target, sizeof target);
  return n > 0 ? std::string(target, static_cast<size_t>(n)) : std::string();
}

// Removes the temporary file unless it was renamed into place.
class TempFile {
 public:
  TempFile(int dir_fd, std::string name) : dir_fd_(dir_fd), name_(std::move(name)) {}
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() {
    if (!renamed_) unlinkat(dir_fd_, name_.c_str(), 0);
  }
  const char* name() const { return name_.c_str(); }
  void set_renamed() { renamed_ = true; }

 private:
  int dir_fd_;
  std::string name_;
  bool renamed_ = false;
};

Error write_error(int code, int dir_fd, const std::string& name, size_t size) {
  Error error = Error::from_errno(code, "cannot write " + describe_file(dir_fd, name));
  if (code != ENOSPC && code != EDQUOT) return error;
  std::string dir = printable(directory_path(dir_fd));
  std::string full = code == EDQUOT ? "the quota" : "the file system";
  return Error(Domain::kErrno, code,
               error.message() + ": " + full + " of the image directory " + dir + " is full and " +
                   std::to_string(size) +
                   " bytes are needed; free space there, or dump into a "
                   "directory on another file system");
}

Result<UniqueFd> open_image(int dir_fd, const std::string& name) {
  // O_NONBLOCK: opening a FIFO must not hang.
  UniqueFd fd(
      openat(dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!fd) {
    int code = errno;
    if (code == ELOOP) {
      return image_error(ImageError::kUntrusted,
                         describe_file(dir_fd, name) +
                             " is a symbolic link: phos does not follow links to images; put the "
                             "file itself there");
    }
    return Error::from_errno(code, "cannot open " + describe_file(dir_fd, name));
  }
  return fd;
}

Result<uint64_t> check_file(int fd, const std::string& path) {
  struct stat st;
  if (fstat(fd, &st) != 0) return Error::from_errno(errno, "cannot stat " + path);
  if (!S_ISREG(st.st_mode)) {
    return image_error(ImageError::kUntrusted, path + " is not a regular file: remove it");
  }
  // Restore runs as root and believes the image, so nobody else may be able to write it.
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
  return static_cast<uint64_t>(st.st_size);
}

// Bytes read; fewer than `size` only at the end of the file.
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

Result<void> check_header(const FileHeader& h, size_t got, uint64_t file_size, FileKind kind,
                          const std::string& path) {
  if (memcmp(h.magic, kImageMagic, std::min(got, sizeof h.magic)) != 0) {
    return image_error(ImageError::kNotAnImage, path + " is not a phos image (bad magic)");
  }
  if (got < sizeof h) {
    return image_error(ImageError::kTruncated,
                       path + " is truncated: it ends after " + std::to_string(got) +
                           " bytes, inside the header; copy it again from where it was dumped");
  }
  if (h.header_crc != header_checksum(h)) {
    return image_error(ImageError::kChecksum,
                       path +
                           " is damaged: the header's checksum is wrong; copy it again from "
                           "where it was dumped");
  }
  if (h.version > kImageVersion) {
    return image_error(ImageError::kNewerVersion,
                       path + " has format version " + std::to_string(h.version) +
                           ", this phos reads up to version " + std::to_string(kImageVersion) +
                           ": use a newer phos");
  }
  if (h.version == 0) {
    return image_error(ImageError::kBadField, path + " has format version 0, which never existed");
  }
  if (h.kind != static_cast<uint32_t>(kind)) {
    return image_error(ImageError::kWrongName,
                       path + " holds a phos image of kind " + std::to_string(h.kind) +
                           ", under this name it must be kind " +
                           std::to_string(static_cast<uint32_t>(kind)) + ": was it renamed?");
  }
  uint64_t present = file_size - sizeof h;
  if (present < h.payload_length) {
    return image_error(ImageError::kTruncated,
                       path + " is truncated: the payload has " + std::to_string(present) + " of " +
                           std::to_string(h.payload_length) +
                           " bytes; copy it again from where it was dumped");
  }
  if (present > h.payload_length) {
    return image_error(ImageError::kTrailingBytes,
                       path + " has " + std::to_string(present - h.payload_length) +
                           " bytes after its end; copy it again from where it was dumped");
  }
  if (present > kMaxPayload) {
    return image_error(ImageError::kBadField,
                       path + " has a payload of " + std::to_string(present) +
                           " bytes, more than the " + std::to_string(kMaxPayload) + " allowed");
  }
  return {};
}

}  // namespace

uint32_t crc32c(const void* data, size_t size) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; i++) crc = (crc >> 8) ^ kCrcTable[(crc ^ p[i]) & 0xff];
  return ~crc;
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

Result<void> write_container(int dir_fd, const std::string& name, FileKind kind,
                             const std::vector<uint8_t>& payload) {
  if (payload.size() > kMaxPayload) {
    return image_error(ImageError::kBadField,
                       "cannot write " + describe_file(dir_fd, name) + ": a payload of " +
                           std::to_string(payload.size()) + " bytes is more than the " +
                           std::to_string(kMaxPayload) + " that the format allows");
  }
  FileHeader header{};
  memcpy(header.magic, kImageMagic, sizeof header.magic);
  header.version = kImageVersion;
  header.kind = static_cast<uint32_t>(kind);
  header.payload_length = payload.size();
  header.payload_crc = crc32c(payload.data(), payload.size());
  header.header_crc = header_checksum(header);
  std::vector<uint8_t> bytes(sizeof header + payload.size());
  memcpy(bytes.data(), &header, sizeof header);
  std::copy(payload.begin(), payload.end(), bytes.begin() + sizeof header);

  auto failed = [&](int code) { return write_error(code, dir_fd, name, bytes.size()); };
  // A fixed temporary name: what a killed writer left is replaced, not collected.
  std::string temp_name = name + ".tmp";
  if (unlinkat(dir_fd, temp_name.c_str(), 0) != 0 && errno != ENOENT) return failed(errno);
  UniqueFd fd(openat(dir_fd, temp_name.c_str(),
                     O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd) return failed(errno);
  TempFile temp(dir_fd, temp_name);
  if (fchmod(fd.get(), 0600) != 0) return failed(errno);  // whatever the umask says
  for (size_t done = 0; done < bytes.size();) {
    ssize_t n = write(fd.get(), bytes.data() + done, bytes.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failed(errno);
    done += static_cast<size_t>(n);
  }
  if (fsync(fd.get()) != 0) return failed(errno);
  // Some network file systems report a failed write only here.
  if (close(fd.release()) != 0 && errno != EINTR) return failed(errno);
  if (renameat(dir_fd, temp.name(), dir_fd, name.c_str()) != 0) return failed(errno);
  temp.set_renamed();
  if (auto synced = sync_directory(dir_fd); !synced) {
    unlinkat(dir_fd, name.c_str(), 0);
    return synced.error();
  }
  return {};
}

Result<std::vector<uint8_t>> read_container(int dir_fd, const std::string& name, FileKind kind) {
  auto fd = open_image(dir_fd, name);
  if (!fd) return fd.error();
  std::string path = describe_file(dir_fd, name);
  auto size = check_file(fd->get(), path);
  if (!size) return size.error();
  FileHeader header{};
  auto got = read_at(fd->get(), &header, sizeof header, 0, path);
  if (!got) return got.error();
  if (auto ok = check_header(header, *got, *size, kind, path); !ok) return ok.error();

  std::vector<uint8_t> payload(header.payload_length);  // equals what the file has, see above
  got = read_at(fd->get(), payload.data(), payload.size(), sizeof header, path);
  if (!got) return got.error();
  if (*got < payload.size()) {
    return image_error(ImageError::kTruncated, path + " became shorter while it was read");
  }
  if (crc32c(payload.data(), payload.size()) != header.payload_crc) {
    return image_error(ImageError::kChecksum,
                       path +
                           " is damaged: the payload's checksum is wrong; copy it again from "
                           "where it was dumped");
  }
  return payload;
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
