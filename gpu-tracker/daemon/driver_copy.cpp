// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/driver_copy.h"

#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string_view>
#include <utility>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

static_assert(kPageBytes == kImagePageSize);

bool is_driver_copy(const AllocationInfo& a) {
  return a.path == MemoryPath::kCopy;
}

using TransferMemory = ssize_t (*)(pid_t, const iovec*, unsigned long, const iovec*, unsigned long,
                                   unsigned long);

Result<void> transfer(TransferMemory call, int pid, void* here, uint64_t there, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const iovec local{static_cast<uint8_t*>(here) + done, bytes - done};
    const iovec remote{reinterpret_cast<void*>(there + done), bytes - done};
    const ssize_t n = call(pid, &local, 1, &remote, 1, 0);
    if (n > 0) {
      done += static_cast<size_t>(n);
      continue;
    }
    char text[80];
    snprintf(text, sizeof text, "the driver's copy at %#llx",
             static_cast<unsigned long long>(there + done));
    return Error::from_errno(n < 0 ? errno : EFAULT, process(pid) + ": " + text);
  }
  return {};
}

// One saving of one process's copy.
class Saving {
 public:
  Saving(int pid, const PageHashKey& key, uint32_t key_number, uint32_t file, PageStore* store,
         const PreviousPages* previous)
      : pid_(pid),
        key_(key),
        key_number_(key_number),
        file_(file),
        store_(*store),
        previous_(previous) {
    const std::vector<uint8_t> zeros(kPageBytes);
    zero_ = hash_page(key_, zeros.data(), zeros.size());
  }
  // Pages of a store that is given up need no owner.
  Saving(const Saving&) = delete;
  Saving& operator=(const Saving&) = delete;

  Result<void> run(std::span<const AddressRange> ranges) {
    std::vector<uint64_t> pages;
    for (const AddressRange& r : ranges) {
      Copy& copy = copies_.emplace_back();
      copy.address = r.begin;
      copy.size = r.end - r.begin;
      copy.pages.resize((copy.size + kPageBytes - 1) / kPageBytes);
      pages.push_back(copy.pages.size());
    }
    auto work = [this](const PageSpan& span, uint8_t* buffer) { return save(span, buffer); };
    if (auto r = walk_pages(pages, 0, kSpanPages, work, {}); !r) return r;
    for (PageStore::PageId id : awaited_) {
      if (!store_.wait(id))
        return Error::from_errno(EIO, "a page of the driver's copy is not stored");
    }
    return store_.finish();
  }

  void add_to(ProcessImage* image) const {
    for (const Copy& copy : copies_) {
      AllocationInfo info;
      info.address = copy.address;
      info.size = copy.size;
      info.kind = MemoryKind::kHost;
      info.path = MemoryPath::kCopy;
      PageAppender pages(image, &info);
      for (const Page& page : copy.pages) {
        if (page.id == kZero) {
          pages.add(page.hash, PageSource::kZero);
        } else {
          pages.add(page.hash, store_.place(page.id));
        }
      }
      image->allocations.push_back(std::move(info));
    }
  }

 private:
  static constexpr PageStore::PageId kZero = UINT32_MAX;
  static_assert(kZero >= PageStore::kEnd);
  struct Page {
    SavedHash hash{};
    PageStore::PageId id = kZero;
  };
  struct Copy {
    uint64_t address = 0, size = 0;
    std::vector<Page> pages;
  };

  // On any of several threads. `buffer` holds what is hashed, and is what is stored.
  Result<void> save(const PageSpan& span, uint8_t* buffer) {
    Copy& copy = copies_[span.item];
    const uint64_t offset = uint64_t{span.first_page} * kPageBytes;
    const size_t room = size_t{span.pages} * kPageBytes;
    const size_t bytes = std::min<uint64_t>(room, copy.size - offset);
    auto r = transfer(process_vm_readv, pid_, buffer, copy.address + offset, bytes);
    if (!r) return r;
    memset(buffer + bytes, 0, room - bytes);
    std::vector<PageStore::NewPage> fresh;
    for (uint32_t i = 0; r && i < span.pages; i++) {
      const uint8_t* data = buffer + size_t{i} * kPageBytes;
      Page& page = copy.pages[span.first_page + i];
      page.hash = hash_page(key_, data, kPageBytes).bytes;
      if (page.hash == zero_.bytes) continue;
      auto claim = store_.claim(file_, key_number_, page.hash, previous_);
      if (!claim) {
        r = claim.error();
        break;
      }
      page.id = claim->page;
      if (claim->is_new) fresh.push_back({claim->page, data});
      if (claim->is_under_way) {
        std::lock_guard<std::mutex> hold(mutex_);
        awaited_.push_back(claim->page);
      }
    }
    // What was claimed must be stored, or be known not to be, whatever else has failed.
    auto stored = store_.store(file_, fresh);
    return r ? stored : r;
  }

