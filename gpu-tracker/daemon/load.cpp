// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/load.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

static_assert(kPageBytes == kImagePageSize);

// Buffers that wait for a GPU at most: as many as its engine has in flight.
constexpr size_t kReadAhead = 8;

Error cancelled() {
  return Error(Domain::kErrno, ECANCELED, "it was cancelled");
}

}  // namespace

std::string describe_memory(const GpuUuid& gpu, uint64_t address, uint64_t size) {
  char text[80];
  snprintf(text, sizeof text, ", allocation at 0x%llx (%llu bytes)",
           static_cast<unsigned long long>(address), static_cast<unsigned long long>(size));
  return format_gpu_uuid(gpu) + text;
}

std::string why_page_differs(const PageChain& chain, const PageHashKey& key, size_t allocation,
                             uint64_t page) {
  const auto run = chain.locate(allocation, page);
  const std::unique_ptr<void, void (*)(void*)> bytes(aligned_alloc(kPageIoAlignment, kPageBytes),
                                                     free);
  if (!run || !bytes) return "";
  auto read = chain.read(*run, bytes.get());
  const std::string where = chain.describe(*run);
  if (!read) return "it is not what was saved (" + where + "): " + read.error().message();
  const SavedHash& saved = chain.image().allocations[allocation].hashes[page];
  if (hash_page(key, bytes.get(), kPageBytes).bytes != saved) {
    return "what was saved is damaged (" + where + "); restore from another copy of the images";
  }
  return "what was saved (" + where +
         ") is intact, but after loading it the memory holds something else: somebody else writes "
         "to it, or the hardware is at fault";
}

MemoryLoad::MemoryLoad(const PageChain& chain, GpuEngines& engines, const PageHashKey& key)
    : chain_(chain),
      engines_(engines),
      key_(key),
      places_(chain.image().allocations.size()),
      direct_storage_(engines.direct_storage()) {}

MemoryLoad::~MemoryLoad() = default;

MemoryLoad::Gpu& MemoryLoad::gpu_of(const GpuUuid& uuid) {
  for (auto& gpu : gpus_) {
    if (gpu->uuid == uuid) return *gpu;
  }
  gpus_.push_back(std::make_unique<Gpu>());
  gpus_.back()->uuid = uuid;
  return *gpus_.back();
}

// The GPU that all of the batch goes to, or null.
MemoryLoad::Gpu* MemoryLoad::gpu_of(const LoadBatch& batch) const {
  Gpu* const gpu = places_[batch.pieces[0].allocation].gpu;
  const bool all = std::all_of(batch.pieces.begin(), batch.pieces.end(), [&](const LoadPiece& p) {
    return places_[p.allocation].gpu == gpu;
  });
  return all ? gpu : nullptr;
}

void MemoryLoad::plan(std::vector<MemoryToLoad> memory, std::vector<LoadBatch> warm) {
  for (MemoryToLoad& m : memory) {
    Gpu& gpu = gpu_of(m.target.device_uuid);
    places_[m.allocation] = {&gpu, gpu.targets.size()};
    gpu.targets.push_back({std::move(m)});
  }
  std::map<size_t, std::vector<PageInterval>> read;  // by allocation
  for (LoadBatch& batch : warm) {
    Gpu* const gpu = gpu_of(batch);
    if (!gpu || (batch.staged_at && !(batch.staged_on == gpu->uuid))) continue;
    for (const LoadPiece& p : batch.pieces) {
      read[p.allocation].push_back({p.run.first_page, p.run.first_page + p.run.pages});
    }
    report_.warm_bytes += uint64_t{batch.pages} * kPageBytes;
    if (batch.staged_at) report_.staged_bytes += uint64_t{batch.pages} * kPageBytes;
    if (batch.kept) report_.kept_bytes += uint64_t{batch.pages} * kPageBytes;
    gpu->warm.push_back(std::move(batch));
  }
  warm.clear();
  for (auto& [allocation, intervals] : read) {
    std::sort(intervals.begin(), intervals.end(),
              [](const PageInterval& a, const PageInterval& b) { return a.first < b.first; });
  }
  const auto batch_pages = static_cast<uint32_t>(engines_.pool().buffer_bytes() / kPageBytes);
  for (auto& gpu : gpus_) {
    LoadPlan plan(batch_pages);
    for (const Target& t : gpu->targets) {
      auto known = read.find(t.memory.allocation);
      plan.add(chain_, t.memory.allocation,
               known == read.end() ? std::vector<PageInterval>() : known->second);
    }
    for (LoadBatch& batch : plan.take_saved()) gpu->to_read.push_back(std::move(batch));
    for (LoadBatch& batch : plan.take_zeros()) gpu->zeros.push_back(std::move(batch));
  }
}

