// SPDX-License-Identifier: GPL-2.0-only
// PageStore: the pages files of one dump. A page is stored once, whichever processes and GPUs of
// the dump have it, and not at all if a dump that this one builds on has it; compressed and
// encrypted where that is asked for.
//
// That two pages are the same is said by their hashes, of the bytes that are saved, made with the
// same key. A page may have several owners. Its slot is used anew once it has none.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/page_codec.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/image/write_queue.h"

namespace phos {

struct PageStoreOptions {
  CompressionChoice compression = {};
  std::shared_ptr<const ImageKey> key = {};  // none: not encrypted
  UnsyncedFiles* later = nullptr;            // as for PageFileWriter
};

struct PageStoreStatistics {
  uint64_t pages = 0;   // that were claimed, so far
  uint64_t shared = 0;  // of those, the ones that the store or a parent had already
  uint64_t stored = 0;  // pages written
  uint64_t bytes = 0;   // of those, in the files
};

// Any thread, any number at a time.
class PageStore {
 public:
  using Options = PageStoreOptions;
  using Statistics = PageStoreStatistics;
  // Names a page as long as somebody owns it. Below kEnd.
  using PageId = uint32_t;
  static constexpr PageId kEnd = UINT32_MAX - 16;

  // `dir_fd` is not needed any more after the call.
  static Result<std::unique_ptr<PageStore>> create(int dir_fd, const DumpId& id, Options options);
  // Without finish() there are no files.
  ~PageStore();
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;

  // Begins the pages file of a process (as numbered in the images) and a GPU, unless it was begun
  // before. Returns its number.
  Result<uint32_t> add_file(int pid, int gpu);
  // Nothing more will be claimed for the file: if nobody's pages are in it, it is removed at once
  // (somebody may need the disk space).
  void end_file(uint32_t file);
  // Hashes that were made with different keys say nothing about each other. Returns the key's
  // number.
  uint32_t add_key(const std::vector<uint8_t>& hash_key);

  struct Claim {
    PageId page = 0;
    bool is_new = false;  // has to be stored by the caller: to be given to store()
    // Another one is storing it: to be given to wait() before anything relies on it.
    bool is_under_way = false;
  };
  // Becomes an owner of the page with this hash. If it is nowhere, it will be in `file`.
  // `previous`: what the owner's image builds on, or null. Errors: the dump has too many pages, or
  // is complete.
  Result<Claim> claim(uint32_t file, uint32_t key, const SavedHash& hash,
                      const PreviousPages* previous);
  // Is an owner no more.
  void drop(PageId page);

  struct NewPage {
    PageId page = 0;
    const void* data = nullptr;  // kImagePageSize bytes, aligned to kPageIoAlignment
  };
  // Stores pages that were claimed for one file, by one caller. Pages whose data follow each other
  // are written together. An error: none of them can be relied on, by nobody.
  Result<void> store(uint32_t file, std::span<const NewPage> pages);
  // The same, but goes on after the call, if it can. The data are in use until `done` is called,
  // once, on this thread or the store's own; as short as WriteQueue's.
  void store(uint32_t file, std::vector<NewPage> pages, WriteQueue::Done done);

  // Waits until the page is stored or not; whoever stores it does not wait for anybody. False: it
  // could not be stored, and has to be claimed anew.
  bool wait(PageId page);

  // Makes durable what is stored so far.
  Result<void> flush();
  // Completes the files; those that hold no page are removed. Nothing is claimed afterwards.
  // Further calls give the same answer.
  Result<void> finish();

  // Of a page that is stored.
  PagePlace place(PageId page) const;

  // What images of the dump say of themselves.
  const PagesLayout& layout() const { return format_.layout; }
  KeyId key_id() const { return options_.key ? options_.key->id() : KeyId(); }
  Statistics statistics() const;

 private:
  enum class State : uint8_t { kFree, kClaimed, kStored, kFailed };
  struct Entry {
    SavedHash hash{};
    uint32_t key = 0;
    uint32_t owners = 0;
    uint32_t file = 0;  // index into files_
    uint32_t slot = 0;
    PackedPage packed;
    State state = State::kFree;
    bool external = false;  // a parent's
  };
  struct File {
    PagesFileRef ref;
    std::unique_ptr<PageFileWriter> writer;          // null: a parent's
    std::map<uint32_t, std::vector<uint32_t>> free;  // by number of slots: where so many are free
    uint32_t next = 0;                               // slot
    uint64_t live = 0;                               // pages in it
  };
  struct Key {
    SavedHash hash;
    uint32_t key;
    bool operator==(const Key&) const = default;
  };
  struct KeyHasher {
    size_t operator()(const Key& k) const;
  };
  // Slots of pages that lie together, in the file and in memory.
  struct Write {
    uint32_t slot = 0, slots = 0;
    const void* data = nullptr;
  };

  PageStore(UniqueFd dir, const DumpId& id, Options options);

  PageId take_id();
  uint32_t external_file(const PagesFileRef& ref);
  std::optional<uint32_t> take_slots(File& file, uint32_t count);
  PageFileWriter* plan_writes(uint32_t file, std::span<const NewPage> pages,
                              std::vector<Write>* writes) const;
  Result<void> store_packed(uint32_t file, std::span<const NewPage> pages);
  Result<void> place_packed(File& file, std::span<const NewPage> pages,
                            std::span<const PackedPage> packed, uint8_t* data,
                            std::vector<Write>* writes);
  void settle(std::span<const NewPage> pages, State state);
  void free_slots(const Entry& entry);

  const UniqueFd dir_;
  const DumpId id_;
  const Options options_;
  PageFileFormat format_;
  std::optional<PageCodec> codec_;  // packed

  mutable std::mutex mutex_;
  std::condition_variable settled_;
  std::vector<std::unique_ptr<File>> files_;
  std::vector<Entry> entries_;
  std::vector<PageId> free_ids_;
  std::unordered_map<Key, PageId, KeyHasher> by_hash_;
  std::vector<std::vector<uint8_t>> keys_;
  Statistics statistics_;
  bool is_finished_ = false;
  Result<void> finished_;
  std::unique_ptr<WriteQueue> queue_;  // the first to go: uses the files
};

}  // namespace phos
