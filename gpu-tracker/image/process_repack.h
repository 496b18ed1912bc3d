// SPDX-License-Identifier: GPL-2.0-only
// Repacks one process (repack.h): what becomes of each page is planned, then pages are copied to
// the store, and when that is complete, the new image is made. Internal to this room.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/image/repack.h"
#include "gpu-tracker/image/verify.h"

namespace phos {

// A key that hashes are to be made with instead of the image's own.
struct NewKey {
  std::vector<uint8_t> key;
  PageHasher hash;
};

class ProcessRepack {
 public:
  // What is read.
  struct From {
    PageChain chain;
    PageHasher hash;                  // with the image's key
    std::optional<NewKey> new_key;    // nothing: the key stays
    std::optional<PageChain> parent;  // the new one, which has the new key
  };
  // What is written.
  struct To {
    PageStore* store = nullptr;
    int dir_fd = -1;
    bool in_place = false;  // it is the image's own directory: the pages that are there stay
  };

  ProcessRepack(From from, const To& to);

  // `progress` is told how many pages are done.
  Result<void> copy(const RepackOptions& options, const std::function<void(uint64_t)>& progress);
  // Once the store is complete. Adds to `report`.
  Result<void> write(RepackReport* report) const;

 private:
  enum class Fate : uint8_t { kZero, kDropped, kParent, kKept, kStored, kEqual };
  // Pages that share it, one after the other.
  struct Piece {
    Fate fate = Fate::kZero;
    PageRun run;                 // where they are now
    uint32_t file = 0;           // kStored: the store's number of it
    PageStore::PageId page = 0;  // kStored, kEqual: of the first; the others' follow
  };
  // An allocation with pages.
  struct Item {
    size_t allocation = 0;
    std::optional<size_t> in_parent;  // the allocation at the same place
    std::vector<SavedHash> hashes;    // with the new key; empty: it has none
    std::vector<Piece> pieces;        // all of its pages, in order
  };

  const ProcessImage& old_image() const { return from_.chain.image(); }
  const SavedHash& hash_of(const Item& item, uint32_t page) const {
    return item.hashes.empty() ? old_image().allocations[item.allocation].hashes[page]
                               : item.hashes[page];
  }
  Result<void> rehash(const RepackOptions& options, const std::function<void(uint64_t)>& progress);
  Result<void> plan();
  Result<void> plan_page(const PageRun& one, bool joins, Item* item);
  Fate fate_of(const PageRun& one, const Item& item) const;
  Result<void> claim(const SavedHash& hash, int gpu, Piece* piece);
  Result<uint32_t> file_for(int gpu);
  Result<void> copy_span(const Item& item, const Piece& piece, uint32_t first, uint32_t pages,
                         uint8_t* buffer) const;
  ProcessImage new_image() const;
  void add(const Item& item, const Piece& piece, uint32_t i, PageAppender* pages) const;

  const From from_;
  const To to_;
  uint32_t key_ = 0;  // the store's number of it
  SavedHash zero_hash_{};
  std::vector<Item> items_;
  std::map<int, uint32_t> files_;  // the store's, by GPU; in place there is one for all
  uint64_t settled_ = 0;           // pages that need not be read
  std::atomic<uint64_t> read_{0};
};

}  // namespace phos