Result<LoadReport> MemoryLoad::run(std::stop_token stop) {
  std::stop_callback forward(stop, [this] { fail(cancelled()); });
  size_t batches = 0;
  for (auto& gpu : gpus_) batches += gpu->to_read.size();
  std::vector<std::thread> threads;
  for (size_t i = 0; i < std::min<size_t>(reader_threads(), batches); i++) {
    threads.emplace_back([this] { read(); });
  }
  for (auto& gpu : gpus_) {
    threads.emplace_back([this, &gpu] {
      if (auto r = load_gpu(*gpu); !r) fail(r.error());
    });
  }
  for (auto& t : threads) t.join();
  direct_files_.clear();
  if (error_) return *error_;
  return report_;
}

void MemoryLoad::fail(const Error& error) {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    if (!error_) error_ = error;
  }
  abort_.request_stop();
}

// The open GPU that has least to do. `more`: some GPU has pages to read, now or later.
MemoryLoad::Gpu* MemoryLoad::next_to_read(bool* more) {
  Gpu* best = nullptr;
  *more = false;
  for (auto& gpu : gpus_) {
    if (gpu->to_read.empty()) continue;
    *more = true;
    if (!gpu->open || gpu->ready.size() >= kReadAhead) continue;
    const auto ahead = [](const Gpu& g) { return g.ready.size() + g.reading; };
    if (!best || ahead(*gpu) < ahead(*best)) best = gpu.get();
  }
  return best;
}

void MemoryLoad::read() {
  const std::stop_token stop = abort_.get_token();
  std::unique_lock<std::mutex> hold(mutex_);
  for (;;) {
    Gpu* gpu = nullptr;
    bool more = true;
    changed_.wait(hold, stop, [&] { return (gpu = next_to_read(&more)) || !more; });
    if (!gpu || stop.stop_requested()) return;
    LoadBatch batch = std::move(gpu->to_read.front());
    gpu->to_read.pop_front();
    gpu->reading++;
    if (!first_read_) first_read_ = std::chrono::steady_clock::now();
    hold.unlock();
    changed_.notify_all();  // it may have been the last one that others wait for
    auto done = read(*gpu, &batch, stop);
    if (!done) fail(done.error());
    hold.lock();
    gpu->reading--;
    changed_.notify_all();
    if (!done) return;
    if (batch.in_place) report_.direct_bytes += *done;
    gpu->ready.push_back(std::move(batch));
    report_.read_bytes += *done;
    report_.read_us = static_cast<uint64_t>(since(*first_read_).count());
  }
}

Result<uint64_t> MemoryLoad::read(Gpu& gpu, LoadBatch* batch, std::stop_token stop) {
  batch->in_place = read_in_place(gpu, *batch);
  if (batch->in_place) return uint64_t{batch->pages} * kPageBytes;
  auto buffer = engines_.pool().acquire(std::move(stop));
  if (!buffer) return buffer.error();
  batch->buffer = std::move(*buffer);
  return read_batch(chain_, batch);
}

const DirectStorage::File* MemoryLoad::direct_file(int fd) {
  std::lock_guard<std::mutex> hold(mutex_);
  if (!direct_storage_) return nullptr;
  auto it = direct_files_.find(fd);
  if (it == direct_files_.end()) {
    auto file = direct_storage_->use(fd);
    if (!file) log(LogLevel::kInfo, "daemon", "%s", file.error().message().c_str());
    it = direct_files_.emplace(fd, file ? std::move(*file) : nullptr).first;
  }
  return it->second.get();
}

