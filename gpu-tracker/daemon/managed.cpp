// SPDX-License-Identifier: GPL-2.0-only
// Session: managed memory. The driver checkpoints no process that has any, so that there is no path
// for it but the released one; and threads reach it without the driver, so that it is saved and
// taken away only when CRIU has frozen them.
#include <algorithm>
#include <string>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/managed_memory.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

// Nothing is submitted while all threads stand still.
constexpr unsigned kRelockMs = 10000;
// Each costs calls of the driver, and looks at those of others, while the process stands still.
constexpr size_t kMostManaged = 16384;

uint64_t bytes_of(const std::vector<AgentAllocation>& memory) {
  uint64_t sum = 0;
  for (const AgentAllocation& a : memory) sum += a.size;
  return sum;
}

Error refuse_managed(int pid, const std::vector<AgentAllocation>& managed, const std::string& why) {
  return refuse(pid, "it has " + megabytes(bytes_of(managed)) +
                         " of managed memory (cudaMallocManaged), which NVIDIA's driver cannot "
                         "checkpoint and phos only on the released path: " +
                         why);
}

}  // namespace

Result<void> Session::check_managed(int pid, const Held& held) {
  if (held.managed.empty()) return {};
  if (held.managed.size() > kMostManaged) {
    return refuse_managed(pid, held.managed,
                          "which is for at most " + std::to_string(kMostManaged) + " allocations");
  }
  if (held.release) return {};
  return refuse_managed(pid, held.managed,
                        held.not_released.empty() ? "which it cannot take" : held.not_released);
}

std::vector<FoundProcess> Session::with_managed_memory() const {
  std::vector<FoundProcess> found;
  for (const auto& [pid, held] : held_) {
    if (!held.managed.empty()) found.push_back({pid, held.restore_tid, held.found});
  }
  return found;
}

// Before anything is locked.
Result<void> Session::refuse_managed_memory() const {
  for (const auto& [pid, held] : held_) {
    const auto& managed = held.copy ? held.copy->managed() : held.managed;
    if (managed.empty()) continue;
    return refuse_managed(pid, managed, "set release = auto in phosd.conf");
  }
  return {};
}

// The process is frozen but for the driver's restore thread and the agent's, and locked. After an
// error it is to be undone.
Result<void> Session::release_managed(int pid, Held* held) {
  if (auto r = check_managed(pid, *held); !r) return r;
  const auto start = steady_clock::now();
  if (auto r = driver_.unlock(pid); !r) return refuse(pid, r.error().message());
  held->locked = false;
  if (auto r = save_managed(pid, held); !r) return refuse(pid, r.error().message());
  auto results = held->release->release(held->managed, dump_id_);
  if (!results) return refuse(pid, results.error().message());
  for (size_t i = 0; i < results->size(); i++) {
    const AgentRelease& r = (*results)[i];
    if (r.status == ReleaseStatus::kReleased) continue;
    if (r.status == ReleaseStatus::kLost) held->release->log_lost();
    char text[160];
    snprintf(text, sizeof text,
             "its managed memory at %#llx (%llu bytes) could not be taken away so that it would "
             "come back (status %d, CUDA error %d)",
             static_cast<unsigned long long>(held->managed[i].address),
             static_cast<unsigned long long>(held->managed[i].size), static_cast<int>(r.status),
             r.driver_result);
    return refuse(pid, text);
  }
  auto locked = lock_or_leave(pid, kRelockMs);
  if (!locked) return locked.error().wrap("locking " + process(pid) + " again");
  held->locked = true;
  // While it was not: only if criu has died are there threads that could.
  if (auto r = held->release->check_closed(); !r) return refuse(pid, r.error().message());
  const auto took = since(start);
  held->release_time += took;
  log(LogLevel::kInfo, "daemon", "%s: %zu managed allocations, %s, saved and released in %.1f ms",
      process(pid).c_str(), held->managed.size(), megabytes(bytes_of(held->managed)).c_str(),
      static_cast<double>(took.count()) / 1000);
  return {};
}

// From here on any phosd can bring it back from the image directory, this one whatever becomes of
// that.
Result<void> Session::save_managed(int pid, Held* held) {
  auto store = PageStore::create(image_dir_.get(), dump_id_, storage_.pages);
  if (!store) return store.error();
  // The files of the GPUs are complete. This is another one, which belongs to none; the one of that
  // number is of host memory.
  auto file = (*store)->add_file(held->image->pid, static_cast<int>(gpus_.size()) + 1);
  if (!file) return file.error();
  ManagedCopy copy(std::move(*store), *file, held->copy->key(), held->copy->previous());
  auto round = held->release->save_managed(copy, held->managed);
  if (!round) return round.error();
  log(LogLevel::kInfo, "daemon", "%s: managed memory: %llu of %llu pages saved (%s) in %.1f ms",
      process(pid).c_str(), static_cast<unsigned long long>(round->dirty_pages),
      static_cast<unsigned long long>(round->pages), megabytes(round->bytes).c_str(),
      static_cast<double>(round->us) / 1000);
  ProcessImage image = *held->image;
  if (auto r = copy.finish(&image); !r) return r;
  if (auto r = write_process_image(image_dir_.get(), image, unsynced_.get()); !r) return r;
  if (auto r = open_saved_anew(held, image); !r) return r;
  held->image = std::move(image);
  return {};
}

}  // namespace phos
