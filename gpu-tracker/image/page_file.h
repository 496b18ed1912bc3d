// SPDX-License-Identifier: GPL-2.0-only
// `phos-pages-<pid>-<gpu>.img`: saved pages of one process's memory on one GPU, in numbered slots
// of kImagePageSize bytes, or packed, in numbered units of kPageUnit bytes. Which page is in which
// slot or from which unit on, and its hash, is in phos-<pid>.img.
//
// Pages go around the page cache (O_DIRECT) where the file system takes that: it is faster than
// through it, and the host's memory is needed for other things while GPU memory is saved.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_codec.h"
#include "gpu-tracker/image/write_queue.h"

namespace phos {

// What memory that pages are read into or written from must be aligned to, in bytes.
inline constexpr size_t kPageIoAlignment = 4096;

// What the file says of how its pages are stored. (Whoever writes pages stores them so.)
struct PageFileFormat {
  PagesLayout layout;
  Compression compression = Compression::kNone;  // of a packed file
  auto operator<=>(const PageFileFormat&) const = default;
  // Bytes of a slot or unit.
  uint64_t slot_bytes() const { return layout.packed ? kPageUnit : kImagePageSize; }
};

// Writes a pages file. `slot` and `slots` stand for units in a packed one. write() and
// write_async() may be called from any number of threads at once, the others, the destructor too,
// from one thread while no write is under way. A writer that is destroyed before finish() succeeded
// leaves no file.
class PageFileWriter {
 public:
  // Starts the file under a temporary name. `gpu`: index into ProcessImage::gpus. `dir_fd` is not
  // needed any more after the call. `later`, which outlives the writer: pages go through the page
  // cache, and nothing here waits for the disk.
  static Result<std::unique_ptr<PageFileWriter>> create(int dir_fd, int pid, int gpu,
                                                        const DumpId& id,
                                                        const PageFileFormat& format = {},
                                                        UnsyncedFiles* later = nullptr);
  ~PageFileWriter();
  PageFileWriter(const PageFileWriter&) = delete;
  PageFileWriter& operator=(const PageFileWriter&) = delete;

  // Takes the disk space of `slots` slots in all. Error ENOSPC, with what is needed and what is
  // free: before any page is copied, not in the middle. A file system that cannot reserve space is
  // no error; a full disk then shows in write().
  Result<void> reserve(uint64_t slots);

  // Writes `slots` slots from `data`, aligned to kPageIoAlignment, to `slot` and those after it.
  // A slot may be written again when its page has changed; the caller orders writes to one slot.
  // `data` is not used any more when the call returns. The bytes are durable after finish().
  Result<void> write(uint64_t slot, const void* data, uint64_t slots);

  // The same, but for the waiting: `data` is in use until `done` has been called, with what write()
  // would have returned (see WriteQueue::submit). `queue` may serve other files, too.
  void write_async(WriteQueue& queue, uint64_t slot, const void* data, uint64_t slots,
                   WriteQueue::Done done);

  // Makes durable what is written, so that finish() has little left to do (unless `later` does).
  Result<void> flush();

  // Writes the header, makes everything durable (or `later` does) and gives the file its name. The
  // file ends with the highest slot written. To be called once, before write_process_image() refers
  // to the file.
  Result<void> finish();

  // Slots so far: one more than the highest that was written.
  uint64_t slots() const;

 private:
  struct State;
  explicit PageFileWriter(std::unique_ptr<State> state);
  Result<void> check_write(uint64_t slot, const void* data, uint64_t slots) const;
  void note_written(uint64_t end_slot);
  Error failed(int code, uint64_t end_offset) const;

  std::unique_ptr<State> state_;
};

// kDirect: around the page cache, unless it holds most of the file already.
enum class PageIo { kDirect, kCached };

// Reads a pages file. `slot` and `slots` stand for units in a packed one. read() may be called from
// any number of threads at once.
class PageFile {
 public:
  // Refuses a file that is damaged, truncated, or does not belong to this process, GPU and dump.
  // kCached: the page cache keeps what was read.
  static Result<std::unique_ptr<PageFile>> open(int dir_fd, int pid, int gpu, const DumpId& id,
                                                PageIo io);

  const PageFileFormat& format() const { return format_; }
  uint64_t slots() const { return slots_; }
  const std::string& path() const { return path_; }  // for messages
  // Has it a name still? And is that file, of a directory, this one? False also if it cannot be
  // told.
  bool is_named() const;
  bool is_named_in(int dir_fd, const std::string& name) const;

  // Reads `slots` slots from `slot` on into `data`, aligned to kPageIoAlignment, as they are
  // stored.
  Result<void> read(uint64_t slot, void* data, uint64_t slots) const;

  // Where slots lie, for who reads them around the page cache by other means; `fd` is the file's.
  struct Range {
    int fd;
    uint64_t offset, bytes;
  };
  // Nothing: read() goes through the page cache, or the file has no such slots.
  std::optional<Range> direct_range(uint64_t slot, uint64_t slots) const;

 private:
  PageFile(UniqueFd fd, std::string path, const PageFileFormat& format, uint64_t slots,
           bool direct);

  UniqueFd fd_;
  std::string path_;
  PageFileFormat format_;
  uint64_t slots_;
  mutable std::atomic<bool> direct_;
};

}  // namespace phos