// Straight into the GPU's memory. False: not all of the batch can come so, and nobody writes there;
// then all of it is read by other means.
bool MemoryLoad::read_in_place(Gpu& gpu, const LoadBatch& batch) {
  struct Part {
    const DirectStorage::File* file;
    uint64_t offset, to, bytes;
  };
  std::vector<Part> parts;
  for (const LoadPiece& p : batch.pieces) {
    const auto from = chain_.direct_range(p.run);
    const DirectStorage::File* const file = from ? direct_file(from->fd) : nullptr;
    if (!file) return false;
    const uint64_t begin = uint64_t{p.run.first_page} * kPageBytes;
    const uint64_t to = gpu.targets[places_[p.allocation].target].mapped_at + begin;
    const uint64_t left = chain_.image().allocations[p.allocation].size - begin;
    const uint64_t bytes = std::min(from->bytes, left);
    if ((from->offset | to | bytes) % DirectStorage::kAlignment != 0) return false;
    parts.push_back({file, from->offset, to, bytes});
  }
  auto r = (*gpu.user)->context->make_current();
  for (const Part& p : parts) {
    if (r) r = p.file->read(p.offset, p.to, p.bytes);
  }
  if (r) return true;
  std::lock_guard<std::mutex> hold(mutex_);
  if (std::exchange(direct_storage_, nullptr)) {
    log(LogLevel::kWarn, "daemon", "direct storage is not used any more for process %d: %s",
        chain_.image().pid, r.error().message().c_str());
  }
  return false;
}

Result<void> MemoryLoad::load_gpu(Gpu& gpu) {
  const auto start = std::chrono::steady_clock::now();
  auto user = engines_.use(gpu.uuid, key_);
  if (!user) return user.error();
  gpu.user = std::move(*user);
  OpenGpu& open = **gpu.user;
  auto r = import(*open.context, gpu);
  {
    std::lock_guard<std::mutex> hold(mutex_);
    report_.import_us = std::max(report_.import_us, static_cast<uint64_t>(since(start).count()));
  }
  if (r) r = load_pages(open, gpu);
  if (r) return r;
  // Somebody may still read into the memory.
  fail(r.error());
  {
    std::unique_lock<std::mutex> hold(mutex_);
    gpu.open = false;
    changed_.wait(hold, [&] { return gpu.reading == 0; });
  }
  (void)let_go(*open.context, gpu).ok();
  // With the last user the context goes, and all that it still maps.
  gpu.user.reset();
  return r;
}

Result<void> MemoryLoad::let_go() {
  Result<void> first;
  for (auto& gpu : gpus_) {
    if (!gpu->user) continue;
    auto r = let_go(*(*gpu->user)->context, *gpu);
    if (!r && first) first = r;
    gpu->user.reset();
  }
  return first;
}

Result<void> MemoryLoad::import(GpuContext& context, Gpu& gpu) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (Target& t : gpu.targets) {
    if (abort_.stop_requested()) return cancelled();
    const AgentAllocation& a = t.memory.target;
    AgentExport& handle = t.memory.handle;
    auto mapped =
        handle.type == ExportType::kIpc
            ? context.import_ipc(handle.ipc_handle)
            : context.import_fd(handle.fd.get(), a.mapping_size, MemoryAccess::kReadWrite);
    if (!mapped) return mapped.error().wrap(describe_memory(gpu.uuid, a.address, a.size));
    t.mapped_at = *mapped;
    handle.fd.reset();
    ranges.emplace_back(*mapped, a.size);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); i++) {
    if (ranges[i].first - ranges[i - 1].first >= ranges[i - 1].second) continue;
    return Error(Domain::kUsage, EINVAL,
                 format_gpu_uuid(gpu.uuid) + ": two allocations are one and the same memory");
  }
  return {};
}

// All of it, whatever the driver says to some.
Result<void> MemoryLoad::let_go(GpuContext& context, Gpu& gpu) {
  Result<void> first;
  for (Target& t : gpu.targets) {
    const uint64_t at = std::exchange(t.mapped_at, 0);
    if (!at) continue;
    auto r = t.memory.handle.type == ExportType::kIpc
                 ? context.close_ipc(at)
                 : context.close_fd(at, t.memory.target.mapping_size);
    if (!r && first) first = r;
  }
  return first;
}

