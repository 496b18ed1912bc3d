// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/live_copy.h"

#include <algorithm>
#include <future>
#include <map>
#include <string>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/memory_release.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/gate/memory_guard.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

constexpr std::chrono::milliseconds kLockedAnswer{500};
// Smaller memory shares its 2 MiB block with other memory.
constexpr uint64_t kReleasedAbove = 2 << 20;

bool is_releasable(const AgentAllocation& a) {
  return a.kind == AllocationKind::kDevice && a.size > kReleasedAbove;
}

MemoryKind image_kind(AllocationKind kind) {
  switch (kind) {
    case AllocationKind::kDevice:
    case AllocationKind::kSmall:
      return MemoryKind::kDevice;
    case AllocationKind::kVmm:
      return MemoryKind::kVirtual;
    case AllocationKind::kPool:
      return MemoryKind::kPool;
    case AllocationKind::kManaged:
      return MemoryKind::kManaged;
    default:
      return MemoryKind::kUnknown;
  }
}

// phos copies what it can map for itself. Blocks that allocations share stay whole with the driver.
bool can_copy(const AgentAllocation& a) {
  return a.export_type != ExportType::kNone &&
         (a.kind == AllocationKind::kDevice || a.kind == AllocationKind::kVmm);
}

// The same memory as before, not other memory at its address.
bool is_same(const AgentAllocation& a, const AgentAllocation& b) {
  return a.buffer_id == b.buffer_id && a.size == b.size && a.device_uuid == b.device_uuid;
}

// Allocations that phos cannot map, said once for each reason: PyTorch alone has dozens of them.
class Refusals {
 public:
  void add(const AgentAllocation& a, const Error& why) {
    auto [it, first] = by_reason_.try_emplace(why.message(), Group{0, 0, a.address});
    it->second.count++;
    it->second.bytes += a.size;
  }
  void report(const std::string& what) const {
    for (const auto& [why, group] : by_reason_) {
      log(LogLevel::kInfo, "daemon",
          "%s: %zu allocations, %s, are left to the driver, since they cannot be copied from "
          "outside (%s; the first is at %#llx)",
          what.c_str(), group.count, megabytes(group.bytes).c_str(), why.c_str(),
          static_cast<unsigned long long>(group.first));
    }
  }

 private:
  struct Group {
    size_t count;
    uint64_t bytes, first;
  };
  std::map<std::string, Group> by_reason_;
};

}  // namespace

Result<std::unique_ptr<LiveCopy>> LiveCopy::start(const LiveCopyTarget& target,
                                                  LiveCopyImages images, GpuEngines& engines) {
  auto key = images.previous ? PageHashKey::from_bytes(images.previous->hash_key())
             : images.key    ? *images.key
                             : PageHashKey::generate();
  if (!key) return key.error();
  std::unique_ptr<LiveCopy> copy(new LiveCopy(target, std::move(images), engines, *key));
  auto agent = Agent::attach(target.pid, target.restore_tid);
  if (!agent) return agent.error();
  copy->agent_ = std::make_shared<Agent>(std::move(*agent));
  return copy;
}

LiveCopy::LiveCopy(const LiveCopyTarget& target, LiveCopyImages images, GpuEngines& engines,
                   PageHashKey key)
    : target_(target),
      images_(std::move(images)),
      engines_(engines),
      key_(std::move(key)),
      finder_(target.pid, target.tracker) {}

LiveCopy::~LiveCopy() {
  gpus_.clear();
  guard_.reset();
  leave_process();
}

Result<CopiedMemory*> LiveCopy::memory_on(const GpuUuid& gpu) {
  auto at = std::find(images_.gpus.begin(), images_.gpus.end(), gpu);
  if (at == images_.gpus.end()) {
    return Error(Domain::kUsage, ENODEV,
                 process(target_.pid) + " uses " + format_gpu_uuid(gpu) +
                     ", which phosd does not see; start phosd with access to all GPUs");
  }
  const int index = static_cast<int>(at - images_.gpus.begin());
  for (auto& m : gpus_) {
    if (m->gpu_index() == index) return m.get();
  }
  auto user = engines_.use(gpu, key_);
  if (!user) return user.error();
  auto file = images_.store->add_file(target_.vpid, index);
  if (!file) return file.error();
  gpus_.push_back(std::make_unique<CopiedMemory>(std::move(*user), index, images_.store, *file,
                                                 key_,
                                                 images_.previous ? &*images_.previous : nullptr));
  return gpus_.back().get();
}

