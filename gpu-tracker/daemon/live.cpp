// SPDX-License-Identifier: GPL-2.0-only
// Session: the rounds of live copying, and what becomes of them when the process is locked.
#include <sys/statvfs.h>

#include <algorithm>
#include <future>
#include <mutex>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"
#include "gpu-tracker/daemon/session_log.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

// So little is copied in a millisecond: further rounds would not shorten the stop.
constexpr uint64_t kLittle = 32 << 20;

// Would another round find clearly less to copy than this one did?
bool is_worth_another(uint64_t copied, uint64_t copied_before) {
  return copied > kLittle && copied < copied_before / 4 * 3;
}

double gigabytes_a_second(uint64_t bytes, uint64_t us) {
  return us ? static_cast<double>(bytes) / 1e3 / static_cast<double>(us) : 0;
}

// What is said of a round besides how much it copied.
std::string remark(const RoundReport& report) {
  char text[80] = "";
  if (report.unchanged) {
    return "; it has called nothing since the last one, so that no page was hashed";
  }
  if (report.round.since_us) {
    snprintf(text, sizeof text, "; %.1f MB/s changed",
             1e3 * gigabytes_a_second(report.round.bytes, report.round.since_us));
  }
  return text;
}

void log_round(int pid, const char* name, const RoundReport& report) {
  log(LogLevel::kInfo, "daemon",
      "%s: %s: %llu of %llu pages copied, %.1f MiB in %.1f ms (%.1f GB/s), all in %.1f ms%s",
      process(pid).c_str(), name, static_cast<unsigned long long>(report.round.dirty_pages),
      static_cast<unsigned long long>(report.round.pages),
      static_cast<double>(report.round.bytes) / (1 << 20),
      static_cast<double>(report.round.copy_us) / 1000,
      gigabytes_a_second(report.round.bytes, report.round.copy_us),
      static_cast<double>(report.round.us) / 1000, remark(report).c_str());
}

}  // namespace

// A restore may have brought a key with it. Memory that is away must not depend on one which the
// next phosd, should this one die, does not find by itself.
Result<void> Session::check_keys(const PreviousPages& previous) const {
  for (const ChainLevel& level : previous.levels()) {
    if (level.key_id == KeyId{} || level.key_id == storage_.configured_key) continue;
    return Error(Domain::kUsage, ENOKEY,
                 level.directory + " is encrypted with key " + format_key_id(level.key_id) +
                     ", and phosd is configured with another one or none");
  }
  return {};
}

// What the parent directory has of this process. One that is of no use costs a full copy.
std::optional<PreviousPages> Session::open_previous(int vpid) const {
  auto parent = open_parent(image_dir_.get());
  if (!parent) {
    if (parent.error().code() != ENOENT) {
      log(LogLevel::kWarn, "daemon", "GPU pages are not built on the parent's: %s",
          parent.error().message().c_str());
    }
    return std::nullopt;
  }
  auto previous = PreviousPages::open(parent->get(), vpid);
  const auto usable = previous && *previous ? check_keys(**previous) : Result<void>();
  if (previous && usable) return std::move(*previous);
  log(LogLevel::kWarn, "daemon", "GPU pages are not built on the parent's: %s",
      (previous ? usable.error() : previous.error()).message().c_str());
  return std::nullopt;
}

Result<std::shared_ptr<PageStore>> Session::page_store() {
  if (store_) return store_;
  auto store = PageStore::create(image_dir_.get(), dump_id_, storage_.pages);
  if (!store) return store.error();
  store_ = std::move(*store);
  return store_;
}

bool Session::has_room_for(uint64_t bytes) const {
  struct statvfs disk;
  return fstatvfs(image_dir_.get(), &disk) != 0 || uint64_t{disk.f_bavail} * disk.f_frsize >= bytes;
}

// What is not released the driver saves as well, into CRIU's images: a disk that has no room for
// both must not fail the dump for what is only there to make later ones shorter.
bool Session::has_room_for_copies() const {
  uint64_t needed = 0;
  for (const auto& [pid, held] : held_) {
    if (held.found == CudaState::kRunning) needed += (release_wanted_ ? 1 : 2) * held.memory.own;
  }
  if (has_room_for(needed)) return true;
  log(LogLevel::kWarn, "daemon",
      "GPU memory is not copied ahead: that takes %s in the image directory, which has less free",
      megabytes(needed).c_str());
  return false;
}

