// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/copied_memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <stop_token>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

static_assert(kPageBytes == kImagePageSize);

// Enough to keep a disk's queue full with requests of megabytes, and to hash them before.
constexpr int kWriterThreads = 4;
// The process that is copied needs the CPUs, too.
constexpr int kWriterNice = 10;

std::vector<uint8_t> bytes_of(const PageHashKey& key) {
  const std::string bytes = key.to_bytes();
  return {bytes.begin(), bytes.end()};
}

}  // namespace

PageHash hash_of_zeros(const PageHashKey& key) {
  static const std::vector<uint8_t> kZeros(kPageBytes);
  return hash_page(key, kZeros.data(), kZeros.size());
}

void CopiedAllocation::begin(const AgentAllocation& allocation, const PreviousPages* previous) {
  seen = allocation;
  const size_t pages = (allocation.size + kPageBytes - 1) / kPageBytes;
  saved.resize(pages);
  where.assign(pages, kNowhere);
  const AllocationInfo* before =
      previous ? previous->find(allocation.device_uuid, allocation.address, allocation.size)
               : nullptr;
  for (size_t i = 0; before && i < pages; i++) saved[i].bytes = before->hashes[i];
  for (const PageExtent& e : before ? before->extents : std::vector<PageExtent>()) {
    if (e.source == PageSource::kDropped) continue;
    std::fill_n(where.begin() + e.first_page, e.pages, kInParent);
  }
}

// Hashes buffers, unless the GPU has, and saves them, on threads of its own, so that the GPU need
// not wait. A round has each page once, so the order does not matter.
class CopiedMemory::Writers {
 public:
  // Called for each buffer, on any of the threads; calls what it is given when the buffer is not
  // needed any more.
  using Save = std::function<void(const CopiedPages&, WriteQueue::Done)>;

  Writers(const PageHashKey& key, Save save) : key_(key), save_(std::move(save)) {
    for (int i = 0; i < kWriterThreads; i++) threads_.emplace_back([this] { run(); });
  }
  ~Writers() { (void)finish(false); }

  // Fails with the first error of an earlier write.
  Result<void> write(CopiedPages copied) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (error_) return *error_;
    work_.push_back(std::move(copied));
    changed_.notify_one();
    return {};
  }

  // All is saved, or the first error. What waits is dropped unless it is `wanted`.
  Result<void> finish(bool wanted) {
    {
      std::lock_guard<std::mutex> hold(mutex_);
      ending_ = true;
      if (!wanted) work_.clear();
      changed_.notify_all();
    }
    for (auto& t : threads_) {
      if (t.joinable()) t.join();
    }
    std::unique_lock<std::mutex> hold(mutex_);
    changed_.wait(hold, [&] { return saving_ == 0; });
    if (error_) return *error_;
    return {};
  }

 private:
  void run() {
    (void)setpriority(PRIO_PROCESS, static_cast<id_t>(gettid()), kWriterNice);
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      changed_.wait(hold, [&] { return ending_ || !work_.empty(); });
      if (work_.empty()) return;
      auto copied = std::make_shared<CopiedPages>(std::move(work_.front()));
      work_.pop_front();
      if (error_) continue;
      saving_++;
      hold.unlock();
      copied->hash(key_);
      save_(*copied, [this, copied](const Result<void>& saved) { end(copied.get(), saved); });
      copied.reset();
      hold.lock();
    }
  }

  void end(CopiedPages* copied, const Result<void>& saved) {
    copied->buffer.reset();
    std::lock_guard<std::mutex> hold(mutex_);
    if (!saved && !error_) error_ = saved.error();
    saving_--;
    changed_.notify_all();
  }

  const PageHashKey& key_;
  const Save save_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<CopiedPages> work_;
  std::optional<Error> error_;
  unsigned saving_ = 0;
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

void add_pages(const CopiedAllocation& copied, const PageStore& store, ProcessImage* image,
               AllocationInfo* info) {
  PageAppender pages(image, info);
  info->hashes.reserve(copied.pages());
  for (size_t i = 0; i < copied.pages(); i++) {
    const SavedHash& hash = copied.saved[i].bytes;
    const uint32_t where = copied.where[i];
    if (CopiedAllocation::is_stored(where)) {
      pages.add(hash, store.place(where));
    } else {
      pages.add(hash, where == CopiedAllocation::kZero ? PageSource::kZero : PageSource::kParent);
    }
  }
}