void LiveCopy::leave_to_driver(const AgentAllocation& a) {
  if (a.kind == AllocationKind::kManaged) managed_.push_back(a);
  AllocationInfo info;
  info.address = a.address;
  info.size = a.size;
  auto gpu = std::find(images_.gpus.begin(), images_.gpus.end(), a.device_uuid);
  if (gpu != images_.gpus.end()) info.gpu = static_cast<int>(gpu - images_.gpus.begin());
  info.kind = image_kind(a.kind);
  info.buffer_id = a.buffer_id;
  left_to_driver_.push_back(std::move(info));
}

// While it stands the process may run, and allocate and free what it likes.
Result<void> LiveCopy::start_guard() {
  if (guard_) return {};
  auto guard = MemoryGuard::start(target_.pid, *agent_);
  if (!guard) {
    return guard.error().wrap("its memory cannot be handed over while it runs, as nothing keeps " +
                              process(target_.pid) + " from freeing it meanwhile");
  }
  guard_ = std::move(*guard);
  return guard_->open();
}

Result<void> LiveCopy::finish_guard() {
  if (!guard_) return {};
  if (auto finished = guard_->finish(); !finished) {
    unclean_ = finished.error();
    return finished;
  }
  const GuardCost& cost = guard_->cost();
  log(LogLevel::kDebug, "daemon",
      "%s: %u closings of its gate, the first took %.1f ms: the longest proof %.1f ms, threads "
      "parked for at most %.1f ms, opened in %.1f ms",
      process(target_.pid).c_str(), cost.closings, static_cast<double>(cost.start.count()) / 1e3,
      static_cast<double>(cost.longest_proof.count()) / 1e3,
      static_cast<double>(cost.longest_closed.count()) / 1e3,
      static_cast<double>(cost.finish.count()) / 1e3);
  guard_.reset();
  return {};
}

Result<std::vector<AgentAllocation>> LiveCopy::list() {
  if (auto r = start_guard(); !r) return r.error();
  return finder_.list([this](const auto* ranges) { return guard_->enumerate(ranges); });
}

// Memory of which a handle can be had is mapped here; everything else stays with the driver.
// `guard`: null if the caller keeps the process from freeing it.
Result<void> LiveCopy::import_new(const std::vector<AgentAllocation>& fresh, MemoryGuard* guard) {
  uint64_t postponed = 0;
  auto handles =
      guard ? guard->export_memory(fresh) : agent_->export_memory(fresh, AgentGuard::kCaller);
  // Nobody is to be parked for what follows.
  auto opened = guard ? guard->open() : Result<void>();
  if (!handles) return handles.error();
  if (!opened) return opened;
  if (auto r = forget_gone(); !r) return r;
  Refusals refusals;
  for (size_t i = 0; i < fresh.size(); i++) {
    const AgentAllocation& a = fresh[i];
    AgentExport& handle = (*handles)[i];
    if (handle.status == ExportStatus::kStale) continue;  // freed meanwhile
    if (handle.status == ExportStatus::kUnguarded) {
      postponed += a.size;
      leave_to_driver(a);
      continue;
    }
    Result<void> added;
    if (handle.status == ExportStatus::kExported) {
      auto memory = memory_on(a.device_uuid);
      if (!memory) return memory.error();
      added = (*memory)->add(a, std::move(handle));
    } else {
      added = Error(Domain::kCuda, handle.driver_result,
                    "CUDA error " + std::to_string(handle.driver_result));
    }
    if (added) continue;
    refusals.add(a, added.error());
    refused_.insert(a.buffer_id);
    leave_to_driver(a);
  }
  refusals.report(process(target_.pid));
  if (postponed) {
    postponed_why_ = guard->obstacle();
    log(LogLevel::kInfo, "daemon", "%s: %s are not copied in this round: %s",
        process(target_.pid).c_str(), megabytes(postponed).c_str(), postponed_why_.c_str());
  }
  return {};
}

