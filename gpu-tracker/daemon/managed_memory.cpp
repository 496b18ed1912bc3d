// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/managed_memory.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "gpu-tracker/daemon/load.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

static_assert(kPageBytes == kImagePageSize && kManagedPiece % kPageBytes == 0);
constexpr uint32_t kPagesInPiece = kManagedPiece / kPageBytes;

std::vector<uint8_t> bytes_of(const PageHashKey& key) {
  const std::string bytes = key.to_bytes();
  return {bytes.begin(), bytes.end()};
}

size_t pages_of(const ManagedPiece& piece) {
  return (piece.bytes + kPageBytes - 1) / kPageBytes;
}

std::vector<PageHash> hash(const PageHashKey& key, const ManagedPiece& piece) {
  std::vector<PageHash> hashes;
  for (size_t i = 0; i < pages_of(piece); i++) {
    hashes.push_back(hash_page(key, piece.data + i * kPageBytes, kPageBytes));
  }
  return hashes;
}

}  // namespace

ManagedCopy::ManagedCopy(std::shared_ptr<PageStore> store, uint32_t file, const PageHashKey& key,
                         const PreviousPages* previous)
    : store_(std::move(store)),
      file_(file),
      key_(key),
      key_number_(store_->add_key(bytes_of(key))),
      previous_(previous),
      zero_(hash_of_zeros(key)) {}

Result<DumpRound> ManagedCopy::save(Agent& agent, const std::vector<AgentAllocation>& memory) {
  const auto start = std::chrono::steady_clock::now();
  for (const AgentAllocation& a : memory) copied_.emplace_back().begin(a, previous_);
  auto r = agent.read_managed(memory, true, [&](const ManagedPiece& piece) { return save(piece); });
  if (!r) return r.error();
  round_.us = static_cast<uint64_t>(since(start).count());
  return round_;
}

Result<void> ManagedCopy::save(const ManagedPiece& piece) {
  CopiedAllocation& to = copied_[piece.allocation];
  const size_t first = piece.offset / kPageBytes;
  const std::vector<PageHash> hashes = hash(key_, piece);
  DumpRound done;
  done.pages = hashes.size();
  std::vector<size_t> dirty;
  for (size_t i = 0; i < hashes.size(); i++) {
    const uint32_t where = to.where[first + i];
    if (where == CopiedAllocation::kInParent && to.saved[first + i] == hashes[i]) continue;
    done.dirty_pages++;
    done.bytes += std::min<uint64_t>(piece.bytes - i * kPageBytes, kPageBytes);
    to.saved[first + i] = hashes[i];
    to.where[first + i] = CopiedAllocation::kZero;
    if (hashes[i] != zero_) dirty.push_back(i);
  }
  while (!dirty.empty()) {
    std::vector<size_t> again;
    if (auto r = save(to, first, hashes, piece.data, dirty, &again); !r) return r;
    dirty = std::move(again);
  }
  std::lock_guard<std::mutex> hold(mutex_);
  round_.pages += done.pages;
  round_.dirty_pages += done.dirty_pages;
  round_.bytes += done.bytes;
  return {};
}

// `again`: pages that somebody else was to store, who could not.
Result<void> ManagedCopy::save(CopiedAllocation& to, size_t first,
                               const std::vector<PageHash>& hashes, const uint8_t* data,
                               const std::vector<size_t>& pages, std::vector<size_t>* again) {
  std::vector<PageStore::NewPage> fresh;
  std::vector<std::pair<size_t, PageStore::PageId>> awaited;
  Result<void> claimed;
  for (const size_t i : pages) {
    auto claim = store_->claim(file_, key_number_, hashes[i].bytes, previous_);
    if (!claim) {
      claimed = claim.error();
      break;
    }
    to.where[first + i] = claim->page;
    if (claim->is_new) fresh.push_back({claim->page, data + i * kPageBytes});
    if (claim->is_under_way) awaited.emplace_back(i, claim->page);
  }
  // What was claimed must be stored, or be known not to be, whatever else has failed.
  auto stored = store_->store(file_, fresh);
  if (!claimed) return claimed;
  if (!stored) return stored;
  for (const auto& [i, page] : awaited) {
    if (store_->wait(page)) continue;
    store_->drop(page);
    again->push_back(i);
  }
  return {};
}

