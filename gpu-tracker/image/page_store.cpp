// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_store.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

// Pages that are compressed before they are written: 4 MiB at most, taken for each store().
constexpr size_t kPackedAtOnce = 64;

const uint8_t* bytes_of(const void* data) {
  return static_cast<const uint8_t*>(data);
}

}  // namespace

size_t PageStore::KeyHasher::operator()(const Key& k) const {
  size_t start;  // the hash is keyed: whoever made the pages cannot make them meet in one bucket
  memcpy(&start, k.hash.data(), sizeof start);
  return start ^ k.key;
}

PageStore::PageStore(UniqueFd dir, const DumpId& id, Options options)
    : dir_(std::move(dir)), id_(id), options_(std::move(options)) {}
PageStore::~PageStore() = default;

Result<std::unique_ptr<PageStore>> PageStore::create(int dir_fd, const DumpId& id,
                                                     Options options) {
  UniqueFd dir(fcntl(dir_fd, F_DUPFD_CLOEXEC, 0));
  if (!dir) return Error::from_errno(errno, "cannot use the image directory");
  std::unique_ptr<PageStore> store(new PageStore(std::move(dir), id, std::move(options)));
  std::optional<SecretKey> key;
  if (store->options_.key) {
    auto keys = store->options_.key->derive(id);
    if (!keys) return keys.error();
    key = keys->pages;
  }
  PageCodec codec(store->options_.compression, key);
  store->format_ = {{!codec.plain(), codec.encrypts()}, store->options_.compression.method};
  if (!codec.plain()) store->codec_.emplace(std::move(codec));
  store->queue_ = WriteQueue::create();
  return store;
}

Result<uint32_t> PageStore::add_file(int pid, int gpu) {
  std::lock_guard<std::mutex> hold(mutex_);
  for (size_t i = 0; i < files_.size(); i++) {
    const File& file = *files_[i];
    if (file.writer && file.ref.pid == pid && file.ref.gpu == gpu) return static_cast<uint32_t>(i);
  }
  auto writer = PageFileWriter::create(dir_.get(), pid, gpu, id_, format_, options_.later);
  if (!writer) return writer.error();
  files_.push_back(std::make_unique<File>());
  files_.back()->ref = {id_, pid, gpu, format_.layout};
  files_.back()->writer = std::move(*writer);
  return static_cast<uint32_t>(files_.size() - 1);
}

void PageStore::end_file(uint32_t file) {
  std::lock_guard<std::mutex> hold(mutex_);
  if (files_[file]->live == 0) files_[file]->writer.reset();
}

uint32_t PageStore::add_key(const std::vector<uint8_t>& hash_key) {
  std::lock_guard<std::mutex> hold(mutex_);
  auto it = std::find(keys_.begin(), keys_.end(), hash_key);
  if (it == keys_.end()) it = keys_.insert(keys_.end(), hash_key);
  return static_cast<uint32_t>(it - keys_.begin());
}

PageStore::PageId PageStore::take_id() {
  if (free_ids_.empty()) {
    entries_.emplace_back();
    return static_cast<PageId>(entries_.size() - 1);
  }
  const PageId id = free_ids_.back();
  free_ids_.pop_back();
  return id;
}

uint32_t PageStore::external_file(const PagesFileRef& ref) {
  for (size_t i = 0; i < files_.size(); i++) {
    if (files_[i]->ref == ref) return static_cast<uint32_t>(i);
  }
  files_.push_back(std::make_unique<File>());
  files_.back()->ref = ref;
  return static_cast<uint32_t>(files_.size() - 1);
}

// Where a page was before, or as many in a row; else at the end. Nothing: the file is full.
std::optional<uint32_t> PageStore::take_slots(File& file, uint32_t count) {
  auto it = file.free.find(count);
  if (it != file.free.end() && !it->second.empty()) {
    const uint32_t slot = it->second.back();
    it->second.pop_back();
    return slot;
  }
  if (count > UINT32_MAX - file.next) return std::nullopt;
  return std::exchange(file.next, file.next + count);
}

