// SPDX-License-Identifier: GPL-2.0-only
// phos's image files: `phos-<pid>.img`, one for each CUDA process, and `phos-files.img`, in CRIU's
// image directory. This room is their only reader and writer; docs/image-format.md specifies them.
// The pages of GPU memory are in files of their own (page_file.h) and form chains (chain.h).
//
// `dir_fd` is always an open directory, used with the *at calls; it stays the caller's. Functions
// keep no state and may be called from any thread. Errors are Domain::kErrno for what the kernel
// refused and Domain::kFormat, code ImageError, for what the file holds.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

class JsonWriter;

class UnsyncedFiles;  // durability.h
struct ShownRun;      // page_statistics.h
// By process and allocation.
using ShownRuns = std::vector<std::vector<std::vector<ShownRun>>>;

// 16 random bytes, the same in every file of one dump.
using DumpId = std::array<uint8_t, 16>;
std::string format_dump_id(const DumpId& id);                  // 32 hexadecimal digits
std::optional<DumpId> parse_dump_id(const std::string& text);  // nothing: it is none

// Tells keys apart and gives nothing away about them (image_key.h).
using KeyId = std::array<uint8_t, 8>;

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
  kBrokenChain = 13,  // a parent is missing, or is not the one that the images were made with
  kIncomplete = 14,   // a file of the dump is missing, or holds too few pages
  kPreDumpOnly = 15,  // made by a pre-dump: nothing to restore from
  kDamagedPage = 16,  // a page's bytes are not those that were saved
  kNoKey = 17,        // it is encrypted, and its key was not given
};

// Pages are cut from the start of an allocation; the rest of its last page counts as zeros.
inline constexpr uint32_t kImagePageSize = 65536;
// In a packed file, each page begins at a multiple of this.
inline constexpr uint32_t kPageUnit = 4096;

enum class MemoryKind { kUnknown = 0, kDevice, kVirtual, kPool, kManaged, kHost };
const char* to_string(MemoryKind kind);

// Who saved the bytes. kCopy: phos, of host memory in which the driver keeps its own copy of what
// it saved while the process is checkpointed; it has to be there before the driver restores it.
enum class MemoryPath { kDriver = 0, kReleased, kShared, kCopy };
const char* to_string(MemoryPath path);

// Where a saved page is; see abi/image.proto.
enum class PageSource { kHere = 0, kParent, kZero, kOther, kDropped };

// A run of pages.
struct PageExtent {
  uint32_t first_page = 0;
  uint32_t pages = 0;  // never 0
  PageSource source = PageSource::kHere;
  // kHere, kOther: of the first page; the others follow it. In a packed file, a unit.
  uint32_t slot = 0;
  uint32_t file = 0;  // kOther: index into ProcessImage::other_files
  auto operator<=>(const PageExtent&) const = default;
};

// How a pages file stores pages; its header says so, and whoever refers to it.
struct PagesLayout {
  // In units of 4096 bytes, each page in as many as it takes; else in slots of kImagePageSize.
  bool packed = false;
  bool sealed = false;  // encrypted; then also packed
  auto operator<=>(const PagesLayout&) const = default;
};

// A pages file of this dump or of one that it builds on.
struct PagesFileRef {
  DumpId dump_id{};
  int pid = 0;
  int gpu = 0;  // in the file's name
  PagesLayout layout = {};
  auto operator<=>(const PagesFileRef&) const = default;
};

// What it takes, besides the key, to decrypt a page and to know that it is the one that was stored
// (page_codec.h).
struct Seal {
  std::array<uint8_t, 12> nonce{};
  std::array<uint8_t, 16> tag{};
  auto operator<=>(const Seal&) const = default;
};
static_assert(sizeof(Seal) == 28);

// A page in a packed file.
struct PackedPage {
  uint32_t bytes = 0;  // that it takes, 1 to kImagePageSize; kImagePageSize: as it is
  Seal seal = {};      // of a sealed file
  auto operator<=>(const PackedPage&) const = default;
};