  const int pid_;
  const PageHashKey& key_;
  const uint32_t key_number_, file_;
  PageStore& store_;
  const PreviousPages* const previous_;
  PageHash zero_;
  std::vector<Copy> copies_;
  std::mutex mutex_;
  std::vector<PageStore::PageId> awaited_;
};

}  // namespace

bool has_driver_copy(const ProcessImage& image) {
  return std::any_of(image.allocations.begin(), image.allocations.end(), is_driver_copy);
}

Result<std::vector<AddressRange>> usable_copies(const std::vector<ProcMapping>& maps,
                                                const std::vector<AddressRange>& noted,
                                                uint64_t most) {
  constexpr uint64_t kPage = 4096;
  std::vector<AddressRange> usable;
  uint64_t bytes = 0;
  for (const AddressRange& range : noted) {
    const bool is_plain = std::any_of(maps.begin(), maps.end(), [&](const ProcMapping& m) {
      return m.start <= range.begin && m.end >= range.end && m.path.empty() &&
             std::string_view(m.perms) == "rw-p";
    });
    if (range.begin >= range.end || range.begin % kPage || range.end % kPage || !is_plain) continue;
    const bool again = std::any_of(usable.begin(), usable.end(), [&](const AddressRange& other) {
      return range.begin < other.end && other.begin < range.end;
    });
    bytes += range.end - range.begin;
    if (again || bytes > most) {
      return Error(Domain::kFormat, EPROTO,
                   "what its agent says of the driver's copy makes no sense");
    }
    usable.push_back(range);
  }
  return usable;
}

Result<uint64_t> save_driver_copy(int pid, std::span<const AddressRange> ranges, PageStore* store,
                                  const PreviousPages* previous, ProcessImage* image) {
  auto key = PageHashKey::from_bytes(image->hash_key);
  if (!key) return key.error();
  auto file = store->add_file(image->pid, static_cast<int>(image->gpus.size()));
  if (!file) return file.error();
  Saving saving(pid, *key, store->add_key(image->hash_key), *file, store, previous);
  if (auto r = saving.run(ranges); !r) return r.error();
  saving.add_to(image);
  uint64_t bytes = 0;
  for (const AddressRange& r : ranges) bytes += r.end - r.begin;
  return bytes;
}

Result<uint64_t> load_driver_copy(int pid, const PageChain& chain) {
  const ProcessImage& image = chain.image();
  auto key = PageHashKey::from_bytes(image.hash_key);
  if (!key) return key.error();
  const PageHasher hash = [&](const void* page) { return hash_page(*key, page, kPageBytes).bytes; };
  std::vector<size_t> copies;
  std::vector<uint64_t> pages;
  uint64_t bytes = 0;
  for (size_t i = 0; i < image.allocations.size(); i++) {
    if (!is_driver_copy(image.allocations[i])) continue;
    copies.push_back(i);
    pages.push_back(image.allocations[i].hashes.size());
    bytes += image.allocations[i].size;
  }
  auto work = [&](const PageSpan& span, uint8_t* buffer) -> Result<void> {
    const size_t index = copies[span.item];
    const AllocationInfo& a = image.allocations[index];
    auto r = read_checked(chain, index, span.first_page, span.pages, hash, buffer);
    if (!r) return r;
    const uint64_t offset = uint64_t{span.first_page} * kPageBytes;
    const uint64_t n = std::min<uint64_t>(uint64_t{span.pages} * kPageBytes, a.size - offset);
    return transfer(process_vm_writev, pid, buffer, a.address + offset, n);
  };
  if (auto r = walk_pages(pages, 0, kSpanPages, work, {}); !r) return r.error();
  return bytes;
}

}  // namespace phos