// Returns what phos could copy and does not yet; what it copies and is no more is to be forgotten.
std::vector<AgentAllocation> LiveCopy::compare(const std::vector<AgentAllocation>& seen) {
  std::set<uint64_t> present;
  std::vector<AgentAllocation> fresh;
  left_to_driver_.clear();
  managed_.clear();
  for (const AgentAllocation& a : seen) {
    if (!can_copy(a) || refused_.count(a.buffer_id)) {
      leave_to_driver(a);
      continue;
    }
    bool known = false;
    for (auto& m : gpus_) {
      const CopiedAllocation* copied = m->find(a.address);
      known |= copied && is_same(copied->seen, a);
    }
    if (known) {
      present.insert(a.address);
    } else {
      fresh.push_back(a);
    }
  }
  gone_.clear();
  for (auto& m : gpus_) {
    for (const auto& [address, copied] : m->all()) {
      if (!present.count(address)) gone_.push_back(address);
    }
  }
  return fresh;
}

Result<void> LiveCopy::forget_gone() {
  for (uint64_t address : std::exchange(gone_, {})) {
    for (auto& m : gpus_) {
      if (auto r = m->remove(address); !r) return r;
    }
  }
  return {};
}

Result<RoundReport> LiveCopy::copy_round(double max_slowdown, const std::stop_token& stop,
                                         bool unchanged) {
  const auto start = steady_clock::now();
  std::vector<std::future<Result<CopiedBytes>>> parts;
  for (auto& m : gpus_) {
    parts.push_back(std::async(std::launch::async, [&m, max_slowdown, &stop, unchanged] {
      return m->copy_round(max_slowdown, stop, unchanged);
    }));
  }
  RoundReport report;
  report.unchanged = unchanged;
  std::optional<Error> failed;
  for (auto& part : parts) {
    auto done = part.get();
    if (!done) {
      failed = done.error();
      continue;
    }
    report.round.pages += done->pages;
    report.round.dirty_pages += done->dirty_pages;
    report.round.bytes += done->bytes;
    report.checked_bytes += done->checked_bytes;
    // GPUs work side by side.
    report.round.copy_us = std::max(report.round.copy_us, done->copy_us);
  }
  if (failed) return failed->wrap("copying GPU memory of " + process(target_.pid));
  report.round.us = static_cast<uint64_t>(since(start).count());
  if (!rounds_.empty()) {
    report.round.since_us = static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::microseconds>(start - round_began_).count());
  }
  round_began_ = start;
  report.total_bytes = total_bytes();
  rounds_.push_back(report.round);
  return report;
}

Result<RoundReport> LiveCopy::round(double max_slowdown, const std::stop_token& stop) {
  postponed_why_.clear();
  const bool unchanged = !rounds_.empty() && finder_.nothing_called();
  if (auto seen = list(); seen) {
    const std::vector<AgentAllocation> fresh = compare(*seen);
    if (!target_.may_have_managed && !managed_.empty()) {
      return Error(Domain::kUsage, ENOTSUP, "it has managed memory");
    }
    if (auto r = import_new(fresh, guard_.get()); !r) return r.error();
  } else if (seen.error().code() == EAGAIN) {
    postponed_why_ = seen.error().message();
    log(LogLevel::kInfo, "daemon", "%s: new memory is not looked for in this round: %s",
        process(target_.pid).c_str(), postponed_why_.c_str());
  } else {
    return seen.error();
  }
  if (!unchanged) finder_.note_calls();
  auto report = copy_round(max_slowdown, stop, unchanged);
  if (report) {
    report->postponed = !postponed_why_.empty();
    report->postponed_why = postponed_why_;
  }
  return report;
}

// Much may be freed since the last round began, and what is recorded should be there. What is new
// would have to be copied as a whole, with the process standing still: that is left to the driver.
Result<void> LiveCopy::forget(Result<std::vector<AgentAllocation>> seen) {
  if (!seen) return seen.error();
  for (const AgentAllocation& a : compare(*seen)) leave_to_driver(a);
  return forget_gone();
}

Result<void> LiveCopy::forget_freed() {
  auto seen = list();
  if (guard_) (void)guard_->open().ok();  // finish() says whether it is
  // What is recorded beyond need does no harm: the next dump compares all that it finds.
  if (!seen && seen.error().code() == EAGAIN) return {};
  return forget(std::move(seen));
}

Result<void> LiveCopy::stop_watching() {
  // In this order: the finder looks for breakpoints that are left.
  auto stopped = finish_guard();
  if (auto r = finder_.stop(); stopped && !r) stopped = r;
  if (unclean_) return *unclean_;
  return stopped;
}

