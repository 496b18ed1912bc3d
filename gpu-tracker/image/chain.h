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
#include "gpu-tracker/image/page_appender.h"
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

// A run of pages of one allocation that lie together. Part of one is one: see part().
struct PageRun {
  static constexpr uint32_t kZero = UINT32_MAX;         // the bytes are zero, in no file
  static constexpr uint32_t kDropped = UINT32_MAX - 1;  // they are gone

  uint32_t first_page = 0;
  uint32_t pages = 0;
  uint32_t file = 0;   // a number of the chain's own, or one of the above
  uint32_t place = 0;  // in the file, of the first page; the others follow

  bool is_zero() const { return file == kZero; }
  bool is_dropped() const { return file == kDropped; }
  bool is_stored() const { return file < kDropped; }
  // Pages [first, first + count) of the allocation, which the run has.
  PageRun part(uint32_t first, uint32_t count) const {
    return {first, count, file, is_stored() ? place + (first - first_page) : 0};
  }
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
  // The same for one that builds on `parent`, whose files both then have open: nothing of it is
  // read again. `io` is for the image's own pages.
  static Result<PageChain> open_on(const PageChain& parent, int dir_fd, ProcessImage image,
                                   PageIo io);

  const ProcessImage& image() const { return image_; }
  ProcessImage take_image() && { return std::move(image_); }
  // This directory first, the oldest last.
  const std::vector<ChainLevel>& levels() const { return levels_; }

  // All pages of image().allocations[allocation], ascending; empty if none is saved. To restore
  // at the disk's speed, walk these.
  const std::vector<PageRun>& runs(size_t allocation) const { return runs_[allocation]; }
  // The run of one page. Nothing: the allocation has no such page, or none is saved.
  std::optional<PageRun> locate(size_t allocation, uint64_t page) const;

  // Of a stored run: index into levels().
  size_t level(const PageRun& run) const { return files_[run.file].level; }
  const PagesFileRef& file(const PageRun& run) const { return files_[run.file].ref; }
  // Where its first page is.
  PagePlace place(const PageRun& run) const;
  // Is what is read just what is in the file?
  bool is_plain(const PageRun& run) const { return !files_[run.file].ref.layout.packed; }

  // `run`: one from runs(), or a part of one. Reads its pages, zeros too, into `data`, aligned to
  // kPageIoAlignment; decrypts and decompresses them on the calling thread. Those that were dropped
  // are an error.
  Result<void> read(const PageRun& run, void* data) const;
  Result<void> read_page(size_t allocation, uint64_t page, void* data) const;
  // Where the run's bytes lie in a file just as read() returns them; nothing: they are not stored
  // so, or are better read through the page cache.
  std::optional<PageFile::Range> direct_range(const PageRun& run) const;
  // Where the run's first page is, for messages.
  std::string describe(const PageRun& run) const;

 private:
  class Builder;
  // A page in a packed file.
  struct StoredPage {
    uint32_t unit = 0;
    PackedPage how;
  };
  struct File {
    PagesFileRef ref;
    size_t level = 0;
    uint64_t slots = 0;                     // that it must have
    std::vector<StoredPage> stored;         // packed: PageRun::place is an index into it
    std::shared_ptr<const PageFile> pages;  // open once its level is reached
    std::optional<PageCodec> codec;         // packed
  };
  PageChain() = default;
  Result<void> read_packed(const File& file, const PageRun& run, uint8_t* data) const;

  ProcessImage image_;
  std::vector<ChainLevel> levels_;
  std::vector<std::vector<PageRun>> runs_;  // by allocation
  std::vector<File> files_;
};

// What a parent has, for a dump that builds on it. As long as the object lives, the parent's
// directory is locked (shared) against commands that change images.
class PreviousPages {
 public:
  // `dir_fd`: the parent's directory (open_parent). Nothing: it has no image of this process, or
  // one without pages; the dump then has no parent for it. Error: the chain is broken, has
  // kMaxChainLevels already, or lies where others can replace files, so that a dump which builds on
  // it could not be restored; EBUSY: a command is changing it.
  static Result<std::optional<PreviousPages>> open(int dir_fd, int pid);

  // To be recorded as parent_dump_id, and to be used and recorded as hash_key.
  const DumpId& dump_id() const;
  const std::vector<uint8_t>& hash_key() const;
  // The parent's directory first.
  const std::vector<ChainLevel>& levels() const;
  const PageChain& chain() const;

  PreviousPages(PreviousPages&&) noexcept;
  PreviousPages& operator=(PreviousPages&&) noexcept;
  ~PreviousPages();

  // What is saved of the memory at that place; null: nothing. A page of it that was not dropped and
  // whose hash is equal may be recorded as PageSource::kParent, whatever became of the memory
  // since.
  const AllocationInfo* find(const GpuUuid& gpu, uint64_t address, uint64_t size) const;

  // A page with this hash, wherever it was; may be recorded as PageSource::kOther.
  std::optional<PagePlace> find(const SavedHash& hash) const;

 private:
  struct State;
  explicit PreviousPages(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
};

}  // namespace phos
