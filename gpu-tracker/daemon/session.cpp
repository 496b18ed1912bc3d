// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/session.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "gpu-tracker/abi/version.h"
#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/gate/left_probes.h"
#include "gpu-tracker/image/criu_tree.h"

namespace phos {
namespace {

using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr std::chrono::milliseconds kRecoverPoll{10}, kRecoverPollMax{1000};
constexpr std::chrono::milliseconds kDyingTime{1000};
constexpr std::chrono::milliseconds kTakeOverTime{10000};

// And not by this phosd, for a gate. The tracer is a thread.
bool is_traced_by_other(const ProcStatus& status) {
  if (!status.tracer_pid) return false;
  auto tracer = read_proc_status(status.tracer_pid);
  return !tracer || tracer->tgid != getpid();
}

}  // namespace

Session::Session(GpuDriver& driver, std::string lock_dir, GpuEngines* engines)
    : driver_(driver),
      lock_dir_(std::move(lock_dir)),
      pins_(lock_dir_ + "/.."),
      engines_(engines) {}

void Session::ends_soon() const {
  for (const auto& [pid, held] : held_) held.lock.ends_soon();
}

Result<ProcessLock> Session::take_lock(int pid, uint64_t start_time, bool what_is_left) const {
  return ProcessLock::take(lock_dir_, pid, start_time, what_is_left, client_gone_);
}

Result<void> Session::begin_dump(UniqueFd image_dir, DumpStage stage, ImageStorage storage,
                                 Durability durability) {
  image_dir_ = std::move(image_dir);
  if (durability == Durability::kMemory) {
    UniqueFd directory(fcntl(image_dir_.get(), F_DUPFD_CLOEXEC, 0));
    if (!directory) return Error::from_errno(errno, "cannot use the image directory");
    unsynced_ = std::make_unique<UnsyncedFiles>(std::move(directory));
  }
  if (engines_) pool_peak_.emplace(engines_->pool());
  stage_ = stage;
  storage_ = std::move(storage);
  storage_.pages.later = unsynced_.get();
  if (getrandom(dump_id_.data(), dump_id_.size(), 0) != static_cast<ssize_t>(dump_id_.size())) {
    return Error::from_errno(errno, "getrandom");
  }
  files_.dump_id = dump_id_;
  dumping_ = true;
  return remove_all_images(image_dir_.get());
}

Result<FilesImage> Session::begin_restore(UniqueFd image_dir) {
  image_dir_ = std::move(image_dir);
  if (engines_) pool_peak_.emplace(engines_->pool());
  auto set = read_image_set(image_dir_.get());
  if (!set) return set.error();
  if (auto r = check_stage(*set); !r) return r.error();
  if (!set->processes.empty()) {
    auto api = driver_.api_version();
    if (!api) return api.error();
    auto gpus = driver_.gpus();
    if (!gpus) return gpus.error();
    for (const auto& p : set->processes) {
      if (auto r = check_driver(p, *api); !r) return r.error();
      auto pairs = plan_gpu_mapping(p.gpus, *gpus);
      if (!pairs) return pairs.error();
      gpu_pairs_ = *pairs;
    }
  }
  for (const auto& p : set->processes) {
    if (auto r = open_pages(p); !r) return r.error();
  }
  for (const auto& p : set->processes) restore_room_[p.pid] = claim_room(p);
  for (const auto& [pid, room] : restore_room_) make_room(room);
  // Once it is known what all of them need.
  prefetch_saved();
  restored_ = std::move(*set);
  dump_id_ =
      restored_.processes.empty() ? restored_.files.dump_id : restored_.processes.front().dump_id;
  to_resume_ = static_cast<uint32_t>(restored_.processes.size());
  return restored_.files;
}

// Those first that CRIU resumes first.
void Session::prefetch_saved() {
  const auto turns = std::make_shared<ReadTurns>();
  std::set<int> left;
  for (const auto& [pid, saved] : saved_) left.insert(pid);
  std::vector<int> order;
  for (int pid : order_of_restore(image_dir_.get())) {
    if (left.erase(pid)) order.push_back(pid);
  }
  order.insert(order.end(), left.begin(), left.end());
  std::string text;
  for (int pid : order) {
    saved_.at(pid).loader->prefetch(turns);
    text += " " + std::to_string(pid);
  }
  if (order.size() > 1) {
    log(LogLevel::kInfo, "daemon", "pages are read ahead of processes%s, in this order",
        text.c_str());
  }
}

Result<void> Session::checkpoint(int pid) {
  auto it = held_.find(pid);
  if (it == held_.end()) {
    // CUDA may have been initialised after inspect() looked.
    auto tid = driver_.restore_thread_id(pid);
    if (!tid) return {};
    return refuse(pid, "it began to use CUDA while it was being dumped; try again");
  }
  Held& held = it->second;
  if (held.release) {
    if (auto r = held.release->check_closed(); !r) return refuse(pid, r.error().message());
  }
  if (!held.managed.empty()) {
    if (auto r = release_managed(pid, &held); !r) return r;
  }
  const auto start = steady_clock::now();
  if (held.found != CudaState::kCheckpointed) {
    if (auto r = driver_.checkpoint(pid); !r) {
      if (is_cuda_error(r.error(), kCudaErrorNotSupported)) {
        return refuse(
            pid,
            "NVIDIA's driver refuses it (CUDA_ERROR_NOT_SUPPORTED): it uses managed memory "
            "(cudaMallocManaged) that phos could not save, or another feature the driver cannot "
            "checkpoint");
      }
      return refuse(pid, r.error().message());
    }
  }
  const auto took = since(start);
  log(LogLevel::kInfo, "daemon", "%s: GPU memory moved to host memory in %.1f ms",
      process(pid).c_str(), took.count() / 1000.0);
  if (will_go_on_ && held.loader && held.release && held.release->is_away()) {
    held.loader->prefetch();
  }
  if (auto r = save_copy(pid, &held); !r) {
    log(LogLevel::kWarn, "daemon", "%s: CRIU saves the driver's own copy: %s", process(pid).c_str(),
        r.error().message().c_str());
  }
  auto written = write_image(pid, &held, took);
  auto emptied = written ? empty_copy(pid, &held) : Result<uint64_t>(uint64_t{0});
  if (!emptied) return emptied.error();
  if (storage_.pages.key) log_unencrypted(pid, *held.image, *emptied);
  if (held.image && held.room.claims.empty()) {
    held.room = claim_room(*held.image);
    make_room(held.room);
  }
  return written;
}

// All but what was saved of its memory.
Result<ProcessImage> Session::describe(int pid, const Held& held) const {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto release = driver_.release();
  if (!release) return release.error();
  auto api = driver_.api_version();
  if (!api) return api.error();
  ProcessImage image;
  image.dump_id = dump_id_;
  image.pid = status->vpid;
  image.comm = status->comm;
  image.stage = stage_;
  image.state = held.found;
  image.driver_release = *release;
  image.driver_api = *api;
  image.created_us = static_cast<uint64_t>(
      duration_cast<microseconds>(std::chrono::system_clock::now().time_since_epoch()).count());
  image.phos_version = PHOS_VERSION;
  image.gpus = gpus_;
  image.device_bytes = held.memory.own;
  for (const GpuInfo& gpu : gpus_) {
    const auto on = held.memory.own_on.find(gpu.uuid);
    if (!held.memory.own_on.empty()) {
      image.gpu_bytes.push_back(on == held.memory.own_on.end() ? 0 : on->second);
    }
  }
  if (storage_.pages.key) image.key_id = storage_.pages.key->id();
  return image;
}

// What becomes of its memory; the log of the release says which of it was released after all.
void Session::log_memory(int pid, const ProcessImage& image) {
  uint64_t saved = 0, listed = 0;
  for (const AllocationInfo& a : image.allocations) {
    if (a.gpu < 0) continue;
    listed += a.size;
    if (!a.hashes.empty()) saved += a.size;
  }
  if (image.allocations.empty()) return;
  log(LogLevel::kInfo, "daemon",
      "%s: %s of its GPU memory are copied by phos; the driver's are %s that phos cannot copy, and "
      "%s "
      "of contexts, code, arrays and what else no address leads to",
      process(pid).c_str(), megabytes(saved).c_str(), megabytes(listed - saved).c_str(),
      megabytes(unlisted_bytes(image)).c_str());
}

Result<void> Session::write_image(int pid, Held* held, microseconds checkpoint_time) {
  if (!held->image) {
    auto image = describe(pid, *held);
    if (!image) return image.error();
    if (held->copy) {
      if (auto r = held->copy->finish(&*image); !r) return r;
    }
    held->image = std::move(*image);
    log_memory(pid, *held->image);
  }
  auto us = [](microseconds t) { return static_cast<uint64_t>(t.count()); };
  Timings& timings = held->image->timings;
  timings.scan_us = us(held->scan_time);
  timings.lock_us = us(held->lock_time);
  timings.checkpoint_us = us(checkpoint_time);
  timings.gate_us = us(held->gate_time);
  timings.validate_us = us(held->validate_time);
  timings.write_us = us(held->write_time);
  timings.release_us = us(held->release_time);
  timings.copy_us = us(held->copy_time);
  if (held->stopped) timings.stopped_us = us(since(*held->stopped));
  log_storage();
  return write_process_image(image_dir_.get(), *held->image, unsynced_.get());
}

// Of a process that runs, which is about to be unlocked: its threads park, but those that have the
// gate's signal blocked.
void Session::stop_passing(int pid, Held* held) {
  if (!held->release || !held->release->is_away() || held->taken_over) return;
  auto status = read_proc_status(pid);
  if (!status || is_traced_by_other(*status)) return;
  if (auto closed = held->release->check_closed(); !closed) {
    log(LogLevel::kError, "daemon", "%s", closed.error().message().c_str());
  }
  held->release->stop_passing();
}

Result<void> Session::bring_back(int pid, CudaState target, Held* held, const ProcessImage* image,
                                 Room* room) {
  auto state = driver_.state(pid);
  if (!state) return state.error();
  if (target != CudaState::kCheckpointed) {
    if (auto r = put_copy_back(pid, *state, held, image); !r) return r;
  }
  if (*state == CudaState::kCheckpointed && target != CudaState::kCheckpointed) {
    const auto needs = held ? needs_of(pid, held) : needs_of(*image);
    if (auto r = restore_by_driver(pid, needs, held, room); !r) return r;
    state = CudaState::kLocked;
  }
  if (*state == CudaState::kLocked && target == CudaState::kRunning) {
    if (held) stop_passing(pid, held);
    if (auto r = driver_.unlock(pid); !r) return r;
    state = CudaState::kRunning;
  }
  if (*state != target) {
    return Error(Domain::kCuda, kCudaErrorIllegalState,
                 process(pid) + " is " + to_string(*state) + " in NVIDIA's driver and cannot be " +
                     to_string(target) + " again");
  }
  return {};
}

Result<void> Session::take_over(const LeftProcess& left) {
  auto lock = take_lock(left.pid, left.start_time, true);
  if (!lock) return lock.error();
  auto tid = driver_.restore_thread_id(left.pid);
  auto start_time = read_start_time(left.pid);
  // One that has no CUDA any more is dying, or runs another program (execve).
  const bool ended = start_time ? *start_time != left.start_time ||
                                      (!tid && is_cuda_error(tid.error(), kCudaErrorNotInitialized))
                                : start_time.error().code() == ESRCH;
  if (ended) return {};  // only the file is left, which goes with the lock
  if (!tid || !start_time) {
    lock->leave();
    return tid ? start_time.error() : tid.error();
  }
  Held held(*tid, left.found, *start_time, std::move(*lock));
  held.taken_over = true;
  left_dump_ = left.dump;
  held_.emplace(left.pid, std::move(held));
  return {};
}

// A phosd that has just been started takes over what it finds by itself.
Result<void> Session::wait_to_take_over(int pid, CudaState found) {
  const auto deadline = steady_clock::now() + kTakeOverTime;
  for (;;) {
    auto start_time = read_start_time(pid);
    if (!start_time) return {};  // it has ended
    LeftProcess left{pid, *start_time, found, {}, {}};
    for (const LeftProcess& noted : read_left_processes(lock_dir_)) {
      if (noted.pid == pid && noted.start_time == *start_time) left.dump = noted.dump;
    }
    auto r = take_over(left);
    const bool taken = !r && (r.error().code() == EBUSY || r.error().code() == EAGAIN);
    if (!taken || steady_clock::now() > deadline) return r;
    std::this_thread::sleep_for(kRecoverPoll);
  }
}

Result<void> Session::undo(int pid, CudaState found) {
  auto it = held_.find(pid);
  if (it == held_.end()) {
    if (auto r = wait_to_take_over(pid, found); !r) return r;
    it = held_.find(pid);
    if (it == held_.end()) return {};  // it has ended
  }
  Held& held = it->second;
  if (!has_ended(pid, held.restore_tid, held.start_time)) {
    auto r = undo_one(pid, &held);
    if (!r && !has_ended(pid, held.restore_tid, held.start_time, r.error())) return r;
    log(LogLevel::kInfo, "daemon", "%s: back to %s", process(pid).c_str(),
        r ? to_string(held.found) : "nothing: it has ended");
    held.leaving = r && held.release;
    if (r && held.taken_over) note_went_on(pid);
  }
  if (held.leaving) return {};
  ended_with_managed_ |= !held.managed.empty() && has_ended(pid, held.restore_tid, held.start_time);
  held_.erase(it);
  return {};
}

// All but opening its gate for good, for which the process must run.
Result<void> Session::undo_one(int pid, Held* held) {
  if (!held->copy_completed) held->copy.reset();
  if (auto r = bring_back(pid, held->found, held, nullptr, &held->room); !r) return r;
  held->locked = false;
  if (auto r = bring_memory_back(pid, held); !r) return r;
  held->room = {};
  held->kept.clear();
  if (held->loader) held->loader->take_kept();
  return held->release ? held->release->let_go() : Result<void>();
}

// All tasks are restored by now, and none has run.
Result<void> Session::remove_left_probes_of_tree(int root) {
  for (int pid : with_descendants(root)) {
    if (!without_probes_.insert(pid).second) continue;
    auto removed = remove_left_probes(pid);
    if (!removed) {
      without_probes_.erase(pid);
      return removed.error();
    }
    if (*removed) {
      log(LogLevel::kDebug, "daemon", "%s: %zu breakpoints of the gate taken out",
          process(pid).c_str(), *removed);
    }
  }
  return {};
}

Result<std::optional<FoundProcess>> Session::find_restored(int pid) {
  const std::optional<FoundProcess> none;
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  if (auto r = remove_left_probes_of_tree(pid); !r) return r.error();
  auto is_it = [&](const ProcessImage& p) { return p.pid == status->vpid; };
  bool in_images = std::any_of(restored_.processes.begin(), restored_.processes.end(), is_it);
  auto tid = driver_.restore_thread_id(pid);
  if (tid && in_images) {
    return std::optional<FoundProcess>(FoundProcess{pid, *tid, CudaState::kCheckpointed});
  }
  if (!tid && !in_images) return none;
  if (tid) {
    return Error(Domain::kFormat, ENOENT,
                 process(pid) + " uses CUDA, but there is no phos-" + std::to_string(status->vpid) +
                     ".img: the image directory is incomplete; copy all of it");
  }
  return tid.error();
}

Result<uint32_t> Session::resume(int pid) {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto image = std::find_if(restored_.processes.begin(), restored_.processes.end(),
                            [&](const ProcessImage& p) { return p.pid == status->vpid; });
  const std::string what = "GPU state of " + process(pid) + " cannot be restored";
  if (image == restored_.processes.end()) {
    return Error(Domain::kFormat, ENOENT, what + ": it is not in the images");
  }
  const auto start = steady_clock::now();
  auto state = driver_.state(pid);
  if (!state) return state.error().wrap(what);
  if (*state != CudaState::kCheckpointed) {
    return Error(Domain::kCuda, kCudaErrorIllegalState,
                 what + ": it is " + to_string(*state) + ", not checkpointed");
  }
  if (auto r = bring_back(pid, image->state, nullptr, &*image, &restore_room_[image->pid]); !r) {
    return r.error().wrap(what);
  }
  log(LogLevel::kInfo, "daemon", "%s: restored by the driver in %.1f ms, now %s",
      process(pid).c_str(), static_cast<double>(since(start).count()) / 1000,
      to_string(image->state));
  if (auto r = restore_memory(pid, *image); !r) return r.error().wrap(what);
  restore_room_.erase(image->pid);
  if (to_resume_ > 0) to_resume_--;
  return to_resume_;
}

Result<void> Session::add_file(const DeviceFile& file) {
  files_.files.push_back(file);
  return write_files_image(image_dir_.get(), files_, unsynced_.get());
}

Result<void> Session::finish(bool success) {
  if (success && stage_ == DumpStage::kPreDump) {
    if (auto r = finish_pre_dump(); !r) return r;
  }
  finished_ = success;
  failed_ = !success;
  if (success && pool_peak_ && pool_peak_->bytes()) {
    log(LogLevel::kInfo, "daemon",
        "at most %s of pinned host memory were in use at a time, of %s that may be (pool_size)",
        megabytes(pool_peak_->bytes()).c_str(), megabytes(engines_->pool().max_bytes()).c_str());
  }
  if (unsynced_ && success && !unsynced_->empty()) {
    log(LogLevel::kInfo, "daemon",
        "%s of GPU images are in the page cache; phosd makes them durable from now on",
        megabytes(unsynced_->bytes()).c_str());
  }
  if (dumping_ && !success && !needs_images()) return remove_images(image_dir_.get(), dump_id_);
  return {};
}

std::unique_ptr<UnsyncedFiles> Session::take_unsynced() {
  if (!finished_ || !unsynced_ || unsynced_->empty()) return nullptr;
  return std::move(unsynced_);
}

bool has_ended(int pid, int restore_tid, uint64_t start_time) {
  auto now = read_start_time(pid);
  auto status = read_proc_status(pid);
  auto thread = read_proc_status(restore_tid);
  return !now || *now != start_time || !status || !thread || thread->tgid != status->tgid ||
         thread->state == 'Z' || thread->state == 'X';
}

bool has_ended(int pid, int restore_tid, uint64_t start_time, const Error& error) {
  // (The kernel takes a dying task's memory away before it shows the task dead.)
  const bool silent = is_cuda_error(error, kCudaErrorOperatingSystem) ||
                      is_cuda_error(error, kCudaErrorNotInitialized) ||
                      (error.domain() == Domain::kErrno && error.code() == ESRCH);
  const auto deadline = steady_clock::now() + (silent ? kDyingTime : kDyingTime.zero());
  for (;;) {
    if (has_ended(pid, restore_tid, start_time)) return true;
    if (steady_clock::now() >= deadline) return false;
    std::this_thread::sleep_for(kRecoverPoll);
  }
}

bool Session::recover_one(int pid, Held* held) {
  // Killed, as a successful dump does.
  if (has_ended(pid, held->restore_tid, held->start_time)) {
    ended_with_managed_ |= !held->managed.empty();
    return true;
  }
  auto status = read_proc_status(pid);
  auto thread = read_proc_status(held->restore_tid);
  if (!status || !thread) return true;
  // Frozen: CRIU still has it, or a debugger, or its cgroup. The driver would block on it.
  if (is_traced_by_other(*status) || thread->tracer_pid || thread->state == 'T' ||
      is_cgroup_frozen(pid)) {
    return false;
  }
  if (held->restored && !held->leaving) {
    kill_unrestored(pid, held);
    return false;
  }
  auto r = held->leaving ? Result<void>() : undo_one(pid, held);
  if (r && !held->leaving) {
    log(LogLevel::kInfo, "daemon", "%s was left running; back to %s", process(pid).c_str(),
        to_string(held->found));
    held->leaving = true;
    if (held->taken_over) note_went_on(pid);
  }
  if (r && held->release) r = held->release->open();
  if (r || give_up(pid, held, r.error())) return true;
  // Perhaps only for now: another process may have taken the GPU memory it gave up.
  const std::string end = "to end it: kill -KILL " + std::to_string(pid);
  if (!held->failure_reported) {
    log(LogLevel::kError, "daemon", "%s waits for its GPU, trying again and again (%s): %s",
        process(pid).c_str(), end.c_str(), r.error().message().c_str());
    held->failure_reported = true;
  }
  held->lock.in_trouble(
      "phosd is still bringing it back after an earlier dump, and goes on trying (" + end +
      "): " + r.error().message());
  return false;
}

// It could not be brought back. Never will it be if the driver has lost it, or if somebody else has
// brought it further back than we were to. True: it is left as it is, but never to go on without
// its memory.
bool Session::give_up(int pid, Held* held, const Error& why) {
  const auto state = driver_.state(pid);
  const bool failed = held->lost || (state && *state == CudaState::kFailed);
  if (!state || (!failed && *state != CudaState::kRunning && *state >= held->found)) return false;
  if (held->taken_over && !held->release_known && !held->lost) {
    auto found = find_release(pid, held->restore_tid);
    if (!found) return false;
    held->release = std::move(*found);
    held->release_known = true;
  }
  if (held->lost || (held->release && held->release->is_away())) {
    if (!failed) return false;
    std::string trouble =
        "NVIDIA's driver has lost it (state failed) while its GPU memory was away: it cannot go "
        "on, "
        "and its threads stay parked; end it (kill -KILL " +
        std::to_string(pid) + "), and restore it from its last complete dump";
    if (held->lost) trouble = held->lost->message();
    log(LogLevel::kError, "daemon", "%s: %s", process(pid).c_str(), trouble.c_str());
    held->lock.in_trouble(trouble);
    held->lock.keep();
    return true;
  }
  if (held->release && !held->release->open()) return false;
  log(LogLevel::kError, "daemon", "%s is left as it is, %s: %s", process(pid).c_str(),
      to_string(*state), why.message().c_str());
  return true;
}

void Session::recover() {
  room_waited_ = room_patience_;  // from now on each has its turn
  // Of a restore that will not go on.
  restore_room_.clear();
  saved_.clear();
  for (auto& [pid, held] : held_) {
    if (!held.copy_completed) held.copy.reset();
  }
  for (const auto& [pid, held] : held_) {
    const bool ended = has_ended(pid, held.restore_tid, held.start_time);
    ended_with_managed_ |= ended && !held.managed.empty();
  }
  const bool needed = needs_images();
  if (!needed) remove_unfinished_images();
  // A pre-dump has locked nothing.
  if (stage_ == DumpStage::kPreDump) held_.clear();
  auto pause = kRecoverPoll;
  while (!held_.empty()) {
    bool failing = false;
    for (auto it = held_.begin(); it != held_.end();) {
      it = recover_one(it->first, &it->second) ? held_.erase(it) : std::next(it);
    }
    for (const auto& member : held_) failing |= member.second.failure_reported;
    if (held_.empty()) break;
    std::this_thread::sleep_for(pause);
    if (failing) pause = std::min(pause * 2, kRecoverPollMax);
  }
  if (needed) remove_unfinished_images();
  remove_left_images();
}

}  // namespace phos