// A page's keyed hash. This room compares hashes and never makes one (callbacks of verify.h do).
using SavedHash = std::array<uint8_t, 16>;

struct AllocationInfo {
  uint64_t address = 0;
  uint64_t size = 0;  // bytes, never 0
  int gpu = -1;       // index into ProcessImage::gpus, -1: host
  MemoryKind kind = MemoryKind::kUnknown;
  MemoryPath path = MemoryPath::kDriver;
  uint64_t buffer_id = 0;  // CU_POINTER_ATTRIBUTE_BUFFER_ID; 0: not known
  // Both empty: no page is saved. Otherwise one hash for each page, of the bytes that were saved,
  // and extents that cover all pages in ascending order.
  std::vector<SavedHash> hashes = {};
  std::vector<PageExtent> extents = {};
  // Of the pages in packed files, in the extents' order.
  std::vector<PackedPage> packed = {};
};

// Pages of 64 KiB in an allocation, the last one perhaps short.
inline uint64_t page_count(const AllocationInfo& a) {
  return a.size / kImagePageSize + (a.size % kImagePageSize != 0);
}

// Microseconds of wall time; 0: not measured. See abi/image.proto.
struct Timings {
  uint64_t scan_us = 0;
  uint64_t lock_us = 0;
  uint64_t checkpoint_us = 0;
  uint64_t gate_us = 0;
  uint64_t validate_us = 0;
  uint64_t write_us = 0;
  uint64_t release_us = 0;
  uint64_t stopped_us = 0;  // all of it
  uint64_t copy_us = 0;
};

// One pass over a process's memory; see abi/image.proto.
struct DumpRound {
  uint64_t pages = 0;
  uint64_t dirty_pages = 0;
  uint64_t bytes = 0;
  uint64_t us = 0;
  uint64_t copy_us = 0;   // of it, until all was in host memory; 0: not known
  uint64_t since_us = 0;  // from the last round's beginning, in which pages became dirty; 0: none
  auto operator<=>(const DumpRound&) const = default;
};

enum class DumpStage { kDump = 0, kPreDump };
const char* to_string(DumpStage stage);  // "dump", "pre-dump"

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
  std::vector<uint64_t> gpu_bytes;  // how much of it is on each of `gpus`; empty: not known
  DumpStage stage = DumpStage::kDump;
  DumpId parent_dump_id{};        // all zeros: no parent
  std::vector<uint8_t> hash_key;  // empty: no pages are saved
  std::vector<DumpRound> rounds;
  std::vector<PagesFileRef> other_files;
  PagesLayout layout;  // of its own pages files
  // Of the key that the file was encrypted with, or is to be; all zeros: it is not encrypted.
  KeyId key_id{};
};

// All zeros: it is on no GPU.
inline GpuUuid gpu_uuid_of(const ProcessImage& image, const AllocationInfo& a) {
  return a.gpu < 0 ? GpuUuid{} : image.gpus[static_cast<size_t>(a.gpu)].uuid;
}
// The number in the name of the file that has its pages: of the GPU, or the first that is no GPU's.
inline int pages_file_number(const ProcessImage& image, const AllocationInfo& a) {
  return a.gpu < 0 ? static_cast<int>(image.gpus.size()) : a.gpu;
}
inline PagesFileRef own_pages_file(const ProcessImage& image, const AllocationInfo& a) {
  return {image.dump_id, image.pid, pages_file_number(image, a), image.layout};
}

// Is the run in a packed file? (One whose `file` is a file.)
inline bool is_packed(const ProcessImage& image, const PageExtent& extent) {
  return extent.source == PageSource::kHere    ? image.layout.packed
         : extent.source == PageSource::kOther ? image.other_files[extent.file].layout.packed
                                               : false;
}

// Units that a page takes in a packed file.
inline uint32_t units_of(uint32_t stored_bytes) {
  return (stored_bytes + kPageUnit - 1) / kPageUnit;
}

