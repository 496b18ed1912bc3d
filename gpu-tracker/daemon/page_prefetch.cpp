// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/page_prefetch.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <system_error>
#include <utility>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr int kLowestPriority = 19;
// Copies to a GPU that are under way at a time: with fewer its link would stand still.
constexpr size_t kUnderWay = 3;
// Before looking again whether there is room.
constexpr std::chrono::milliseconds kUntilRoom{20};
// Buffers between readers and GPUs. Making them takes longer than a copy through them.
constexpr uint64_t kBetween = 16;
// Before looking again whether pages still go on to a GPU.
constexpr std::chrono::milliseconds kPatience{100};

}  // namespace

unsigned reader_threads() {
  return std::clamp(std::thread::hardware_concurrency(), 4u, 32u);
}

// At least what one session needs to go on, and enough of a large pool that it does so fast.
uint64_t buffers_for_others(const PinnedPool& pool) {
  return std::max<uint64_t>(2, pool.max_buffers() / 8);
}

PagePrefetch::PagePrefetch(const PageChain& chain, GpuEngines& engines, const PageHashKey& key,
                           std::vector<std::unique_ptr<KeptMemory>> kept)
    : chain_(chain), engines_(engines), key_(key), kept_(std::move(kept)) {
  engines_.room().enter(this);
}

void PagePrefetch::begin(std::shared_ptr<ReadTurns> turns) {
  {
    std::lock_guard<std::mutex> hold(mutex_);
    begun_ = true;
    plan(take_over_kept());
    if (to_read_.empty()) return;
    may_stage_ = engines_.stages();
    std::set<GpuUuid> fills;
    for (const auto& [index, gpu] : gpus_) {
      if (gpu.bytes) fills.insert(may_stage_ ? gpu.uuid : ReadTurns::kHost);
    }
    if (turns) place_ = turns->line_up(std::move(fills));
    turns_ = std::move(turns);
  }
  threads_.emplace_back([this, stop = stop_.get_token()] { open_gpus(stop); });
  const size_t readers = std::min<size_t>(reader_threads(), to_read_.size());
  for (size_t i = 0; i < readers; i++) {
    threads_.emplace_back([this, stop = stop_.get_token()] { read(stop); });
  }
}

std::vector<std::unique_ptr<KeptMemory>> PagePrefetch::take_kept() {
  std::lock_guard<std::mutex> hold(mutex_);
  return std::move(kept_);
}

// With the mutex held.
PagePrefetch::Intervals PagePrefetch::take_over_kept() {
  Intervals there;
  const auto& gpus = chain_.image().gpus;
  for (auto& k : std::exchange(kept_, {})) {
    auto gpu = std::find_if(gpus.begin(), gpus.end(),
                            [&](const GpuInfo& g) { return g.uuid == k->gpu(); });
    if (gpu == gpus.end()) continue;
    for (LoadBatch& batch : k->batches(chain_)) {
      const PageRun& run = batch.pieces[0].run;
      there[batch.pieces[0].allocation].push_back({run.first_page, run.first_page + run.pages});
      staged_.push_back(std::move(batch));
    }
    Gpu& to = gpus_.try_emplace(static_cast<int>(gpu - gpus.begin()), Gpu{k->gpu()}).first->second;
    to.stage = k->take_stage();
    users_.push_back(k->take_user());
  }
  return there;
}

// Of each GPU in turn, so that all of them have something to begin with. What the driver restores
// is not asked for. With the mutex held.
void PagePrefetch::plan(const Intervals& except) {
  static const std::vector<PageInterval> kNone;
  std::map<int, LoadPlan> plans;
  const auto batch_pages = static_cast<uint32_t>(engines_.pool().buffer_bytes() / kImagePageSize);
  const auto& all = chain_.image().allocations;
  for (size_t i = 0; i < all.size(); i++) {
    if (all[i].path == MemoryPath::kDriver || all[i].kind == MemoryKind::kManaged ||
        all[i].gpu < 0 || !check_saved(chain_, i))
      continue;
    auto there = except.find(i);
    plans.try_emplace(all[i].gpu, batch_pages)
        .first->second.add(chain_, i, there == except.end() ? kNone : there->second);
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
    if (!gpu.bytes) continue;
    auto user = engines_.use(gpu.uuid, key_);
    if (!user) {
      log(LogLevel::kInfo, "daemon", "not opened in advance: %s", user.error().message().c_str());
      std::lock_guard<std::mutex> hold(mutex_);
      unstaged_ = true;
      continue;
    }
    OpenGpu& open = **user;
    users_.push_back(std::move(*user));
    if (!begin_staging(gpu, open)) continue;
    try {
      stagers.emplace_back([this, &gpu, stop] { stage(gpu, stop); });
    } catch (const std::system_error&) {  // no more threads to be had
      std::lock_guard<std::mutex> hold(mutex_);
      stagers_--;
      unstaged_ = true;
      changed_.notify_all();
    }
  }
}

bool PagePrefetch::begin_staging(Gpu& gpu, OpenGpu& open) {
  if (!engines_.stages()) return false;
  std::lock_guard<std::mutex> hold(mutex_);
  if (given_up_) return false;
  if (!gpu.stage) {
    gpu.stage = std::make_unique<PageStage>(open, gpu.uuid, engines_, gpu.bytes);
  }
  stagers_++;
  return true;
}

