// SPDX-License-Identifier: GPL-2.0-only
// Chains: the saved pages of a process lie in its image directory and in those it builds on, each
// reached from the one above it through CRIU's link `parent`.
//
// A page is taken over from a parent because its 128-bit hash is equal, and for no other reason:
// both hashes are of saved bytes, made with one key. Whoever reads a chain checks those hashes
// again (a restore on the GPU, verify.h without one).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_file.h"

namespace phos {

// Directories in a chain. More are not refused by CRIU, but cost a restore seeks and open files.
inline constexpr size_t kMaxChainLevels = 64;

// Opens the directory that `parent` in `dir_fd` names, as CRIU does (open_parent in criu/image.c):
// a directory of that name, or a symbolic link to one. Error ENOENT when there is no such name.
// Refuses a link with an absolute path (CRIU only warns that a restore may not find it). "..", and
// links in the middle of the path, are followed, and the directory may be anybody's: what makes it
// the right parent is the dump id in its images, which only root and the caller can have written.
// (Who else may replace them is looked at where it is not too late: see read_image_set.)
Result<UniqueFd> open_parent(int dir_fd);

// A run of pages of one allocation that lie together.
struct PageRun {
  static constexpr uint16_t kZero = UINT16_MAX;

  uint32_t first_page = 0;
  uint32_t pages = 0;
  uint32_t slot = 0;   // of the first page; the others follow
  uint16_t level = 0;  // index into PageChain::levels(); kZero: the bytes are zero, in no file
  uint16_t gpu = 0;    // in the file's name; numbering is that level's own
};

// The saved pages of one process, wherever they are. Movable; calls that are const may be made from
// any number of threads at once.
class PageChain {
 public:
  // Reads phos-<pid>.img of every level and the header of every pages file, no pages. Fails with
  // the level and the reason unless all of this is true at every level: the parent is there and
  // holds the dump that the level above it names; it is of the same process and has the same hash
  // key; no directory occurs twice, and there are at most kMaxChainLevels; the pages files belong
  // to the images and have all the slots that these refer to; and every page that this image takes
  // from its parent is there, with the same hash. Modes of directories it only notes: this is also
  // how a process gets its memory back when a dump has failed.
  static Result<PageChain> open(int dir_fd, int pid, PageIo io);
  // The same for an image that was read from `dir_fd` before.
  static Result<PageChain> open(int dir_fd, ProcessImage image, PageIo io);

  const ProcessImage& image() const { return image_; }
  ProcessImage take_image() && { return std::move(image_); }
  // This directory first, the oldest last.
  const std::vector<ChainLevel>& levels() const { return levels_; }

  // All pages of image().allocations[allocation], ascending; empty if none is saved. To restore
  // at the disk's speed, walk these.
  const std::vector<PageRun>& runs(size_t allocation) const { return runs_[allocation]; }
  // The run of one page. Nothing: the allocation has no such page, or none is saved.
  std::optional<PageRun> locate(size_t allocation, uint64_t page) const;

  // `run`: one from runs(), or a part of one. Reads its pages, zeros too, into `data`, aligned to
  // kPageIoAlignment.
  Result<void> read(const PageRun& run, void* data) const;
  Result<void> read_page(size_t allocation, uint64_t page, void* data) const;
  // Where the run's first page is, for messages.
  std::string describe(const PageRun& run) const;

 private:
  class Builder;
  PageChain() = default;

  ProcessImage image_;
  std::vector<ChainLevel> levels_;
  std::vector<std::vector<PageRun>> runs_;                     // by allocation
  std::vector<std::vector<std::unique_ptr<PageFile>>> files_;  // by level and GPU; may be null
};

// What a parent has, for a dump that builds on it.
class PreviousPages {
 public:
  // `dir_fd`: the parent's directory (open_parent). Nothing: it has no image of this process, or
  // one without pages; the dump then has no parent for it. Error: the chain is broken, has
  // kMaxChainLevels already, or lies where others can replace files, so that a dump which builds on
  // it could not be restored.
  static Result<std::optional<PreviousPages>> open(int dir_fd, int pid);

  // To be recorded as parent_dump_id, and to be used and recorded as hash_key.
  const DumpId& dump_id() const;
  const std::vector<uint8_t>& hash_key() const;

  PreviousPages(PreviousPages&&) noexcept;
  PreviousPages& operator=(PreviousPages&&) noexcept;
  ~PreviousPages();

  // Hashes of the pages saved from the memory at that place; null: none are. A page whose hash is
  // equal may be recorded as PageSource::kParent, whatever became of the memory since.
  const std::vector<SavedHash>* find(const GpuUuid& gpu, uint64_t address, uint64_t size) const;

 private:
  struct State;
  explicit PreviousPages(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace phos