Result<void> LiveCopy::catch_up() {
  auto seen = agent_->enumerate();
  if (!seen) return seen.error();
  if (auto r = import_new(compare(*seen), nullptr); !r) return r;
  caught_up_ = true;
  return {};
}

Result<RoundReport> LiveCopy::last_round() {
  // A driver that does not answer in a locked process, as 580 does, need not be waited for.
  agent_->set_command_timeout(kLockedAnswer);
  auto forgotten = caught_up_ ? Result<void>() : forget(agent_->enumerate());
  if (!forgotten) {
    log(LogLevel::kWarn, "daemon",
        "%s: what it has freed or allocated since the last round cannot be told, so that the image "
        "may name pages of memory that is no more (%s)",
        process(target_.pid).c_str(), forgotten.error().message().c_str());
  }
  auto report = copy_round(0, {}, false);
  leave_process();
  return report;
}

// By kind and size alone: the agent looks at the rest, and leaves alone what does not suit it.
std::vector<AgentAllocation> LiveCopy::releasable() const {
  std::vector<AgentAllocation> found;
  for (const auto& m : gpus_) {
    for (const auto& [address, copied] : m->all()) {
      if (is_releasable(copied.seen)) found.push_back(copied.seen);
    }
  }
  return found;
}

// As it was found.
void LiveCopy::leave_process() {
  if (agent_) let_agent_leave(target_.pid, &agent_, agent_->was_loaded());
}

std::function<std::vector<std::unique_ptr<KeptMemory>>()> LiveCopy::room_to_keep() const {
  std::vector<std::pair<GpuUuid, uint64_t>> wanted;
  for (const auto& m : gpus_) {
    uint64_t bytes = 0;
    for (const auto& [address, copied] : m->all()) {
      if (is_releasable(copied.seen)) bytes += copied.pages() * kPageBytes;
    }
    if (bytes) wanted.emplace_back(images_.gpus[static_cast<size_t>(m->gpu_index())], bytes);
  }
  return [&engines = engines_, key = key_, wanted] {
    std::vector<std::unique_ptr<KeptMemory>> kept;
    for (const auto& [gpu, bytes] : wanted) {
      if (auto k = KeptMemory::begin(engines, gpu, key, bytes)) kept.push_back(std::move(k));
    }
    return kept;
  };
}

uint64_t LiveCopy::keep(const std::vector<std::unique_ptr<KeptMemory>>& kept) const {
  for (const auto& k : kept) {
    for (const auto& m : gpus_) {
      if (!(images_.gpus[static_cast<size_t>(m->gpu_index())] == k->gpu())) continue;
      for (const auto& [address, copied] : m->all()) {
        if (is_releasable(copied.seen)) m->keep(address, k.get());
      }
    }
  }
  uint64_t bytes = 0;  // of GPUs that have been at work side by side
  for (const auto& k : kept) bytes += k->finish();
  return bytes;
}

Result<void> LiveCopy::release() {
  Result<void> first;
  for (auto& m : gpus_) {
    auto r = m->release();
    if (!r && first) first = r;
  }
  return first;
}

Result<void> LiveCopy::finish(ProcessImage* image) {
  bool any = false;
  image->allocations = left_to_driver_;
  if (auto r = images_.store->finish(); !r) return r;
  image->layout = images_.store->layout();
  image->key_id = images_.store->key_id();
  for (auto& m : gpus_) {
    for (const auto& [address, copied] : m->all()) {
      AllocationInfo info;
      info.address = address;
      info.size = copied.seen.size;
      info.gpu = m->gpu_index();
      info.kind = image_kind(copied.seen.kind);
      // A dump's own bytes are in CRIU's pages; these are for the next dump to build on.
      info.path = image->stage == DumpStage::kPreDump ? MemoryPath::kReleased : MemoryPath::kDriver;
      info.buffer_id = copied.seen.buffer_id;
      add_pages(copied, *images_.store, image, &info);
      any = true;
      image->allocations.push_back(std::move(info));
    }
  }
  image->rounds = rounds_;
  if (!any) return {};
  const std::string key = key_.to_bytes();
  image->hash_key.assign(key.begin(), key.end());
  if (images_.previous) image->parent_dump_id = images_.previous->dump_id();
  return {};
}

uint64_t LiveCopy::total_bytes() const {
  uint64_t sum = 0;
  for (const auto& m : gpus_) sum += m->total_bytes();
  return sum;
}

}  // namespace phos