Result<void> Session::start_copy(int pid, Held* held, TrackerChoice tracker) {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto store = page_store();
  if (!store) return store.error();
  LiveCopyImages images;
  images.store = *store;
  for (const GpuInfo& gpu : gpus_) images.gpus.push_back(gpu.uuid);
  images.previous = open_previous(status->vpid);
  if (!images.previous) {
    if (!hash_key_) {
      auto key = PageHashKey::generate();
      if (!key) return key.error();
      hash_key_ = std::move(*key);
    }
    images.key = hash_key_;
  }
  // From here on there is an agent in it, which another phosd will take out.
  (void)note(held).ok();  // said when it is locked
  const auto start = steady_clock::now();
  auto copy = LiveCopy::start({pid, status->vpid, held->restore_tid, tracker,
                               stage_ == DumpStage::kPreDump || release_wanted_},
                              std::move(images), *engines_);
  if (!copy) return copy.error();
  held->scan_time = since(start);
  held->copy = std::move(*copy);
  return {};
}

Result<void> Session::run_rounds(int pid, LiveCopy* copy, const CopyLimits& limits,
                                 const CopyProgress& progress, const std::stop_token& stop) {
  const auto end = steady_clock::now() + limits.budget;
  uint64_t before = UINT64_MAX, copied_all = 0;
  bool postponed = false;
  std::string postponed_why;
  for (unsigned number = 1; number <= limits.max_rounds; number++) {
    auto report = copy->round(limits.max_slowdown, stop);
    if (!report) return report.error();
    log_round(pid, ("round " + std::to_string(number)).c_str(), *report);
    if (!progress(pid, number, *report)) {
      return Error(Domain::kErrno, ECANCELED, "the copy of " + process(pid) + " was given up");
    }
    const uint64_t copied = report->round.bytes;
    copied_all = report->total_bytes;
    postponed = report->postponed;
    postponed_why = report->postponed_why;
    if (!postponed && !is_worth_another(copied, before)) break;
    if (steady_clock::now() >= end) break;
    before = copied;
  }
  if (postponed && !copied_all) {
    if (auto r = copy->stop_watching(); !r) return r;
    return Error(Domain::kErrno, EAGAIN,
                 "none of its memory could be handed over: " + postponed_why);
  }
  if (stage_ == DumpStage::kPreDump) {
    if (auto r = copy->forget_freed(); !r) return r;
  }
  if (auto r = copy->flush(); !r) return r;
  return copy->stop_watching();
}

Result<void> Session::copy(const CopyLimits& limits, const CopyProgress& progress,
                           const std::stop_token& stop) {
  if (!engines_) return {};
  const bool pre_dump = stage_ == DumpStage::kPreDump;
  release_wanted_ = limits.release && !pre_dump;
  if (!pre_dump && !has_room_for_copies()) return {};
  std::mutex reporting;
  auto report = [&](int pid, unsigned number, const RoundReport& r) {
    std::lock_guard<std::mutex> hold(reporting);
    return progress(pid, number, r);
  };
  std::map<int, std::future<Result<void>>> under_way;
  std::map<int, Error> failures;
  for (auto& [pid, held] : held_) {
    if (held.found != CudaState::kRunning || held.locked || held.copy) continue;
    if (auto r = start_copy(pid, &held, limits.tracker); !r) {
      failures.emplace(pid, r.error());
      continue;
    }
    under_way[pid] =
        std::async(std::launch::async, [this, pid = pid, copy = held.copy.get(), &limits, &report,
                                        &stop, session_log = SessionLog::current()] {
          SessionLog::Scope scope(session_log);
          return run_rounds(pid, copy, limits, report, stop);
        });
  }
  for (auto& [pid, rounds] : under_way) {
    if (auto r = rounds.get(); !r) failures.emplace(pid, r.error());
  }
  for (auto& [pid, error] : failures) {
    auto it = held_.find(pid);
    auto stopped = it->second.copy ? it->second.copy->stop_watching() : Result<void>();
    if (it->second.copy) it->second.managed = it->second.copy->managed();
    it->second.not_released = error.message();
    it->second.copy.reset();
    if (has_ended(pid, it->second.restore_tid, it->second.start_time, error)) continue;
    if (error.code() == ECANCELED) return error;
    if (!stopped) return refuse(pid, stopped.error().message());
    // A dump goes on without: the driver saves all of it, slowly.
    if (pre_dump) return error.wrap("cannot pre-dump GPU memory of " + process(pid));
    log(LogLevel::kWarn, "daemon", "%s: its GPU memory is not copied ahead: %s",
        process(pid).c_str(), error.message().c_str());
  }
  return pre_dump || release_wanted_ ? Result<void>() : refuse_managed_memory();
}

bool Session::has_copies() const {
  return std::any_of(held_.begin(), held_.end(),
                     [](const auto& h) { return h.second.copy && !h.second.copy_completed; });
}

Result<void> Session::with_copies(Result<void> (Session::*work)(int, Held*)) {
  std::map<int, std::future<Result<void>>> under_way;
  for (auto& [pid, held] : held_) {
    if (!held.locked || !held.copy) continue;
    under_way[pid] = std::async(std::launch::async, [this, work, pid = pid, &held = held,
                                                     session_log = SessionLog::current()] {
      SessionLog::Scope scope(session_log);
      return (this->*work)(pid, &held);
    });
  }
  Result<void> result;
  for (auto& [pid, working] : under_way) {
    auto r = working.get();
    const Held& held = held_.at(pid);
    if (!r && !has_ended(pid, held.restore_tid, held.start_time, r.error())) result = r;
  }
  return result;
}

