// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/container.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "gpu-tracker/image/write_queue.h"

namespace phos {
namespace {

uint32_t header_checksum(const FileHeader& h) {
  return crc32c(&h, offsetof(FileHeader, header_crc));
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
  const bool sealed =
      kind == FileKind::kProcess && h.kind == static_cast<uint32_t>(FileKind::kSealed);
  if (h.kind != static_cast<uint32_t>(kind) && !sealed) {
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

// The bytes after the header, as they come.
class PayloadWriter {
 public:
  explicit PayloadWriter(int fd) : fd_(fd) { small_.reserve(kPart); }

  void add(const void* data, size_t size) {
    length_ += size;
    if (size < kPart && small_.size() + size <= kPart) {
      const auto* bytes = static_cast<const uint8_t*>(data);
      small_.insert(small_.end(), bytes, bytes + size);
      return;
    }
    flush();
    put(data, size);
  }
  // 0 or the first errno.
  int finish() {
    flush();
    return code_;
  }
  uint64_t length() const { return length_; }
  uint32_t checksum() const { return crc_; }

 private:
  static constexpr size_t kPart = 256 << 10;  // what a CPU's cache holds from the checksum on

  void flush() {
    put(small_.data(), small_.size());
    small_.clear();
  }
  void put(const void* data, size_t size) {
    for (const auto* p = static_cast<const uint8_t*>(data); size > 0 && !code_;) {
      const size_t part = std::min(size, kPart);
      crc_ = crc32c(p, part, crc_);
      code_ = length_ > kMaxPayload ? EFBIG : write_all(fd_, offset_, p, part);
      offset_ += part;
      p += part;
      size -= part;
    }
  }

  const int fd_;
  std::vector<uint8_t> small_;
  uint64_t offset_ = sizeof(FileHeader);
  uint64_t length_ = 0;
  uint32_t crc_ = 0;
  int code_ = 0;
};

}  // namespace

Result<void> write_container(int dir_fd, const std::string& name, FileKind kind, uint32_t version,
                             const std::function<Result<void>(const PayloadSink&)>& write,
                             UnsyncedFiles* later) {
  TempFile file(dir_fd, name, O_WRONLY);
  if (file.fd() < 0) return write_error(errno, dir_fd, name, sizeof(FileHeader));
  PayloadWriter payload(file.fd());
  if (auto r = write([&payload](const void* data, size_t size) { payload.add(data, size); }); !r) {
    return r.error().wrap("cannot write " + describe_file(dir_fd, name));
  }
  const int code = payload.finish();
  if (payload.length() > kMaxPayload) {
    return image_error(ImageError::kBadField,
                       "cannot write " + describe_file(dir_fd, name) + ": a payload of " +
                           std::to_string(payload.length()) + " bytes is more than the " +
                           std::to_string(kMaxPayload) + " that the format allows");
  }
  const uint64_t size = sizeof(FileHeader) + payload.length();
  if (code) return write_error(code, dir_fd, name, size);
  FileHeader header{};
  memcpy(header.magic, kImageMagic, sizeof header.magic);
  header.version = version;
  header.kind = static_cast<uint32_t>(kind);
  header.payload_length = payload.length();
  header.payload_crc = payload.checksum();
  header.header_crc = header_checksum(header);
  if (int failed = write_all(file.fd(), 0, &header, sizeof header)) {
    return write_error(failed, dir_fd, name, size);
  }
  return file.commit(size, later);
}

Result<void> write_container(int dir_fd, const std::string& name, FileKind kind, uint32_t version,
                             const std::vector<uint8_t>& payload, UnsyncedFiles* later) {
  auto write = [&payload](const PayloadSink& sink) -> Result<void> {
    sink(payload.data(), payload.size());
    return {};
  };
  return write_container(dir_fd, name, kind, version, write, later);
}

Result<Payload> read_container(int dir_fd, const std::string& name, FileKind kind) {
  uint64_t size = 0;
  auto fd = open_image(dir_fd, name, 0, &size);
  if (!fd) return fd.error();
  std::string path = describe_file(dir_fd, name);
  FileHeader header{};
  auto got = read_at(fd->get(), &header, sizeof header, 0, path);
  if (!got) return got.error();
  if (auto ok = check_header(header, *got, size, kind, path); !ok) return ok.error();

  // The length equals what the file has, see above.
  Payload read{static_cast<FileKind>(header.kind), std::vector<uint8_t>(header.payload_length)};
  std::vector<uint8_t>& payload = read.bytes;
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
  return read;
}

}  // namespace phos
