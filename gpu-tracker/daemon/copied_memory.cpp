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

#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

static_assert(kPageBytes == kImagePageSize);

// Enough to keep a disk's queue full with requests of megabytes, and to hash them before.
constexpr int kWriterThreads = 4;
// The process that is copied needs the CPUs, too.
constexpr int kWriterNice = 10;

PageHash hash_of_zeros(const PageHashKey& key) {
  static const std::vector<uint8_t> kZeros(kPageBytes);
  return hash_page(key, kZeros.data(), kZeros.size());
}

// The slots of pages that lie one after the other in a buffer, where they follow each other too.
struct SlotRun {
  size_t in_buffer;  // index of the first page
  uint32_t slot;
  uint32_t pages;
};

}  // namespace

// Hashes buffers, unless the GPU has, and writes them to the pages file, on threads of its own, so
// that the GPU need not wait. The pages of one round all differ, so the order does not matter.
class CopiedMemory::Writers {
 public:
  // `record` is called for each buffer, one at a time, and says what of it is to be written where.
  using Record = std::function<std::vector<SlotRun>(const CopiedPages&)>;

  Writers(PageFileWriter& file, const PageHashKey& key, Record record)
      : file_(file), key_(key), record_(std::move(record)) {
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

  // All is written, or the first error. What waits is dropped unless it is `wanted`.
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
      CopiedPages copied = std::move(work_.front());
      work_.pop_front();
      if (error_) continue;
      hold.unlock();
      copied.hash(key_);
      hold.lock();
      const auto runs = record_(copied);
      hold.unlock();
      std::optional<Error> failed;
      for (const SlotRun& r : runs) {
        auto done = file_.write(r.slot, copied.buffer.data() + r.in_buffer * kPageBytes, r.pages);
        if (done) continue;
        failed = done.error();
        break;
      }
      copied.buffer.reset();
      hold.lock();
      if (failed && !error_) error_ = std::move(failed);
    }
  }

  PageFileWriter& file_;
  const PageHashKey& key_;
  const Record record_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<CopiedPages> work_;
  std::optional<Error> error_;
  bool ending_ = false;
  std::vector<std::thread> threads_;
};

CopiedMemory::CopiedMemory(GpuEngines::User gpu, int gpu_index,
                           std::unique_ptr<PageFileWriter> file, const PageHashKey& key)
    : gpu_(std::move(gpu)),
      gpu_index_(gpu_index),
      file_(std::move(file)),
      key_(key),
      zero_(hash_of_zeros(key)) {}

CopiedMemory::~CopiedMemory() {
  (void)release();
}