Result<PageStore::Claim> PageStore::claim(uint32_t file, uint32_t key, const SavedHash& hash,
                                          const PreviousPages* previous) {
  std::lock_guard<std::mutex> hold(mutex_);
  if (is_finished_) {
    return Error(Domain::kUsage, EINVAL, "the pages files of this dump are complete already");
  }
  statistics_.pages++;
  auto it = by_hash_.find({hash, key});
  if (it != by_hash_.end()) {
    Entry& e = entries_[it->second];
    e.owners++;
    statistics_.shared++;
    return Claim{it->second, false, e.state == State::kClaimed};
  }
  if (entries_.size() >= kEnd && free_ids_.empty()) {
    return Error(Domain::kUsage, EOVERFLOW, "a dump has no more than 2^32 different pages");
  }
  const auto there = previous ? previous->find(hash) : std::nullopt;
  std::optional<uint32_t> slot;
  if (!there && !codec_) {
    slot = take_slots(*files_[file], 1);
    if (!slot) return Error(Domain::kUsage, EOVERFLOW, "no more pages fit in one file");
  }
  const PageId id = take_id();
  Entry& e = entries_[id];
  e = {hash, key, 1, file, slot.value_or(0), {}, State::kClaimed, there.has_value()};
  if (there) {
    // Only for owners that build on the same dumps: it is not in by_hash_.
    e.file = external_file(there->file);
    e.slot = there->slot;
    e.packed = there->packed;
    e.state = State::kStored;
    statistics_.shared++;
    return Claim{id, false, false};
  }
  files_[file]->live++;
  by_hash_.emplace(Key{hash, key}, id);
  return Claim{id, true, false};
}

void PageStore::free_slots(const Entry& e) {
  File& file = *files_[e.file];
  file.live--;
  const uint32_t count = codec_ ? units_of(e.packed.bytes) : 1;
  if (count) file.free[count].push_back(e.slot);
}

void PageStore::drop(PageId page) {
  std::lock_guard<std::mutex> hold(mutex_);
  Entry& e = entries_[page];
  if (--e.owners > 0) return;
  if (!e.external) {
    if (e.state != State::kFailed) by_hash_.erase({e.hash, e.key});
    free_slots(e);
  }
  e = {};
  free_ids_.push_back(page);
}

void PageStore::settle(std::span<const NewPage> pages, State state) {
  std::lock_guard<std::mutex> hold(mutex_);
  for (const NewPage& p : pages) {
    Entry& e = entries_[p.page];
    e.state = state;
    if (state == State::kFailed) {
      by_hash_.erase({e.hash, e.key});
      continue;
    }
    statistics_.stored++;
    statistics_.bytes += codec_ ? uint64_t{units_of(e.packed.bytes)} * kPageUnit : kImagePageSize;
  }
  settled_.notify_all();
}

Result<void> PageStore::store(uint32_t file, std::span<const NewPage> pages) {
  Result<void> done;
  if (codec_) {
    done = store_packed(file, pages);
  } else {
    std::vector<Write> writes;
    PageFileWriter* const writer = plan_writes(file, pages, &writes);
    for (const Write& w : writes) {
      if (done) done = writer->write(w.slot, w.data, w.slots);
    }
  }
  settle(pages, done ? State::kStored : State::kFailed);
  return done;
}

void PageStore::store(uint32_t file, std::vector<NewPage> pages, WriteQueue::Done done) {
  // What is packed is in memory that goes with the call.
  if (codec_ || pages.empty()) return done(store(file, pages));
  struct Batch {
    std::vector<NewPage> pages;
    WriteQueue::Done done;
    std::mutex mutex;
    size_t left = 0;  // writes
    Result<void> result;
  };
  auto batch = std::make_shared<Batch>();
  batch->pages = std::move(pages);
  batch->done = std::move(done);
  std::vector<Write> writes;
  PageFileWriter* const writer = plan_writes(file, batch->pages, &writes);
  batch->left = writes.size();
  for (const Write& w : writes) {
    writer->write_async(*queue_, w.slot, w.data, w.slots, [this, batch](const Result<void>& r) {
      {
        std::lock_guard<std::mutex> hold(batch->mutex);
        if (!r && batch->result) batch->result = r;
        if (--batch->left > 0) return;
      }
      settle(batch->pages, batch->result ? State::kStored : State::kFailed);
      batch->done(batch->result);
    });
  }
}

