// SPDX-License-Identifier: GPL-2.0-only
// The first block of a pages file. Internal to this room.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/container.h"

namespace phos {

inline constexpr char kPageFileMagic[8] = {'P', 'H', 'O', 'S', 'P', 'A', 'G', '\0'};
inline constexpr uint64_t kMaxPageSlots = uint64_t{1} << 32;

// On disk, little-endian; zeros follow up to kImagePageSize, then the slots or units. As in
// FileHeader, the layout and its checksum stay the same in every version.
struct PageFileHeader {
  char magic[8];
  uint32_t version;     // 2 if it is packed, else 1
  uint32_t page_size;   // kImagePageSize
  uint64_t slots;       // the file ends after them; in a packed file, units of kPageUnit
  uint8_t dump_id[16];  // as in phos-<pid>.img
  uint32_t pid;
  uint32_t gpu;         // index into Process.gpus
  uint8_t packed;       // 1: pages are stored in units; else 0, and what follows too
  uint8_t compression;  // Compression
  uint8_t encryption;   // 1: AES-256-GCM
  uint8_t reserved;     // 0
  uint32_t header_crc;  // CRC-32C of the 52 bytes before it
};
static_assert(sizeof(PageFileHeader) == 56);
static_assert(offsetof(PageFileHeader, version) == 8);
static_assert(offsetof(PageFileHeader, page_size) == 12);
static_assert(offsetof(PageFileHeader, slots) == 16);
static_assert(offsetof(PageFileHeader, dump_id) == 24);
static_assert(offsetof(PageFileHeader, pid) == 40);
static_assert(offsetof(PageFileHeader, gpu) == 44);
static_assert(offsetof(PageFileHeader, packed) == 48);
static_assert(offsetof(PageFileHeader, compression) == 49);
static_assert(offsetof(PageFileHeader, encryption) == 50);
static_assert(offsetof(PageFileHeader, reserved) == 51);
static_assert(offsetof(PageFileHeader, header_crc) == 52);

// `size`: the file's. Checks everything that can be checked without knowing whose file it should
// be.
Result<PageFileHeader> read_page_header(int fd, uint64_t size, const std::string& path);

}  // namespace phos