CopiedMemory::CopiedMemory(GpuEngines::User gpu, int gpu_index, std::shared_ptr<PageStore> store,
                           uint32_t file, const PageHashKey& key, const PreviousPages* previous)
    : gpu_(std::move(gpu)),
      gpu_index_(gpu_index),
      store_(std::move(store)),
      file_(file),
      key_(key),
      key_number_(store_->add_key(bytes_of(key))),
      previous_(previous),
      zero_(hash_of_zeros(key)) {}

CopiedMemory::~CopiedMemory() {
  (void)release();
  for (auto& [address, a] : allocations_) {
    for (uint32_t& where : a.where) drop(&where);
  }
  store_->end_file(file_);
}

Result<void> CopiedMemory::add(const AgentAllocation& allocation, AgentExport handle) {
  CopiedAllocation copied;
  auto mapped =
      handle.type == ExportType::kIpc
          ? gpu_->context->import_ipc(handle.ipc_handle)
          : gpu_->context->import_fd(handle.fd.get(), allocation.mapping_size, MemoryAccess::kRead);
  if (!mapped) return mapped.error();
  copied.mapped_at = *mapped;
  copied.number = next_number_++;
  copied.handle.type = handle.type;
  copied.begin(allocation, previous_);
  if (auto r = remove(allocation.address); !r) return r;
  allocations_.emplace(allocation.address, std::move(copied));
  return {};
}

CopiedAllocation* CopiedMemory::find(uint64_t address) {
  auto it = allocations_.find(address);
  return it == allocations_.end() ? nullptr : &it->second;
}

Result<void> CopiedMemory::unmap(CopiedAllocation* a) {
  const uint64_t at = std::exchange(a->mapped_at, 0);
  if (!at) return {};
  return a->handle.type == ExportType::kIpc ? gpu_->context->close_ipc(at)
                                            : gpu_->context->close_fd(at, a->seen.mapping_size);
}

Result<void> CopiedMemory::remove(uint64_t address) {
  auto it = allocations_.find(address);
  if (it == allocations_.end()) return {};
  auto r = unmap(&it->second);
  for (uint32_t& where : it->second.where) drop(&where);
  allocations_.erase(it);
  return r;
}

Result<void> CopiedMemory::remove_overlapping(const AddressRange& range) {
  std::vector<uint64_t> gone;
  for (const auto& [address, a] : allocations_) {
    if (address < range.end && range.begin < address + a.seen.size) gone.push_back(address);
  }
  for (uint64_t address : gone) {
    if (auto r = remove(address); !r) return r;
  }
  return {};
}

void CopiedMemory::drop(uint32_t* where) {
  if (CopiedAllocation::is_stored(*where)) store_->drop(*where);
  *where = CopiedAllocation::kNowhere;
}

PageRef CopiedMemory::page_ref(const Page& page) {
  const uint64_t offset = uint64_t{page.index} * kPageBytes;
  const uint64_t left = page.allocation->seen.size - offset;
  return {page.allocation->mapped_at + offset,
          static_cast<uint32_t>(std::min<uint64_t>(left, kPageBytes)), page.allocation->number};
}

// In memory that it keeps: in the last round, with the process standing still, none of it is new.
Result<void> CopiedMemory::find_dirty(bool unchanged, const Pace& pace, const std::stop_token& stop,
                                      std::vector<Page>* dirty, CopiedBytes* done) {
  std::vector<Page>& saved = compared_.pages;
  saved.clear();
  for (auto& [address, a] : allocations_) {
    for (uint32_t i = 0; i < a.pages(); i++) {
      (a.where[i] == CopiedAllocation::kNowhere ? *dirty : saved).push_back({&a, i});
    }
  }
  done->pages = dirty->size() + saved.size();
  if (unchanged) return {};
  std::vector<PageRef>& refs = compared_.refs;
  refs.clear();
  refs.reserve(saved.size());
  for (const Page& p : saved) {
    refs.push_back(page_ref(p));
    done->checked_bytes += refs.back().bytes;
  }
  std::vector<PageHash>& now = compared_.now;
  now.resize(saved.size());
  if (auto r = gpu_->engine->hash(refs, now, pace, stop); !r) return r;
  for (size_t i = 0; i < saved.size(); i++) {
    if (now[i] != saved[i].allocation->saved[saved[i].index]) dirty->push_back(saved[i]);
  }
  return {};
}