Result<void> ManagedCopy::finish(ProcessImage* image) {
  if (auto r = store_->finish(); !r) return r;
  image->hash_key = bytes_of(key_);
  if (previous_) image->parent_dump_id = previous_->dump_id();
  for (const CopiedAllocation& copied : copied_) {
    auto info = std::find_if(image->allocations.begin(), image->allocations.end(),
                             [&](const auto& a) { return a.address == copied.seen.address; });
    if (info == image->allocations.end() || info->size != copied.seen.size || info->gpu < 0) {
      return Error(Domain::kUsage, EINVAL,
                   "managed memory that the image does not list, or lists otherwise");
    }
    info->path = MemoryPath::kReleased;
    add_pages(copied, *store_, image, &*info);
  }
  image->rounds.push_back(round_);
  return {};
}

namespace {

// Of the allocation's pages, in order: whole windows full, whatever they are made of, since each
// piece costs both sides a wait. Left out is what is zeros only: the memory is new, and so holds
// zeros; as everything else, they are looked at later. Small memory may be where there was other
// before.
void plan_pieces(const PageChain& chain, const ManagedToLoad& work, size_t number,
                 std::vector<ManagedPiece>* pieces, std::vector<std::vector<PageRun>>* runs) {
  const uint64_t size = work.target.size;
  std::vector<PageRun> parts;
  uint32_t first = 0, pages = 0;
  const auto end_piece = [&] {
    const bool zero =
        std::all_of(parts.begin(), parts.end(), [](const PageRun& part) { return part.is_zero(); });
    if (!zero || size < kManagedPiece) {
      const uint64_t offset = uint64_t{first} * kPageBytes;
      const uint64_t bytes = std::min(uint64_t{pages} * kPageBytes, size - offset);
      pieces->push_back(
          {.allocation = number, .offset = offset, .bytes = static_cast<uint32_t>(bytes)});
      runs->push_back(std::move(parts));
    }
    parts.clear();
    first += pages;
    pages = 0;
  };
  for (const PageRun& run : chain.runs(work.allocation)) {
    for (uint32_t at = 0; at < run.pages;) {
      const uint32_t count = std::min(run.pages - at, kPagesInPiece - pages);
      parts.push_back(run.part(run.first_page + at, count));
      pages += count;
      at += count;
      if (pages == kPagesInPiece) end_piece();
    }
  }
  if (pages) end_piece();
}

}  // namespace

Result<uint64_t> load_managed(Agent& agent, const PageChain& chain,
                              const std::vector<ManagedToLoad>& work) {
  if (work.empty()) return uint64_t{0};
  auto key = PageHashKey::from_bytes(chain.image().hash_key);
  if (!key) return key.error();
  std::vector<AgentAllocation> memory;
  std::vector<ManagedPiece> pieces;
  std::vector<std::vector<PageRun>> runs;  // of each piece
  uint64_t bytes = 0;
  for (size_t i = 0; i < work.size(); i++) {
    const AgentAllocation& target = work[i].target;
    if (auto r = check_saved(chain, work[i].allocation); !r) return r.error();
    memory.push_back(target);
    bytes += target.size;
    plan_pieces(chain, work[i], i, &pieces, &runs);
  }
  const auto name_of = [&](const ManagedPiece& piece, uint64_t page) {
    const AgentAllocation& a = work[piece.allocation].target;
    return describe_memory(a.device_uuid, a.address, a.size) + ", offset " +
           std::to_string(page * kPageBytes) + ": ";
  };
  auto loaded = agent.load_managed(memory, pieces, [&](const ManagedPiece& piece) -> Result<void> {
    uint64_t at = 0;
    for (const PageRun& run : runs[piece.number]) {
      const uint64_t bytes = std::min(uint64_t{run.pages} * kPageBytes, piece.bytes - at);
      auto read = run.is_zero() ? Result<void>() : chain.read(run, piece.data + at);
      if (!read) {
        return read.error().wrap(name_of(piece, run.first_page) + "it is not what was saved (" +
                                 chain.describe(run) + ")");
      }
      if (run.is_zero()) memset(piece.data + at, 0, bytes);
      at += bytes;
    }
    return {};
  });
  if (!loaded) return loaded.error();
  auto proved = agent.read_managed(memory, false, [&](const ManagedPiece& piece) -> Result<void> {
    const size_t allocation = work[piece.allocation].allocation;
    const AllocationInfo& a = chain.image().allocations[allocation];
    const std::vector<PageHash> now = hash(*key, piece);
    for (size_t i = 0; i < now.size(); i++) {
      const uint64_t page = piece.offset / kPageBytes + i;
      if (now[i].bytes == a.hashes[page]) continue;
      return Error(Domain::kFormat, EBADMSG,
                   name_of(piece, page) + why_page_differs(chain, *key, allocation, page));
    }
    return {};
  });
  if (!proved) return proved.error();
  return bytes;
}

}  // namespace phos