// Nothing is released before all is saved: pages of one process may be in another one's file.
Result<void> Session::complete_copies() {
  if (auto r = with_copies(&Session::complete_copy); !r) return r;
  return with_copies(&Session::release_memory);
}

// The process is locked: nothing changes any more.
Result<void> Session::complete_copy(int pid, Held* held) {
  if (held->copy_completed) return {};
  const auto start = steady_clock::now();
  if (held->release) {
    if (auto r = catch_up(pid, held); !r) return r;
    held->managed = held->copy->managed();
  }
  std::future<std::vector<std::unique_ptr<KeptMemory>>> room;
  if (will_go_on_ && held->release && engines_->stages()) {
    room = std::async(std::launch::async, held->copy->room_to_keep());
  }
  auto report = held->copy->last_round();
  Result<void> done;
  if (report) {
    log_round(pid, "last round", *report);
  } else {
    done = report.error();
  }
  auto kept = room.valid() ? room.get() : std::vector<std::unique_ptr<KeptMemory>>();
  if (report && !kept.empty()) keep_copies(pid, held, std::move(kept));
  if (done) done = held->copy->release();
  if (done && !held->release && !has_room_for(held->memory.own)) {
    done = Error(Domain::kErrno, ENOSPC, "the driver's needs the room in the image directory");
  }
  held->validate_time = since(start);
  held->copy_completed = done.ok();
  if (done) return {};
  held->copy.reset();
  held->kept.clear();
  if (has_ended(pid, held->restore_tid, held->start_time, done.error())) return done;
  log(LogLevel::kWarn, "daemon", "%s: the copy of its GPU memory is given up: %s",
      process(pid).c_str(), done.error().message().c_str());
  if (held->release) give_up_release(pid, held, "it is not saved");
  return check_managed(pid, *held);
}

// What it has is what is saved.
void Session::keep_copies(int pid, Held* held, std::vector<std::unique_ptr<KeptMemory>> room) {
  const auto start = steady_clock::now();
  const uint64_t bytes = held->copy->keep(room);
  held->kept = std::move(room);
  log(LogLevel::kInfo, "daemon", "%s: %s of its GPU memory kept on its GPUs in %.1f ms",
      process(pid).c_str(), megabytes(bytes).c_str(), since(start).count() / 1000.0);
}

Result<void> Session::finish_pre_dump() {
  for (auto& [pid, held] : held_) {
    if (!held.copy) continue;
    held.copy->conclude();
    auto r = held.copy->release();
    if (r) continue;
    // Of one that has ended meanwhile nothing is saved.
    if (!has_ended(pid, held.restore_tid, held.start_time, r.error())) return r;
    held.copy.reset();
  }
  for (auto& [pid, held] : held_) {
    if (!held.copy) continue;
    auto r = write_image(pid, &held, {});
    if (!r && !has_ended(pid, held.restore_tid, held.start_time, r.error())) return r;
  }
  held_.clear();
  return {};
}

// Whoever has asked for encryption should not believe that everything is encrypted.
void Session::log_unencrypted(int pid, const ProcessImage& image, uint64_t copy) {
  uint64_t released = 0;
  for (const AllocationInfo& a : image.allocations) {
    if (a.path == MemoryPath::kReleased) released += a.size;
  }
  if (released == 0) {
    log(LogLevel::kWarn, "daemon",
        "%s: its GPU memory, which NVIDIA's driver saved, and its CPU memory are in CRIU's images, "
        "which are not encrypted; memory that is released (phosd.conf) is kept out of them",
        process(pid).c_str());
    return;
  }
  log(LogLevel::kInfo, "daemon",
      "%s: %s of GPU memory are encrypted, and %s that NVIDIA's driver saved; what else it saved, "
      "and CPU memory, are in CRIU's images, which are not",
      process(pid).c_str(), megabytes(released).c_str(), megabytes(copy).c_str());
}

// Once, when all that is to be stored is. A page that was saved in several rounds counts each time.
void Session::log_storage() {
  if (!store_ || std::exchange(statistics_logged_, true)) return;
  const PageStoreStatistics s = store_->statistics();
  if (!s.pages) return;
  log(LogLevel::kInfo, "daemon",
      "of %llu pages that were saved, %llu were stored already; the others take %s, %s before they "
      "were compressed",
      static_cast<unsigned long long>(s.pages), static_cast<unsigned long long>(s.shared),
      megabytes(s.bytes).c_str(), megabytes(s.stored * kImagePageSize).c_str());
}

}  // namespace phos
