// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/page_prefetch.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr int kLowestPriority = 19;
// Copies to a GPU that are under way at a time: with fewer its link would stand still.
constexpr size_t kUnderWay = 3;

}  // namespace

unsigned reader_threads() {
  return std::clamp(std::thread::hardware_concurrency(), 4u, 32u);
}

// At least what one session needs to go on, and enough of a large pool that it does so fast.
uint64_t buffers_for_others(const PinnedPool& pool) {
  return std::max<uint64_t>(2, pool.max_buffers() / 8);
}

PagePrefetch::PagePrefetch(const PageChain& chain, GpuEngines& engines, const PageHashKey& key)
    : chain_(chain), engines_(engines), key_(key) {
  plan();
  if (to_read_.empty()) return;
  threads_.emplace_back([this, stop = stop_.get_token()] { open_gpus(stop); });
  const size_t readers = std::min<size_t>(reader_threads(), to_read_.size());
  for (size_t i = 0; i < readers; i++) {
    threads_.emplace_back([this, stop = stop_.get_token()] { read(stop); });
  }
}

// Of each GPU in turn, so that all of them have something to begin with. What the driver restores
// is not asked for.
void PagePrefetch::plan() {
  std::map<int, LoadPlan> plans;
  const auto batch_pages = static_cast<uint32_t>(engines_.pool().buffer_bytes() / kImagePageSize);
  const auto& all = chain_.image().allocations;
  for (size_t i = 0; i < all.size(); i++) {
    if (all[i].path == MemoryPath::kDriver || all[i].gpu < 0 || !check_saved(chain_, i)) continue;
    plans.try_emplace(all[i].gpu, batch_pages).first->second.add(chain_, i);
  }
  std::vector<std::vector<LoadBatch>> of_gpu;
  size_t most = 0;
  for (auto& [gpu, plan] : plans) {
    of_gpu.push_back(plan.take_saved());
    Gpu& to = gpus_.try_emplace(gpu, Gpu{chain_.image().gpus[static_cast<size_t>(gpu)].uuid})
                  .first->second;
    for (const LoadBatch& b : of_gpu.back()) to.bytes += uint64_t{b.pages} * kImagePageSize;
    most = std::max(most, of_gpu.back().size());
  }
  for (size_t i = 0; i < most; i++) {
    for (auto& batches : of_gpu) {
      if (i < batches.size()) to_read_.push_back(std::move(batches[i]));
    }
  }
}

// Those of the image, if they are here: it saves the time only, so nobody minds if not.
void PagePrefetch::open_gpus(const std::stop_token& stop) {
  (void)engines_.direct_storage();
  std::vector<std::jthread> stagers;
  for (auto& [index, gpu] : gpus_) {
    if (stop.stop_requested()) return;
    auto user = engines_.use(gpu.uuid, key_);
    if (!user) {
      log(LogLevel::kInfo, "daemon", "not opened in advance: %s", user.error().message().c_str());
      continue;
    }
    OpenGpu& open = **user;
    users_.push_back(std::move(*user));
    if (!engines_.stages()) continue;
    PageStage& staging = *stages_.emplace_back(
        std::make_unique<PageStage>(open, gpu.uuid, engines_.room(), gpu.bytes));
    stagers.emplace_back([this, &gpu, &staging, stop] { stage(gpu, staging, stop); });
  }
}

// As long as the GPU has room and nobody asks for what there is.
void PagePrefetch::stage(Gpu& gpu, PageStage& stage, const std::stop_token& stop) {
  const auto keep = [&](std::vector<LoadBatch> there) {
    std::lock_guard<std::mutex> hold(mutex_);
    std::move(there.begin(), there.end(), std::back_inserter(staged_));
  };
  std::unique_lock<std::mutex> hold(mutex_);
  for (bool more = true; more;) {
    const bool idle = gpu.read.empty();
    if (!idle) {
      LoadBatch batch = std::move(gpu.read.front());
      gpu.read.pop_front();
      hold.unlock();
      more = stage.put(&batch);
      if (more) keep(stage.take(kUnderWay));
      hold.lock();
      if (!more) gpu.read.push_front(std::move(batch));
    } else {
      // Their readers wait for the buffers.
      hold.unlock();
      keep(stage.take(0));
      hold.lock();
      changed_.wait(hold, stop, [&] { return !gpu.read.empty(); });
    }
    more = more && !stop.stop_requested();
  }
  hold.unlock();
  keep(stage.take(0));
}

// CRIU is at work meanwhile, and it is CRIU that the process waits for: where files are in memory,
// a dozen copying threads would slow it down.
void PagePrefetch::read(const std::stop_token& stop) {
  const auto tid = static_cast<id_t>(syscall(SYS_gettid));
  {
    std::lock_guard<std::mutex> hold(mutex_);
    readers_.insert(tid);
    if (!stop.stop_requested()) (void)setpriority(PRIO_PROCESS, tid, kLowestPriority);
  }
  read_batches(stop);
  std::lock_guard<std::mutex> hold(mutex_);
  readers_.erase(tid);
}

void PagePrefetch::read_batches(const std::stop_token& stop) {
  PinnedPool& pool = engines_.pool();
  while (!stop.stop_requested()) {
    // Before there is work for it: more may have to be made, and nobody should wait for that here.
    auto buffer = pool.acquire_spare(buffers_for_others(pool), stop, engines_.stages());
    if (!buffer) return;
    LoadBatch batch;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      if (to_read_.empty()) return;
      batch = std::move(to_read_.front());
      to_read_.pop_front();
    }
    batch.buffer = std::move(*buffer);
    if (!read_batch(chain_, &batch)) continue;
    const int gpu = chain_.image().allocations[batch.pieces[0].allocation].gpu;
    std::lock_guard<std::mutex> hold(mutex_);
    gpus_.at(gpu).read.push_back(std::move(batch));
    changed_.notify_all();
  }
}

void PagePrefetch::stop() {
  stop_.request_stop();
  {
    // Now the process waits for them.
    std::lock_guard<std::mutex> hold(mutex_);
    for (const id_t tid : readers_) (void)setpriority(PRIO_PROCESS, tid, 0);
  }
  for (auto& t : threads_) t.join();
  threads_.clear();
}

ReadAhead PagePrefetch::so_far() const {
  ReadAhead sum;
  std::lock_guard<std::mutex> hold(mutex_);
  for (const auto& [index, gpu] : gpus_) {
    for (const LoadBatch& b : gpu.read) sum.host_bytes += uint64_t{b.pages} * kImagePageSize;
  }
  for (const LoadBatch& b : staged_) sum.gpu_bytes += uint64_t{b.pages} * kImagePageSize;
  return sum;
}

std::vector<LoadBatch> PagePrefetch::take() {
  stop();
  std::vector<LoadBatch> all = std::move(staged_);
  for (auto& [index, gpu] : gpus_) {
    std::move(gpu.read.begin(), gpu.read.end(), std::back_inserter(all));
    gpu.read.clear();
  }
  return all;
}

}  // namespace phos
