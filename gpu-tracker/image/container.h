// SPDX-License-Identifier: GPL-2.0-only
// The container around an image's payload: a checked header. Internal to this room.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/file.h"

namespace phos {

// The newest. A file is written with the oldest version whose readers understand it.
inline constexpr uint32_t kImageVersion = 2;
inline constexpr char kImageMagic[8] = {'P', 'H', 'O', 'S', 'I', 'M', 'G', '\0'};
// The hashes of a terabyte of pages are 256 MiB, and as many extents as there can be less than that
// again; more than this is not a process but a broken file.
inline constexpr uint64_t kMaxPayload = 1u << 30;

// kSealed: an encrypted kProcess.
enum class FileKind : uint32_t { kProcess = 1, kFiles = 2, kSealed = 3 };

// On disk, little-endian. This layout and the header's checksum stay the same in every version, so
// that an old reader can tell a newer file from a damaged one.
struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t kind;            // FileKind
  uint64_t payload_length;  // bytes after the header; the file ends there
  uint32_t payload_crc;     // CRC-32C of the payload
  uint32_t header_crc;      // CRC-32C of the 28 bytes before it
};
static_assert(std::endian::native == std::endian::little);
static_assert(sizeof(FileHeader) == 32);
static_assert(offsetof(FileHeader, version) == 8);
static_assert(offsetof(FileHeader, kind) == 12);
static_assert(offsetof(FileHeader, payload_length) == 16);
static_assert(offsetof(FileHeader, payload_crc) == 24);
static_assert(offsetof(FileHeader, header_crc) == 28);

Result<void> write_container(int dir_fd, const std::string& name, FileKind kind, uint32_t version,
                             const std::vector<uint8_t>& payload, UnsyncedFiles* later = nullptr);

// Takes the next bytes of a payload.
using PayloadSink = std::function<void(const void* data, size_t size)>;
// The same of a payload that comes part by part: `write` hands all of them to what it is given.
Result<void> write_container(int dir_fd, const std::string& name, FileKind kind, uint32_t version,
                             const std::function<Result<void>(const PayloadSink&)>& write,
                             UnsyncedFiles* later = nullptr);

struct Payload {
  FileKind kind{};
  std::vector<uint8_t> bytes;
};
// The payload, checksum verified. Reads at most the file's size. A file of `kind` kProcess may be
// kSealed.
Result<Payload> read_container(int dir_fd, const std::string& name, FileKind kind);

}  // namespace phos
