// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/container.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

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

}  // namespace

Result<void> write_container(int dir_fd, const std::string& name, FileKind kind, uint32_t version,
                             const std::vector<uint8_t>& payload, UnsyncedFiles* later) {
  if (payload.size() > kMaxPayload) {
    return image_error(ImageError::kBadField,
                       "cannot write " + describe_file(dir_fd, name) + ": a payload of " +
                           std::to_string(payload.size()) + " bytes is more than the " +
                           std::to_string(kMaxPayload) + " that the format allows");
  }
  FileHeader header{};
  memcpy(header.magic, kImageMagic, sizeof header.magic);
  header.version = version;
  header.kind = static_cast<uint32_t>(kind);
  header.payload_length = payload.size();
  header.payload_crc = crc32c(payload.data(), payload.size());
  header.header_crc = header_checksum(header);
  const uint64_t size = sizeof header + payload.size();
  TempFile file(dir_fd, name, O_WRONLY);
  if (file.fd() < 0) return write_error(errno, dir_fd, name, size);
  for (auto [data, left] : {std::pair<const void*, size_t>(&header, sizeof header),
                            std::pair<const void*, size_t>(payload.data(), payload.size())}) {
    while (left > 0) {
      ssize_t n = write(file.fd(), data, left);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return write_error(errno, dir_fd, name, size);
      data = static_cast<const char*>(data) + n;
      left -= static_cast<size_t>(n);
    }
  }
  return file.commit(size, later);
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