Result<CopiedBytes> CopiedMemory::copy_round(double max_slowdown, const std::stop_token& stop,
                                             bool unchanged) {
  CopiedBytes done;
  std::lock_guard<std::mutex> hold(gpu_->busy);
  Pace pace;
  pace.set_max_slowdown(max_slowdown);
  if (auto r = gpu_->engine->use_key(key_); !r) return r.error();
  std::vector<Page> dirty;
  const auto start = std::chrono::steady_clock::now();
  if (auto r = find_dirty(unchanged, pace, stop, &dirty, &done); !r) return r.error();
  const auto compared = since(start);
  done.dirty_pages = dirty.size();
  for (const Page& p : dirty) done.bytes += page_ref(p).bytes;
  while (!dirty.empty()) {
    std::vector<Page> again;
    if (auto r = copy_pages(dirty, pace, stop, &done, &again); !r) return r.error();
    dirty = std::move(again);
  }
  log(LogLevel::kDebug, "daemon",
      "GPU %d: %s compared in %.1f ms, %s copied and written in %.1f ms", gpu_index_,
      megabytes(done.checked_bytes).c_str(), static_cast<double>(compared.count()) / 1000,
      megabytes(done.bytes).c_str(), static_cast<double>((since(start) - compared).count()) / 1000);
  return done;
}

// `again`: pages that somebody else was to store, who could not.
Result<void> CopiedMemory::copy_pages(const std::vector<Page>& dirty, const Pace& pace,
                                      const std::stop_token& stop, CopiedBytes* done,
                                      std::vector<Page>* again) {
  std::vector<PageRef> refs;
  refs.reserve(dirty.size());
  uint64_t bytes = 0;
  for (const Page& p : dirty) {
    refs.push_back(page_ref(p));
    bytes += refs.back().bytes;
  }
  std::vector<Awaited> awaited;
  Writers writers(key_, [&](const CopiedPages& copied, WriteQueue::Done saved) {
    save(dirty, copied, &awaited, std::move(saved));
  });
  auto sink = [&](CopiedPages copied) { return writers.write(std::move(copied)); };
  // While the process runs there is time for that; in the last round there is little to copy.
  if (pace.max_slowdown() > 0) {
    if (auto r = gpu_->engine->reserve(bytes); !r) return r;
  }
  const auto start = std::chrono::steady_clock::now();
  auto copied = gpu_->engine->copy(refs, sink, pace, stop);
  done->copy_us += static_cast<uint64_t>(since(start).count());
  auto written = writers.finish(copied.ok());
  for (const Awaited& a : awaited) {
    if (store_->wait(a.id)) continue;
    drop(&a.page.allocation->where[a.page.index]);
    again->push_back(a.page);
  }
  // A write that failed is why the copy ended.
  return written ? copied : written;
}

void CopiedMemory::save(const std::vector<Page>& dirty, const CopiedPages& copied,
                        std::vector<Awaited>* awaited, WriteQueue::Done saved) {
  std::vector<PageStore::NewPage> fresh;
  Result<void> result;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    for (size_t i = 0; result && i < copied.count; i++) {
      const Page& page = dirty[copied.first + i];
      const PageHash& hash = copied.hashes[i];
      uint32_t& where = page.allocation->where[page.index];
      const uint32_t before = where;
      if (hash == zero_) {
        where = CopiedAllocation::kZero;
      } else {
        auto claim = store_->claim(file_, key_number_, hash.bytes, previous_);
        result = claim ? Result<void>() : claim.error();
        where = claim ? claim->page : CopiedAllocation::kNowhere;
        if (claim && claim->is_new) {
          fresh.push_back({claim->page, copied.buffer.data() + i * kPageBytes});
        } else if (claim && claim->is_under_way) {
          awaited->push_back({page, claim->page});
        }
      }
      page.allocation->saved[page.index] = hash;
      // Not sooner: it may be the same page still.
      if (CopiedAllocation::is_stored(before)) store_->drop(before);
    }
  }
  // What was claimed must be stored, or be known not to be, whatever else has failed.
  store_->store(file_, std::move(fresh),
                [result, saved = std::move(saved)](const Result<void>& stored) {
                  saved(result ? stored : result);
                });
}

Result<void> CopiedMemory::release() {
  Result<void> first;
  for (auto& [address, a] : allocations_) {
    auto r = unmap(&a);
    if (!r && first) first = r;
  }
  return first;
}

void CopiedMemory::keep(uint64_t address, KeptMemory* kept) const {
  auto it = allocations_.find(address);
  if (it == allocations_.end() || !it->second.mapped_at) return;
  kept->add(address, it->second.mapped_at, it->second.seen.size);
}

uint64_t CopiedMemory::total_bytes() const {
  uint64_t sum = 0;
  for (const auto& [address, a] : allocations_) sum += a.seen.size;
  return sum;
}

}  // namespace phos
