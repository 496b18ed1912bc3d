// SPDX-License-Identifier: GPL-2.0-only
// phos's image files: `phos-<pid>.img`, one for each CUDA process, and `phos-files.img`, in CRIU's
// image directory. This room is their only reader and writer; docs/image-format.md specifies them.
//
// `dir_fd` is always an open directory, used with the *at calls; it stays the caller's. Functions
// keep no state and may be called from any thread. Errors are Domain::kErrno for what the kernel
// refused and Domain::kFormat, code ImageError, for what the file holds.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// 16 random bytes, the same in every file of one dump.
using DumpId = std::array<uint8_t, 16>;
std::string format_dump_id(const DumpId& id);  // 32 hexadecimal digits

// Codes of Domain::kFormat.
enum class ImageError {
  kNotAnImage = 1,    // bad magic
  kNewerVersion = 2,  // written by a newer phos
  kTruncated = 3,
  kTrailingBytes = 4,
  kChecksum = 5,
  kMalformed = 6,  // not the protobuf message that belongs here
  kBadField = 7,   // a field with an impossible value
  kWrongName = 8,  // what is inside does not belong under this name
  kUntrusted = 9,  // not a regular file, or others may change it
  kMixedDumps = 10,
  kNoSuitableGpu = 11,
  kDriverTooOld = 12,
  kIncomplete = 14,  // a file of the dump is missing, or holds too few pages
};

// Pages are cut from the start of an allocation; the rest of its last page counts as zeros.
inline constexpr uint32_t kImagePageSize = 65536;

enum class MemoryKind { kUnknown = 0, kDevice, kVirtual, kPool, kManaged, kHost };
const char* to_string(MemoryKind kind);

// Who saved the bytes.
enum class MemoryPath { kDriver = 0, kReleased, kShared };
const char* to_string(MemoryPath path);

struct AllocationInfo {
  uint64_t address = 0;
  uint64_t size = 0;  // bytes, never 0
  int gpu = -1;       // index into ProcessImage::gpus, -1: host
  MemoryKind kind = MemoryKind::kUnknown;
  MemoryPath path = MemoryPath::kDriver;
};

// Microseconds of wall time; 0: not measured.
struct Timings {
  uint64_t scan_us = 0;
  uint64_t lock_us = 0;
  uint64_t checkpoint_us = 0;
};

struct ProcessImage {
  DumpId dump_id{};
  int pid = 0;                            // in the innermost pid namespace
  std::string comm;                       // any bytes but NUL
  CudaState state = CudaState::kRunning;  // as found by the dump; kFailed cannot be recorded
  std::string driver_release;
  int driver_api = 0;       // 13000: CUDA 13.0
  uint64_t created_us = 0;  // since the epoch
  std::string phos_version;
  std::vector<GpuInfo> gpus;                // distinct UUIDs
  std::vector<AllocationInfo> allocations;  // any order, no two may overlap
  Timings timings;
  uint64_t device_bytes = 0;  // GPU memory owned, as the kernel driver accounts it; 0: not known
};

// A /dev/nvidia* file to reopen.
struct DeviceFile {
  uint32_t id = 0;     // CRIU's file id, unique
  std::string path;    // absolute
  uint32_t flags = 0;  // open(2)
};

struct FilesImage {
  DumpId dump_id{};
  std::vector<DeviceFile> files;
};

// Each writes its file under a temporary name, makes it durable and renames it into place: a reader
// sees the old file or the whole new one. On an error nothing new is left behind. Refuses to write
// what the reader would refuse. Mode 0600.
Result<void> write_process_image(int dir_fd, const ProcessImage& image);
Result<void> write_files_image(int dir_fd, const FilesImage& image);

// Error ENOENT when there is no such file.
Result<ProcessImage> read_process_image(int dir_fd, int pid);
Result<FilesImage> read_files_image(int dir_fd);

// All phos images of a directory.
struct ImageSet {
  std::vector<ProcessImage> processes;  // by pid
  FilesImage files;                     // no files: none were recorded
};
// Other names are ignored. Fails if any image is bad or two dumps are mixed; an empty set is fine.
Result<ImageSet> read_image_set(int dir_fd);

// Undoes a failed dump: removes the images that carry `id` and leaves everything else, also what
// cannot be read as an image.
Result<void> remove_images(int dir_fd, const DumpId& id);
// Start of a dump: removes every file that has the name of a phos image, whatever is in it.
Result<void> remove_all_images(int dir_fd);

// How to restore onto the GPUs present. Empty: every recorded GPU is there, nothing to remap.
// Otherwise lists every recorded GPU, as the driver wants it: one that is present stays, any other
// goes to a GPU of the same name with at least as much memory. No GPU is used twice.
Result<std::vector<GpuPair>> plan_gpu_mapping(const std::vector<GpuInfo>& recorded,
                                              const std::vector<GpuInfo>& present);

// Refuses a driver whose CUDA version (GpuDriver::api_version) is older than the recorded one.
Result<void> check_driver(const ProcessImage& image, int present_api_version);

// For `phos show`: sizes in bytes (JSON), or in binary units for people (table). End with a
// newline.
std::string to_json(const ImageSet& set);
std::string to_table(const ImageSet& set);

}  // namespace phos