Result<void> MemoryLoad::load_pages(OpenGpu& open, Gpu& gpu) {
  std::lock_guard<std::mutex> busy(open.busy);
  if (auto r = open.engine->use_key(key_); !r) return r;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    gpu.open = true;
    changed_.notify_all();
  }
  uint64_t pages = 0, wanted = 0;
  for (const Target& t : gpu.targets) {
    wanted += page_count(chain_.image().allocations[t.memory.allocation]);
  }
  auto source = [&](bool may_wait, PagesToLoad* work) {
    auto state = next(gpu, may_wait, work);
    pages += work->pages.size();
    return state;
  };
  auto r = open.engine->load(source, abort_.get_token());
  if (!r) {
    const auto wrong = open.engine->wrong_page();
    return wrong ? explain(gpu, *wrong, r.error()) : r.error();
  }
  {
    std::lock_guard<std::mutex> hold(mutex_);
    report_.transfer_us += static_cast<uint64_t>(1000 * open.engine->last_transfers_ms());
    report_.hash_us += static_cast<uint64_t>(1000 * open.engine->last_hash_kernels_ms());
  }
  if (pages == wanted) return {};
  return Error(Domain::kUsage, EBADMSG,
               format_gpu_uuid(gpu.uuid) + ": " + std::to_string(pages) + " of " +
                   std::to_string(wanted) + " pages were loaded");
}

// What was read now goes first, so that its readers have buffers again; zeros last, so that DMA
// never waits for them.
Result<LoadState> MemoryLoad::next(Gpu& gpu, bool may_wait, PagesToLoad* pages) {
  const std::stop_token stop = abort_.get_token();
  std::unique_lock<std::mutex> hold(mutex_);
  const auto ended = [&] { return gpu.to_read.empty() && !gpu.reading; };
  const auto something = [&] {
    return !gpu.ready.empty() || !gpu.warm.empty() || !gpu.zeros.empty() || ended();
  };
  if (may_wait) changed_.wait(hold, stop, something);
  if (stop.stop_requested()) return cancelled();
  auto& from = !gpu.ready.empty() ? gpu.ready : !gpu.warm.empty() ? gpu.warm : gpu.zeros;
  if (from.empty()) return ended() ? LoadState::kEnd : LoadState::kLater;
  LoadBatch batch = std::move(from.front());
  from.pop_front();
  report_.pages += batch.pages;
  if (batch.zero) report_.zero_pages += batch.pages;
  hold.unlock();
  changed_.notify_all();  // the readers, which may have been too far ahead
  fill_in(gpu, std::move(batch), pages);
  return LoadState::kPages;
}

void MemoryLoad::fill_in(Gpu& gpu, LoadBatch batch, PagesToLoad* pages) {
  uint64_t bytes = 0;
  pages->pages.reserve(batch.pages);
  pages->hashes.reserve(batch.pages);
  for (const LoadPiece& p : batch.pieces) {
    const size_t target = places_[p.allocation].target;
    const AllocationInfo& a = chain_.image().allocations[p.allocation];
    for (uint32_t i = p.run.first_page; i < p.run.first_page + p.run.pages; i++) {
      const uint64_t offset = uint64_t{i} * kPageBytes;
      const auto n = static_cast<uint32_t>(std::min<uint64_t>(kPageBytes, a.size - offset));
      pages->pages.push_back(
          {gpu.targets[target].mapped_at + offset, n, static_cast<uint32_t>(target)});
      pages->hashes.push_back({a.hashes[i]});
      bytes += n;
    }
  }
  pages->buffer = std::move(batch.buffer);
  pages->in_place = batch.in_place;
  pages->staged_at = batch.staged_at;
  std::lock_guard<std::mutex> hold(mutex_);
  report_.bytes += bytes;
}

// Reads the page once more, to tell a damaged file from memory that does not keep what it is given.
Error MemoryLoad::explain(const Gpu& gpu, uint64_t address, const Error& error) const {
  for (const Target& t : gpu.targets) {
    const AllocationInfo& a = chain_.image().allocations[t.memory.allocation];
    if (address < t.mapped_at || address - t.mapped_at >= a.size) continue;
    const uint64_t offset = address - t.mapped_at, page = offset / kPageBytes;
    const std::string why = why_page_differs(chain_, key_, t.memory.allocation, page);
    if (why.empty()) break;
    return Error(error.domain(), error.code(),
                 describe_memory(gpu.uuid, t.memory.target.address, a.size) + ", offset " +
                     std::to_string(offset) + ": " + why);
  }
  return error;
}

}  // namespace phos