Result<void> CopiedMemory::add(const AgentAllocation& allocation, AgentExport handle,
                               const std::vector<SavedHash>* saved) {
  CopiedAllocation copied;
  copied.seen = allocation;
  auto mapped =
      handle.type == ExportType::kIpc
          ? gpu_->context->import_ipc(handle.ipc_handle)
          : gpu_->context->import_fd(handle.fd.get(), allocation.mapping_size, MemoryAccess::kRead);
  if (!mapped) return mapped.error();
  copied.mapped_at = *mapped;
  copied.number = next_number_++;
  copied.handle.type = handle.type;
  const size_t pages = (allocation.size + kPageBytes - 1) / kPageBytes;
  copied.saved.resize(pages);
  copied.where.assign(pages, CopiedAllocation::kNowhere);
  if (saved && saved->size() == pages) {
    copied.where.assign(pages, CopiedAllocation::kInParent);
    for (size_t i = 0; i < pages; i++) copied.saved[i].bytes = (*saved)[i];
  }
  allocations_.insert_or_assign(allocation.address, std::move(copied));
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
  for (uint32_t where : it->second.where) {
    if (CopiedAllocation::is_slot(where)) free_slots_.push_back(where);
  }
  // So that they are handed out in ascending order.
  std::sort(free_slots_.begin(), free_slots_.end(), std::greater<>());
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

uint32_t CopiedMemory::take_slot() {
  if (free_slots_.empty()) return next_slot_++;
  const uint32_t slot = free_slots_.back();
  free_slots_.pop_back();
  return slot;
}

PageRef CopiedMemory::page_ref(const Page& page) {
  const uint64_t offset = uint64_t{page.index} * kPageBytes;
  const uint64_t left = page.allocation->seen.size - offset;
  return {page.allocation->mapped_at + offset,
          static_cast<uint32_t>(std::min<uint64_t>(left, kPageBytes)), page.allocation->number};
}

Result<void> CopiedMemory::find_dirty(const Pace& pace, const std::stop_token& stop,
                                      std::vector<Page>* dirty, CopiedBytes* done) {
  std::vector<Page> saved;
  for (auto& [address, a] : allocations_) {
    for (uint32_t i = 0; i < a.pages(); i++) {
      (a.where[i] == CopiedAllocation::kNowhere ? *dirty : saved).push_back({&a, i});
    }
  }
  done->pages = dirty->size() + saved.size();
  std::vector<PageRef> refs;
  refs.reserve(saved.size());
  for (const Page& p : saved) {
    refs.push_back(page_ref(p));
    done->checked_bytes += refs.back().bytes;
  }
  std::vector<PageHash> now(saved.size());
  if (auto r = gpu_->engine->hash(refs, now, pace, stop); !r) return r;
  for (size_t i = 0; i < saved.size(); i++) {
    if (now[i] != saved[i].allocation->saved[saved[i].index]) dirty->push_back(saved[i]);
  }
  return {};
}

Result<CopiedBytes> CopiedMemory::copy_round(double max_slowdown, const std::stop_token& stop) {
  CopiedBytes done;
  std::lock_guard<std::mutex> hold(gpu_->busy);
  Pace pace;
  pace.set_max_slowdown(max_slowdown);
  if (auto r = gpu_->engine->use_key(key_); !r) return r.error();
  std::vector<Page> dirty;
  if (auto r = find_dirty(pace, stop, &dirty, &done); !r) return r.error();
  done.dirty_pages = dirty.size();
  std::vector<PageRef> refs;
  refs.reserve(dirty.size());
  for (const Page& p : dirty) refs.push_back(page_ref(p));
  for (const PageRef& ref : refs) done.bytes += ref.bytes;

  Writers writers(*file_, key_, [&](const CopiedPages& copied) {
    std::vector<SlotRun> runs;
    for (size_t i = 0; i < copied.count; i++) {
      const Page& page = dirty[copied.first + i];
      uint32_t& where = page.allocation->where[page.index];
      page.allocation->saved[page.index] = copied.hashes[i];
      if (copied.hashes[i] == zero_) {
        if (CopiedAllocation::is_slot(where)) free_slots_.push_back(where);
        where = CopiedAllocation::kZero;
        continue;
      }
      if (!CopiedAllocation::is_slot(where)) where = take_slot();
      if (!runs.empty() && runs.back().in_buffer + runs.back().pages == i &&
          runs.back().slot + runs.back().pages == where) {
        runs.back().pages++;
      } else {
        runs.push_back({i, where, 1});
      }
    }
    return runs;
  });
  auto sink = [&](CopiedPages copied) { return writers.write(std::move(copied)); };
  // While the process runs there is time for that; in the last round there is little to copy.
  if (pace.max_slowdown() > 0) {
    if (auto r = gpu_->engine->reserve(done.bytes); !r) return r.error();
  }
  const auto start = std::chrono::steady_clock::now();
  auto copied = gpu_->engine->copy(refs, sink, pace, stop);
  done.copy_us = static_cast<uint64_t>(since(start).count());
  auto written = writers.finish(copied.ok());
  // A write that failed is why the copy ended.
  if (!written) return written.error();
  if (!copied) return copied.error();
  return done;
}

Result<void> CopiedMemory::release() {
  Result<void> first;
  for (auto& [address, a] : allocations_) {
    auto r = unmap(&a);
    if (!r && first) first = r;
  }
  return first;
}

Result<void> CopiedMemory::flush() {
  return file_->flush();
}

Result<void> CopiedMemory::finish() {
  if (next_slot_ == 0) {
    file_.reset();  // nothing is in it
    return {};
  }
  return file_->finish();
}

uint64_t CopiedMemory::total_bytes() const {
  uint64_t sum = 0;
  for (const auto& [address, a] : allocations_) sum += a.seen.size;
  return sum;
}

}  // namespace phos
