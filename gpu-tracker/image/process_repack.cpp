// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/process_repack.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/page_walk.h"
#include "gpu-tracker/image/saved_index.h"

namespace phos {

ProcessRepack::ProcessRepack(From from, const To& to)
    : from_(std::move(from)),
      to_(to),
      key_(to.store->add_key(from_.new_key ? from_.new_key->key : old_image().hash_key)) {
  std::optional<SavedIndex> index;
  if (from_.parent) index.emplace(from_.parent->image());
  for (size_t i = 0; i < old_image().allocations.size(); i++) {
    const AllocationInfo& a = old_image().allocations[i];
    if (a.hashes.empty()) continue;
    Item& item = items_.emplace_back();
    item.allocation = i;
    const AllocationInfo* there = nullptr;
    if (index) there = index->find(gpu_uuid_of(old_image(), a), a.address, a.size);
    if (there) {
      item.in_parent = static_cast<size_t>(there - from_.parent->image().allocations.data());
    }
  }
}

// ---- planning ----

// Reads all pages: their bytes decide which ones are equal to those that have the new key.
Result<void> ProcessRepack::rehash(const RepackOptions& options,
                                   const std::function<void(uint64_t)>& progress) {
  std::vector<uint64_t> pages;
  for (Item& item : items_) {
    item.hashes.resize(old_image().allocations[item.allocation].hashes.size());
    pages.push_back(item.hashes.size());
  }
  auto work = [&](const PageSpan& span, uint8_t* buffer) -> Result<void> {
    if (auto ok = options.check ? options.check() : Result<void>(); !ok) return ok;
    Item& item = items_[span.item];
    auto ok =
        read_checked(from_.chain, item.allocation, span.first_page, span.pages, from_.hash, buffer);
    for (uint32_t i = 0; ok && i < span.pages; i++) {
      item.hashes[span.first_page + i] = from_.new_key->hash(buffer + size_t{i} * kImagePageSize);
    }
    read_ += span.pages;
    return ok;
  };
  return walk_pages(pages, options.jobs, kSpanPages, work, [&] { progress(read_ / 2); });
}

Result<void> ProcessRepack::plan() {
  PageBuffer zeros = make_page_buffer(1);
  if (!zeros) return Error::from_errno(ENOMEM, "64 KiB for a page");
  memset(zeros.get(), 0, kImagePageSize);
  zero_hash_ = (from_.new_key ? from_.new_key->hash : from_.hash)(zeros.get());
  for (Item& item : items_) {
    for (const PageRun& run : from_.chain.runs(item.allocation)) {
      for (uint32_t i = 0; i < run.pages; i++) {
        auto ok = plan_page(run.part(run.first_page + i, 1), i > 0, &item);
        if (!ok) return ok;
      }
    }
  }
  return {};
}

// `joins`: the page before it is in the same run.
Result<void> ProcessRepack::plan_page(const PageRun& one, bool joins, Item* item) {
  Piece piece{fate_of(one, *item), one};
  if (piece.fate == Fate::kStored) {
    const int number = pages_file_number(old_image(), old_image().allocations[item->allocation]);
    if (auto ok = claim(hash_of(*item, one.first_page), number, &piece); !ok) return ok;
  }
  if (piece.fate != Fate::kStored && piece.fate != Fate::kParent) settled_++;
  if (joins) {
    Piece& last = item->pieces.back();
    const bool has_page = piece.fate == Fate::kStored || piece.fate == Fate::kEqual;
    if (last.fate == piece.fate && (!has_page || last.page + last.run.pages == piece.page)) {
      last.run.pages++;
      return {};
    }
  }
  item->pieces.push_back(piece);
  return {};
}

ProcessRepack::Fate ProcessRepack::fate_of(const PageRun& one, const Item& item) const {
  if (one.is_dropped()) return Fate::kDropped;
  const SavedHash& hash = hash_of(item, one.first_page);
  if (one.is_zero() || hash == zero_hash_) return Fate::kZero;
  if (item.in_parent) {
    const PageChain& parent = *from_.parent;
    const bool equal = parent.image().allocations[*item.in_parent].hashes[one.first_page] == hash;
    const bool there = !parent.locate(*item.in_parent, one.first_page)->is_dropped();
    if (equal && there) return Fate::kParent;
  }
  return to_.in_place && from_.chain.level(one) == 0 ? Fate::kKept : Fate::kStored;
}

Result<void> ProcessRepack::claim(const SavedHash& hash, int gpu, Piece* piece) {
  auto file = file_for(gpu);
  if (!file) return file.error();
  auto claimed = to_.store->claim(*file, key_, hash, nullptr);
  if (!claimed) return claimed.error();
  piece->file = *file;
  piece->page = claimed->page;
  if (!claimed->is_new) piece->fate = Fate::kEqual;
  return {};
}

// In place, the files of the GPUs are there already: another one joins them, with a number that is
// none of a GPU's.
Result<uint32_t> ProcessRepack::file_for(int gpu) {
  const int index = to_.in_place ? 0 : gpu;
  if (auto it = files_.find(index); it != files_.end()) return it->second;
  int number = gpu;
  if (to_.in_place) {
    auto free = free_page_file_number(to_.dir_fd, old_image());
    if (!free) return free.error();
    number = *free;
  }
  auto file = to_.store->add_file(old_image().pid, number);
  if (file) files_[index] = *file;
  return file;
}

// ---- copying ----

Result<void> ProcessRepack::copy(const RepackOptions& options,
                                 const std::function<void(uint64_t)>& progress) {
  if (from_.new_key) {
    if (auto ok = rehash(options, progress); !ok) return ok;
  }
  if (auto ok = plan(); !ok) return ok;
  std::vector<std::pair<const Item*, const Piece*>> reads;
  std::vector<uint64_t> pages;
  for (const Item& item : items_) {
    for (const Piece& piece : item.pieces) {
      if (piece.fate != Fate::kStored && piece.fate != Fate::kParent) continue;
      reads.emplace_back(&item, &piece);
      pages.push_back(piece.run.pages);
    }
  }
  auto work = [&](const PageSpan& span, uint8_t* buffer) -> Result<void> {
    if (auto ok = options.check ? options.check() : Result<void>(); !ok) return ok;
    const auto& [item, piece] = reads[span.item];
    read_ += span.pages;
    return copy_span(*item, *piece, span.first_page, span.pages, buffer);
  };
  const uint64_t rehashed = read_.exchange(0);
  return walk_pages(pages, options.jobs, kSpanPages, work, [&] {
    const uint64_t done = settled_ + read_;
    progress(from_.new_key ? (rehashed + done) / 2 : done);
  });
}

// Pages [first, first + pages) of the piece.
Result<void> ProcessRepack::copy_span(const Item& item, const Piece& piece, uint32_t first,
                                      uint32_t pages, uint8_t* buffer) const {
  const uint32_t page = piece.run.first_page + first;
  if (piece.fate == Fate::kParent) {
    const PageHasher& hash = from_.new_key ? from_.new_key->hash : from_.hash;
    return read_checked(*from_.parent, *item.in_parent, page, pages, hash, buffer);
  }
  auto ok = read_checked(from_.chain, item.allocation, page, pages, from_.hash, buffer);
  if (!ok) return ok;
  std::vector<PageStore::NewPage> stored(pages);
  for (uint32_t i = 0; i < pages; i++) {
    stored[i] = {piece.page + first + i, buffer + size_t{i} * kImagePageSize};
  }
  return to_.store->store(piece.file, stored);
}

// ---- the new image ----

ProcessImage ProcessRepack::new_image() const {
  ProcessImage image = old_image();
  image.other_files.clear();
  image.parent_dump_id = from_.parent ? from_.parent->image().dump_id : DumpId{};
  if (!to_.in_place) {
    image.layout = to_.store->layout();
    image.key_id = to_.store->key_id();
  }
  if (from_.new_key) image.hash_key = from_.new_key->key;
  for (const Item& item : items_) {
    AllocationInfo& a = image.allocations[item.allocation];
    a.hashes.clear();
    a.extents.clear();
    a.packed.clear();
    PageAppender pages(&image, &a);
    for (const Piece& piece : item.pieces) {
      for (uint32_t i = 0; i < piece.run.pages; i++) add(item, piece, i, &pages);
    }
  }
  return image;
}

void ProcessRepack::add(const Item& item, const Piece& piece, uint32_t i,
                        PageAppender* pages) const {
  const uint32_t page = piece.run.first_page + i;
  const SavedHash& hash = hash_of(item, page);
  switch (piece.fate) {
    case Fate::kZero:
      return pages->add(hash, PageSource::kZero);
    case Fate::kDropped:
      return pages->add(hash, PageSource::kDropped);
    case Fate::kParent:
      return pages->add(hash, PageSource::kParent);
    case Fate::kKept:
      return pages->add(hash, from_.chain.place(piece.run.part(page, 1)));
    case Fate::kStored:
    case Fate::kEqual:
      return pages->add(hash, to_.store->place(piece.page + i));
  }
}

Result<void> ProcessRepack::write(RepackReport* report) const {
  auto written = write_process_image(to_.dir_fd, new_image());
  if (!written) return written;
  for (const Item& item : items_) {
    for (const Piece& piece : item.pieces) {
      report->pages += piece.run.pages;
      (piece.fate == Fate::kZero      ? report->zero_pages
       : piece.fate == Fate::kDropped ? report->dropped_pages
       : piece.fate == Fate::kParent  ? report->parent_pages
       : piece.fate == Fate::kKept    ? report->kept_pages
       : piece.fate == Fate::kStored  ? report->stored_pages
                                      : report->equal_pages) += piece.run.pages;
    }
  }
  return {};
}

}  // namespace phos