// As long as nobody asks for what there is, or needs the room.
void PagePrefetch::stage(Gpu& gpu, const std::stop_token& stop) {
  PageStage& stage = *gpu.stage;
  std::unique_lock<std::mutex> hold(mutex_);
  const auto keep = [&](size_t under_way) {
    hold.unlock();
    std::vector<LoadBatch> there = stage.take(under_way);
    hold.lock();
    std::move(there.begin(), there.end(), std::back_inserter(staged_));
  };
  auto put = PageStage::Put::kTaken;
  while (put != PageStage::Put::kFailed && !given_up_ && !stop.stop_requested()) {
    if (gpu.read.empty()) {
      keep(0);  // their readers wait for the buffers
      changed_.wait(hold, stop, [&] { return !gpu.read.empty() || given_up_; });
      continue;
    }
    LoadBatch batch = std::move(gpu.read.front());
    gpu.read.pop_front();
    hold.unlock();
    put = stage.put(&batch);
    hold.lock();
    may_stage_ = put == PageStage::Put::kTaken;
    if (may_stage_) {
      keep(kUnderWay);
      continue;
    }
    gpu.read.push_front(std::move(batch));
    keep(0);
    if (put == PageStage::Put::kNoRoom) {
      changed_.wait_for(hold, stop, kUntilRoom, [&] { return given_up_; });
    }
  }
  keep(0);
  stagers_--;
  unstaged_ = true;
  changed_.notify_all();
}

void PagePrefetch::make_room(const GpuUuid& uuid, uint64_t bytes) {
  bool is_short = false;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto look = [&](const Result<GpuMemoryInfo>& memory) {
      is_short = is_short || !memory || memory->free < bytes;
    };
    for (auto& k : kept_) {
      if (k->gpu() == uuid) look(k->memory_info());
    }
    for (auto& [index, gpu] : gpus_) {
      if (gpu.stage && gpu.uuid == uuid) look(gpu.stage->memory_info());
    }
  }
  if (is_short) give_up();
}

// What has been staged is read once more when it is needed.
void PagePrefetch::give_up() {
  std::vector<std::unique_ptr<PageStage>> stages;
  std::vector<std::unique_ptr<KeptMemory>> kept;
  std::unique_lock<std::mutex> hold(mutex_);
  given_up_ = true;
  kept.swap(kept_);
  changed_.notify_all();
  changed_.wait(hold, [&] { return stagers_ == 0; });
  staged_.clear();
  for (auto& [index, gpu] : gpus_) {
    if (gpu.stage) stages.push_back(std::move(gpu.stage));
  }
  hold.unlock();
  if (!stages.empty() || !kept.empty()) {
    log(LogLevel::kInfo, "daemon",
        "process %d: pages are not read ahead into GPU memory: others need it", chain_.image().pid);
  }
}

std::vector<std::unique_ptr<PageStage>> PagePrefetch::take_stages() {
  std::vector<std::unique_ptr<PageStage>> stages;
  for (auto& [index, gpu] : gpus_) {
    if (gpu.stage) stages.push_back(std::move(gpu.stage));
  }
  return stages;
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

// Few where they come back soon; else as many as there may be. Those of a process whose turn it was
// before come back, too.
PinnedPool::Spare PagePrefetch::spare() const {
  const uint64_t others = buffers_for_others(engines_.pool());
  std::lock_guard<std::mutex> hold(mutex_);
  if (!engines_.stages() || given_up_) {
    return {.keep = others, .patience = turns_ ? kPatience : kPatience.zero()};
  }
  if (!may_stage_ || unstaged_) return {.keep = others, .patience = kPatience};
  return {.keep = std::min<uint64_t>(others, 2),
          .enough = reader_threads() + kBetween,
          .patience = kPatience};
}

bool PagePrefetch::wait_for_turn(const std::stop_token& stop) {
  return !turns_ || turns_->wait(place_, stop);
}

void PagePrefetch::end_turn() {
  if (turns_) turns_->leave(place_);
}

void PagePrefetch::read_batches(const std::stop_token& stop) {
  if (!wait_for_turn(stop)) return;
  while (!stop.stop_requested()) {
    const PinnedPool::Spare wanted = spare();
    // Before there is work for it: more may have to be made, and nobody should wait for that here.
    auto buffer = engines_.pool().acquire_spare(wanted, stop);
    if (!buffer && wanted.patience.count() == 0) return;
    LoadBatch batch;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      if (to_read_.empty()) return;
      if (!buffer) continue;
      batch = std::move(to_read_.front());
      to_read_.pop_front();
      if (to_read_.empty()) end_turn();
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
  engines_.room().leave(this);
  stop_.request_stop();
  {
    // Now the process waits for them.
    std::lock_guard<std::mutex> hold(mutex_);
    for (const id_t tid : readers_) (void)setpriority(PRIO_PROCESS, tid, 0);
  }
  for (auto& t : threads_) t.join();
  threads_.clear();
  end_turn();
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

// Those in host memory first: they take longer, and others wait for the buffers.
std::vector<LoadBatch> PagePrefetch::take() {
  stop();
  if (!begun_) {
    std::lock_guard<std::mutex> hold(mutex_);
    (void)take_over_kept();
  }
  std::vector<LoadBatch> all;
  for (auto& [index, gpu] : gpus_) {
    std::move(gpu.read.begin(), gpu.read.end(), std::back_inserter(all));
    gpu.read.clear();
  }
  std::move(staged_.begin(), staged_.end(), std::back_inserter(all));
  staged_.clear();
  return all;
}

}  // namespace phos