// Pages that follow each other in the file and in memory are written together.
PageFileWriter* PageStore::plan_writes(uint32_t file, std::span<const NewPage> pages,
                                       std::vector<Write>* writes) const {
  std::lock_guard<std::mutex> hold(mutex_);
  for (const NewPage& p : pages) {
    const uint32_t slot = entries_[p.page].slot;
    if (!writes->empty()) {
      Write& last = writes->back();
      if (last.slot + last.slots == slot &&
          bytes_of(last.data) + uint64_t{last.slots} * kImagePageSize == p.data) {
        last.slots++;
        continue;
      }
    }
    writes->push_back({slot, 1, p.data});
  }
  return files_[file]->writer.get();
}

Result<void> PageStore::store_packed(uint32_t file, std::span<const NewPage> pages) {
  const PageBuffer buffer = make_page_buffer(std::min(pages.size(), kPackedAtOnce));
  if (!buffer) return Error::from_errno(ENOMEM, "a buffer for packed pages");
  File* to;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    to = files_[file].get();
  }
  while (!pages.empty()) {
    const auto some = pages.first(std::min(pages.size(), kPackedAtOnce));
    std::vector<PackedPage> packed(some.size());
    uint8_t* end = buffer.get();
    for (size_t i = 0; i < some.size(); i++) {
      auto bytes =
          codec_->encode(some[i].data, end, codec_->encrypts() ? &packed[i].seal : nullptr);
      if (!bytes) return bytes.error();
      packed[i].bytes = *bytes;
      end += uint64_t{units_of(*bytes)} * kPageUnit;
    }
    std::vector<Write> writes;
    if (auto ok = place_packed(*to, some, packed, buffer.get(), &writes); !ok) return ok;
    for (const Write& w : writes) {
      if (auto ok = to->writer->write(w.slot, w.data, w.slots); !ok) return ok;
    }
    pages = pages.subspan(some.size());
  }
  return {};
}

// Now that it is known how much each of them takes. `data`: one after the other.
Result<void> PageStore::place_packed(File& file, std::span<const NewPage> pages,
                                     std::span<const PackedPage> packed, uint8_t* data,
                                     std::vector<Write>* writes) {
  std::lock_guard<std::mutex> hold(mutex_);
  for (size_t i = 0; i < pages.size(); i++) {
    const uint32_t units = units_of(packed[i].bytes);
    const auto slot = take_slots(file, units);
    if (!slot) return Error(Domain::kUsage, EOVERFLOW, "no more pages fit in one file");
    entries_[pages[i].page].slot = *slot;
    entries_[pages[i].page].packed = packed[i];
    if (!writes->empty() && writes->back().slot + writes->back().slots == *slot) {
      writes->back().slots += units;
    } else {
      writes->push_back({*slot, units, data});
    }
    data += uint64_t{units} * kPageUnit;
  }
  return {};
}

bool PageStore::wait(PageId page) {
  std::unique_lock<std::mutex> hold(mutex_);
  settled_.wait(hold, [&] { return entries_[page].state != State::kClaimed; });
  return entries_[page].state == State::kStored;
}

Result<void> PageStore::flush() {
  std::vector<PageFileWriter*> writers;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    for (const auto& f : files_) {
      if (f->writer) writers.push_back(f->writer.get());
    }
  }
  for (PageFileWriter* w : writers) {
    if (auto ok = w->flush(); !ok) return ok;
  }
  return {};
}

Result<void> PageStore::finish() {
  std::lock_guard<std::mutex> hold(mutex_);
  if (is_finished_) return finished_;
  is_finished_ = true;
  for (const auto& f : files_) {
    if (finished_ && f->writer && f->live > 0) finished_ = f->writer->finish();
  }
  for (const auto& f : files_) f->writer.reset();  // without finish(): removes it
  return finished_;
}

PagePlace PageStore::place(PageId page) const {
  std::lock_guard<std::mutex> hold(mutex_);
  const Entry& e = entries_[page];
  return {files_[e.file]->ref, e.slot, e.packed};
}

PageStore::Statistics PageStore::statistics() const {
  std::lock_guard<std::mutex> hold(mutex_);
  return statistics_;
}

}  // namespace phos