// Saved pages by where they are.
struct PageCounts {
  uint64_t here = 0, parent = 0, zero = 0, other = 0, dropped = 0;
  auto operator<=>(const PageCounts&) const = default;
};
PageCounts count_pages(const AllocationInfo& allocation);
// GPU memory that no allocation stands for: contexts, code, arrays, what the driver keeps free for
// small memory. 0, too, where `device_bytes` is not known.
uint64_t unlisted_bytes(const ProcessImage& image);
PageCounts count_pages(const ProcessImage& image);

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
// what the reader would refuse. Mode 0600. `later`: makes it durable instead.
Result<void> write_process_image(int dir_fd, const ProcessImage& image,
                                 UnsyncedFiles* later = nullptr);
Result<void> write_files_image(int dir_fd, const FilesImage& image, UnsyncedFiles* later = nullptr);

// Error ENOENT when there is no such file.
Result<ProcessImage> read_process_image(int dir_fd, int pid);
Result<FilesImage> read_files_image(int dir_fd);

// One directory of the chain that a process's pages are spread over.
struct ChainLevel {
  std::string directory;  // for messages
  DumpId dump_id{};
  DumpStage stage = DumpStage::kDump;
  uint64_t created_us = 0;
  PageCounts pages;
  uint32_t directory_mode = 0;  // st_mode
  KeyId key_id{};               // all zeros: it is not encrypted
};

// All phos images of a directory.
struct ImageSet {
  std::vector<ProcessImage> processes;  // by pid
  FilesImage files;                     // no files: none were recorded
  // The chain of each process, in the order of `processes`: this directory first, the oldest last.
  std::vector<std::vector<ChainLevel>> chains;
};
// Other names are ignored. Fails if any image is bad, if two dumps are mixed, or if a process's
// pages are not all there, in this directory or in its parents (see PageChain::open), or if others
// can replace files in one of these directories. Reads no pages. An empty set is fine.
Result<ImageSet> read_image_set(int dir_fd);

// Refuses a directory in which images can be replaced by others than root and its owner; a restore
// from it, or from its parents, is refused too (read_image_set).
Result<void> check_image_directory(int dir_fd);

// phos-<pid>.img, phos-files.img, phos-pages-<pid>-<gpu>.img.
bool is_image_name(const std::string& name);

// Is there a file with the name of a phos image, whatever is in it?
Result<bool> has_images(int dir_fd);

// Undoes a failed dump: removes the files that carry `id` and leaves everything else, also what
// cannot be read as an image.
Result<void> remove_images(int dir_fd, const DumpId& id);
// What whoever wrote images of this process (as numbered there) was killed over.
Result<void> remove_unfinished_images(int dir_fd, int pid);
// Start of a dump: removes every file that has the name of a phos image, whatever is in it.
Result<void> remove_all_images(int dir_fd);

// How to restore onto the GPUs present. Empty: every recorded GPU is there, nothing to remap.
// Otherwise lists every recorded GPU, as the driver wants it: one that is present stays, any other
// goes to a GPU of the same name with at least as much memory. No GPU is used twice.
Result<std::vector<GpuPair>> plan_gpu_mapping(const std::vector<GpuInfo>& recorded,
                                              const std::vector<GpuInfo>& present);

// Refuses images that were made by a pre-dump.
Result<void> check_stage(const ImageSet& set);

// Refuses a driver whose CUDA version (GpuDriver::api_version) is older than the recorded one.
Result<void> check_driver(const ProcessImage& image, int present_api_version);

// For `phos show`: sizes in bytes (JSON), or in binary units for people (table). End with a
// newline. `runs`, unless null: where the pages of each allocation are (page_statistics.h). `more`
// adds members to the JSON object.
std::string to_json(const ImageSet& set, const ShownRuns* runs = nullptr,
                    const std::function<void(JsonWriter&)>& more = {});
std::string to_table(const ImageSet& set, const ShownRuns* runs = nullptr);

}  // namespace phos
