// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/page_prefetch.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr int kLowestPriority = 19;

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
  threads_.emplace_back([this] { open_gpus(); });
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
    gpu_indices_.push_back(gpu);
    of_gpu.push_back(plan.take_saved());
    most = std::max(most, of_gpu.back().size());
  }
  for (size_t i = 0; i < most; i++) {
    for (auto& batches : of_gpu) {
      if (i < batches.size()) to_read_.push_back(std::move(batches[i]));
    }
  }
}

// Those of the image, if they are here: it saves the time only, so nobody minds if not.
void PagePrefetch::open_gpus() {
  (void)engines_.direct_storage();
  for (int index : gpu_indices_) {
    if (stop_.stop_requested()) return;
    auto user = engines_.use(chain_.image().gpus[static_cast<size_t>(index)].uuid, key_);
    if (user) {
      gpus_.push_back(std::move(*user));
    } else {
      log(LogLevel::kInfo, "daemon", "not opened in advance: %s", user.error().message().c_str());
    }
  }
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
    auto buffer = pool.acquire_spare(buffers_for_others(pool), stop);
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
    std::lock_guard<std::mutex> hold(mutex_);
    ready_.push_back(std::move(batch));
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

std::vector<LoadBatch> PagePrefetch::take() {
  stop();
  return std::move(ready_);
}

}  // namespace phos
