// SPDX-License-Identifier: GPL-2.0-only
// Session: the released path. GPU memory that phos has saved is taken away before the driver's
// checkpoint, which then has little to move, and brought back afterwards (memory_release.h).
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <future>
#include <set>
#include <thread>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/outside_users.h"
#include "gpu-tracker/daemon/session.h"
#include "gpu-tracker/daemon/session_log.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// How often threads are let finish the call they are in, until none is. Each time they have twice
// as long: one that waits for a processor may need it.
constexpr int kQuietAttempts = 5;
constexpr milliseconds kBetweenAttempts{5};
// The same with the gate open in between, of a process that has no other path.
constexpr int kTurns = 6;
constexpr milliseconds kBetweenTurns{20};
// For several processes, which may wait for each other's next step: one parked in front of it and
// one behind it never meet.
constexpr milliseconds kTogether{1000};
// For a phosd that was killed to be gone.
constexpr milliseconds kEndOfPhosd{10000};
// Nothing is submitted while all threads are parked.
constexpr unsigned kRelockMs = 10000;

bool has_released(const ProcessImage& image) {
  return std::any_of(image.allocations.begin(), image.allocations.end(),
                     [](const auto& a) { return a.path == MemoryPath::kReleased; });
}

bool is_incomplete(const std::vector<AgentRelease>& results) {
  return std::any_of(results.begin(), results.end(), [](const AgentRelease& r) {
    return r.status == ReleaseStatus::kLost || r.status == ReleaseStatus::kNotReached;
  });
}

// What the process has at these addresses, of which the driver does not tell: for the log.
std::string mappings_at(int pid, const AgentAllocation& a) {
  auto maps = read_proc_maps(pid);
  if (!maps) return "unknown: " + maps.error().message();
  std::string text;
  for (const ProcMapping& m : *maps) {
    if (m.start >= a.address + a.size || m.end <= a.address) continue;
    char range[80];
    snprintf(range, sizeof range, "%s%llx-%llx %s ", text.empty() ? "" : ", ",
             static_cast<unsigned long long>(m.start), static_cast<unsigned long long>(m.end),
             m.perms);
    text += range + m.path;
  }
  return text.empty() ? "nothing" : text;
}

double ms(std::chrono::microseconds t) {
  return static_cast<double>(t.count()) / 1000;
}

}  // namespace

void Session::give_up_release(int pid, Held* held, const std::string& why) {
  log(LogLevel::kWarn, "daemon", "%s: its GPU memory goes through the driver: %s",
      process(pid).c_str(), why.c_str());
  held->not_released = why;
  held->kept.clear();
  if (!held->release) return;
  if (auto r = held->release->open(); !r && r.error().code() != ESRCH) {
    log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
  }
  held->release.reset();
}

void Session::close_gates(const std::vector<int>& pids) {
  std::vector<int> releasable;
  for (int pid : pids) {
    const Held& held = held_.at(pid);
    if (held.copy && (!held.copy->releasable().empty() || !held.copy->managed().empty())) {
      releasable.push_back(pid);
    }
  }
  if (releasable.empty()) return;
  if (auto r = check_outside_users(); !r) {
    for (int pid : releasable) give_up_release(pid, &held_.at(pid), r.error().message());
    return;
  }
  const auto start = steady_clock::now();
  std::map<int, std::future<Result<std::unique_ptr<MemoryRelease>>>> under_way;
  for (int pid : releasable) {
    const Held& held = held_.at(pid);
    under_way[pid] = std::async(std::launch::async, [this, pid, agent = held.copy->agent(),
                                                     session_log = SessionLog::current()] {
      SessionLog::Scope scope(session_log);
      return MemoryRelease::close(pid, agent, pins_);
    });
  }
  for (auto& [pid, closing] : under_way) {
    Held& held = held_.at(pid);
    auto release = closing.get();
    if (release) {
      held.release = std::move(*release);
      held.stopped = held.release->closed_at();
    } else if (!has_ended(pid, held.restore_tid, held.start_time)) {
      give_up_release(pid, &held, release.error().message());
    }
  }
  if (has_gates()) {
    log(LogLevel::kDebug, "daemon", "gates closed in %.1f ms", ms(since(start)));
  }
}

// Whoever has registered memory with a network card, say, would go on using it while it is away, or
// lose it: the driver's path leaves it where it is until all is frozen. Descriptors are inherited,
// so that all of the tree counts.
Result<void> Session::check_outside_users() const {
  std::set<int> all;
  for (int pid : inspected_) {
    const std::vector<int> tree = with_descendants(pid);
    all.insert(tree.begin(), tree.end());
  }
  auto user = find_outside_user({all.begin(), all.end()});
  if (!user) return user.error().wrap("it cannot be told who uses it");
  if (*user) return Error(Domain::kUsage, EBUSY, **user);
  return {};
}

bool Session::has_gates() const {
  return std::any_of(held_.begin(), held_.end(),
                     [](const auto& h) { return !h.second.locked && h.second.release; });
}

void Session::open_gates(const std::vector<int>& pids, const std::string& why) {
  for (int pid : pids) {
    auto it = held_.find(pid);
    if (it != held_.end() && it->second.release) give_up_release(pid, &it->second, why);
  }
}

// Which of these have a thread in libcuda or could have one. Others than EAGAIN give up the gate.
std::map<int, Error> Session::not_quiet(const std::vector<int>& pids) {
  std::map<int, Error> busy;
  for (int pid : pids) {
    auto it = held_.find(pid);
    if (it == held_.end() || !it->second.release) continue;
    auto quiet = it->second.release->check_quiet();
    if (quiet) continue;
    if (quiet.error().code() == EAGAIN) {
      busy.emplace(pid, quiet.error());
    } else {
      give_up_release(pid, &it->second, quiet.error().message());
    }
  }
  return busy;
}

Result<bool> Session::lock_parked(const std::vector<int>& pids, steady_clock::time_point deadline,
                                  unsigned timeout_ms) {
  if (pids.size() == 1) {
    if (auto r = lock_all(deadline, timeout_ms); !r) return r.error();
    return true;
  }
  const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
  const milliseconds limit = std::clamp(left, milliseconds(1), kTogether);
  const std::vector<int> now = to_lock();
  if (now.empty()) return true;
  return try_lock(now, static_cast<unsigned>(limit.count()));
}

// A thread that waits for one which is parked stays where it is, however often it is looked at.
Result<bool> Session::lock_behind_gates(const std::vector<int>& pids,
                                        steady_clock::time_point deadline, unsigned timeout_ms) {
  for (int turn = 1;; turn++) {
    auto locked = lock_behind_closed_gates(pids, deadline, timeout_ms);
    if (!locked || !*locked || turn == kTurns || pids.size() != 1) return locked;
    auto it = held_.find(pids.front());
    if (it == held_.end() || it->second.release || !it->second.copy ||
        it->second.copy->managed().empty() || steady_clock::now() + kTogether > deadline) {
      return locked;
    }
    if (auto r = unlock_all(pids); !r) return r.error();
    it->second.not_released.clear();
    std::this_thread::sleep_for(kBetweenTurns * turn);
  }
}

// The first lock may find threads in libcuda, waiting for it there. Unlocked they finish their
// call, and park at the next one; after the second lock none is in libcuda, which check_quiet()
// proves.
Result<bool> Session::lock_behind_closed_gates(const std::vector<int>& pids,
                                               steady_clock::time_point deadline,
                                               unsigned timeout_ms) {
  if (!release_wanted_) return false;
  close_gates(pids);
  if (!has_gates()) return false;
  note_stopped(to_lock());
  for (int attempt = 1;; attempt++) {
    for (bool again : {true, false}) {
      auto locked = lock_parked(pids, deadline, timeout_ms);
      if (!locked) {
        open_gates(pids, "it could not be locked");
        return locked.error();
      }
      if (!*locked) {
        open_gates(pids,
                   "processes that work together did not finish it with their threads parked");
        return false;
      }
      if (!again) break;
      if (auto r = unlock_all(pids); !r) return r.error();
    }
    const std::map<int, Error> busy = not_quiet(pids);
    if (busy.empty()) break;
    if (attempt == kQuietAttempts || steady_clock::now() + kTogether > deadline) {
      for (const auto& [pid, error] : busy) {
        give_up_release(pid, &held_.at(pid), error.message());
      }
      break;
    }
    if (auto r = unlock_all(pids); !r) return r.error();
    std::this_thread::sleep_for(kBetweenAttempts * (1 << (attempt - 1)));
  }
  for (int pid : pids) {
    auto it = held_.find(pid);
    if (it != held_.end() && it->second.release) it->second.gate_time = since(*it->second.stopped);
  }
  return true;
}

// Its threads are parked, so that what it has allocated since its last round can still be mapped:
// the driver hands out nothing of a locked process. An error: it is not locked.
Result<void> Session::catch_up(int pid, Held* held) {
  if (auto r = driver_.unlock(pid); !r) return r;
  held->locked = false;
  auto caught_up = held->copy->catch_up();
  if (auto r = lock_or_leave(pid, kRelockMs); !r) {
    return r.error().wrap("locking " + process(pid) + " again");
  }
  held->locked = true;
  if (!caught_up) {
    log(LogLevel::kWarn, "daemon", "%s: what it has allocated lately is left to the driver: %s",
        process(pid).c_str(), caught_up.error().message().c_str());
  }
  return {};
}

void Session::leave_to_driver(Held* held) {
  held->loader.reset();
  held->chain.reset();
  if (!held->image) return;
  for (AllocationInfo& a : held->image->allocations) a.path = MemoryPath::kDriver;
}

// The process is locked, its gate closed, what is saved is what its memory holds. An error: it is
// not as it should be for the driver's path either; the dump must fail.
Result<void> Session::release_memory(int pid, Held* held) {
  if (!held->release || held->image) return {};  // not to be released, or done
  const auto start = steady_clock::now();
  auto prepared = prepare_release(pid, held);
  held->write_time = since(start);
  if (!prepared) {
    leave_to_driver(held);
    give_up_release(pid, held, prepared.error().message());
    return check_managed(pid, *held);
  }
  if (held->to_release.empty()) {  // managed memory, which waits until all stands still
    held->release->resume_held();
    return {};
  }
  held->loader->keep(std::exchange(held->kept, {}));
  held->room = claim_room(*held->image);  // before anybody else can have what it gives up
  const auto begin = steady_clock::now();
  if (auto r = driver_.unlock(pid); !r) return r;
  held->locked = false;
  auto results = held->release->release(held->to_release, dump_id_);
  std::optional<Error> failed;
  if (!results) {
    failed = results.error();
  } else if (is_incomplete(*results)) {
    failed = Error(Domain::kUsage, EIO, "some of its addresses would be lost");
  } else if (!held->release->is_away()) {
    failed = Error(Domain::kUsage, ENOENT, "none of it can be released");
  }
  if (failed) {
    if (results) log_lost(pid, *held, *results);
    held->loader->take_kept();  // what is lost may need its room
    if (auto r = bring_memory_back(pid, held); !r) return r;
    // The driver is about to checkpoint it.
    if (auto r = held->loader ? held->loader->settle() : Result<void>(); !r) return r;
  }
  const bool as_noted = results && note_released(pid, held, *results);
  auto locked = lock_or_leave(pid, kRelockMs);
  if (!locked) return locked.error().wrap("locking " + process(pid) + " again");
  held->locked = true;
  // Whoever has passed may have found nothing where its memory was.
  auto closed = held->release->check_closed();
  held->release->resume_held();
  if (!closed) return refuse(pid, closed.error().message());
  if (failed) {
    leave_to_driver(held);
    give_up_release(pid, held, failed->message());
    return check_managed(pid, *held);
  }
  make_room(held->room);
  held->release_time = since(begin);
  log(LogLevel::kInfo, "daemon",
      "%s: released in %.1f ms (drained behind the gate in %.1f ms, images written in %.1f ms)",
      process(pid).c_str(), ms(held->release_time), ms(held->gate_time), ms(held->write_time));
  return as_noted ? Result<void>()
                  : write_process_image(image_dir_.get(), *held->image, unsynced_.get());
}

void Session::log_lost(int pid, const Held& held, const std::vector<AgentRelease>& results) {
  for (size_t i = 0; i < results.size(); i++) {
    if (results[i].status != ReleaseStatus::kLost) continue;
    const AgentAllocation& a = held.to_release[i];
    log(LogLevel::kWarn, "daemon",
        "%s: the addresses of %s at %#llx could not be reserved when it was freed (CUDA %d); there "
        "is: %s",
        process(pid).c_str(), megabytes(a.size).c_str(), static_cast<unsigned long long>(a.address),
        results[i].driver_result, mappings_at(pid, a).c_str());
    held.release->log_lost();
  }
}

// All that another phosd needs, should this one die while memory is away.
Result<void> Session::prepare_release(int pid, Held* held) {
  const auto start = steady_clock::now();
  held->to_release = held->copy->releasable();
  auto image = describe(pid, *held);
  if (!image) return image.error();
  if (auto r = held->copy->finish(&*image); !r) {
    held->copy.reset();  // half of it is no help to the driver's path
    return r;
  }
  held->image = std::move(*image);
  if (!held->noted) return Error(Domain::kUsage, EIO, "no other phosd would know of it");
  if (held->to_release.empty() && held->managed.empty()) {
    return Error(Domain::kUsage, ENOENT, "there is none to release");
  }
  std::set<uint64_t> addresses;
  for (const AgentAllocation& a : held->to_release) addresses.insert(a.address);
  for (AllocationInfo& a : held->image->allocations) {
    if (addresses.contains(a.address)) a.path = MemoryPath::kReleased;
  }
  const auto described = since(start);
  if (auto r = write_process_image(image_dir_.get(), *held->image, unsynced_.get()); !r) return r;
  const auto written = since(start);
  if (auto r = open_saved(held, *held->image); !r) return r;
  log(LogLevel::kDebug, "daemon", "%s: image described in %.1f ms, written in %.1f, opened in %.1f",
      process(pid).c_str(), ms(described), ms(written - described), ms(since(start) - written));
  if (auto r = held->release->hold(); !r) return r;
  // It has taken a while since: a thread that runs may have come to block the gate's signal, and
  // have passed, or have opened what libcuda knows nothing of.
  if (auto r = held->release->check_quiet(); !r) return r;
  return check_outside_users();
}

// Opened before anything is released, and kept: whatever becomes of the directory, the pages are
// there as long as this phosd is.
Result<void> Session::open_saved(Held* held, const ProcessImage& image) const {
  return held->loader ? Result<void>() : open_saved_anew(held, image);
}

// The process stands still: what the image builds on was read before.
Result<PageChain> Session::open_chain(const Held& held, const ProcessImage& image,
                                      PageIo io) const {
  const PreviousPages* const previous =
      held.copy && image.parent_dump_id != DumpId{} ? held.copy->previous() : nullptr;
  return previous ? PageChain::open_on(previous->chain(), image_dir_.get(), image, io)
                  : PageChain::open(image_dir_.get(), image, io);
}

Result<void> Session::open_saved_anew(Held* held, const ProcessImage& image) const {
  auto chain = open_chain(*held, image, unsynced_ ? PageIo::kCached : PageIo::kDirect);
  if (!chain) return chain.error();
  auto opened = std::make_unique<PageChain>(std::move(*chain));
  auto loader = MemoryLoader::create(*opened, *engines_);
  if (!loader) return loader.error();
  if (held->loader) (*loader)->keep(held->loader->take_kept());
  held->loader = std::move(*loader);
  held->chain = std::move(opened);
  return {};
}

// Whether the image, as it is on disk, says so already.
bool Session::note_released(int pid, Held* held, const std::vector<AgentRelease>& results) {
  std::set<uint64_t> released;
  uint64_t bytes = 0;
  for (size_t i = 0; i < results.size(); i++) {
    const AgentAllocation& a = held->to_release[i];
    // Memory that is there again has lost its contents: they come from the image, too.
    if (results[i].status == ReleaseStatus::kReleased ||
        results[i].status == ReleaseStatus::kReallocated) {
      released.insert(a.address);
      bytes += a.size;
      continue;
    }
    log(LogLevel::kInfo, "daemon", "%s: %s at %#llx is left to the driver (status %d, CUDA %d)",
        process(pid).c_str(), megabytes(a.size).c_str(), static_cast<unsigned long long>(a.address),
        static_cast<int>(results[i].status), results[i].driver_result);
  }
  for (AllocationInfo& a : held->image->allocations) {
    a.path = released.contains(a.address) ? MemoryPath::kReleased : MemoryPath::kDriver;
  }
  log(LogLevel::kInfo, "daemon", "%s: %zu allocations, %s of GPU memory, released",
      process(pid).c_str(), released.size(), megabytes(bytes).c_str());
  return released.size() == results.size();
}

// A phosd that was killed holds the agent until it is quite dead: the kernel takes its probes away
// one by one, which can last seconds, and what it closes last is not known.
Result<std::unique_ptr<MemoryRelease>> Session::find_release(int pid, int restore_tid) const {
  const auto deadline = steady_clock::now() + kEndOfPhosd;
  for (;;) {
    auto found = MemoryRelease::find(pid, restore_tid, pins_);
    if (found || found.error().code() != EBUSY || steady_clock::now() > deadline) return found;
    std::this_thread::sleep_for(kBetweenAttempts);
  }
}

// The driver has restored the process, and unlocked it. Its threads stay parked until it runs.
Result<void> Session::bring_memory_back(int pid, Held* held) {
  if (!held->release && held->taken_over) {
    auto found = find_release(pid, held->restore_tid);
    if (!found) return found.error();
    held->release = std::move(*found);
    held->release_known = true;
  }
  if (!held->release || !held->release->is_away()) {
    forget_copy(*held);
    return {};
  }
  if (!held->loader) {
    auto status = read_proc_status(pid);
    if (!status) return status.error();
    if (auto r = open_noted_dir(); !r) {
      return r.error().wrap("the GPU memory of " + process(pid) + " is away");
    }
    auto image = read_process_image(image_dir_.get(), status->vpid);
    if (!image) return image.error().wrap("the GPU memory of " + process(pid) + " is away");
    if (auto r = open_saved(held, *image); !r) return r;
  }
  if (auto r = load_memory(pid, held, false); !r) return r;
  // Nothing can be done about it any more. One that was taken over has probes if they were pinned,
  // but cannot tell what had passed before the memory was away.
  auto passed = held->taken_over ? Result<void>() : held->release->check_closed();
  if (!passed) log(LogLevel::kError, "daemon", "%s", passed.error().message().c_str());
  return {};
}

Result<void> Session::load_memory(int pid, Held* held, bool all_of_image) {
  std::optional<BroughtBack> back;
  auto done = with_room(
      pid, &held->room,
      [&]() -> Result<void> {
        auto r = held->release->bring_back(*held->chain, *held->loader, all_of_image,
                                           [&] { held->room = {}; });
        if (!r) return r.error();
        back = *r;
        return {};
      },
      [](const Error& e) { return e.domain() == Domain::kCuda || e.domain() == Domain::kUsage; });
  if (!done) return done;
  forget_copy(*held);
  log(LogLevel::kInfo, "daemon",
      "%s: %llu allocations mapped back in %.1f ms (%llu of them adopted), %s loaded and verified "
      "in %.1f ms (%s read ahead, %s of it into GPU memory, until %.1f ms; %s kept there; memory "
      "mapped in %.1f ms, transfers %.1f ms, hashes %.1f ms)",
      process(pid).c_str(), static_cast<unsigned long long>(back->allocations), ms(back->map_time),
      static_cast<unsigned long long>(back->adopted), megabytes(back->load.bytes).c_str(),
      ms(back->load_time), megabytes(back->load.warm_bytes - back->load.kept_bytes).c_str(),
      megabytes(back->load.staged_bytes - back->load.kept_bytes).c_str(),
      ms(std::chrono::microseconds(back->load.take_us)), megabytes(back->load.kept_bytes).c_str(),
      ms(std::chrono::microseconds(back->load.import_us)),
      ms(std::chrono::microseconds(back->load.transfer_us)),
      ms(std::chrono::microseconds(back->load.hash_us)));
  if (back->load.direct_bytes) {
    log(LogLevel::kInfo, "daemon", "%s: %s of it went from the disk into GPU memory",
        process(pid).c_str(), megabytes(back->load.direct_bytes).c_str());
  }
  if (back->managed_bytes) {
    log(LogLevel::kInfo, "daemon", "%s: %s of managed memory loaded and verified",
        process(pid).c_str(), megabytes(back->managed_bytes).c_str());
  }
  return {};
}

// What a restore will need, read ahead while CRIU restores the rest.
Result<void> Session::open_pages(const ProcessImage& image) {
  if (!has_released(image)) return {};
  if (!engines_) return Error(Domain::kUsage, ENOTSUP, "no GPU to load memory into");
  auto chain = PageChain::open(image_dir_.get(), image, PageIo::kDirect);
  if (!chain) return chain.error();
  Saved saved;
  saved.chain = std::make_unique<PageChain>(std::move(*chain));
  auto loader = MemoryLoader::create(*saved.chain, *engines_);
  if (!loader) return loader.error();
  saved.loader = std::move(*loader);
  saved_.insert_or_assign(image.pid, std::move(saved));
  return {};
}

// Of a process restored from its image: the driver has restored what it had.
Result<void> Session::restore_memory(int pid, const ProcessImage& image) {
  if (!has_released(image)) return {};
  auto tid = driver_.restore_thread_id(pid);
  if (!tid) return tid.error();
  auto start_time = read_start_time(pid);
  if (!start_time) return start_time.error();
  auto lock = take_lock(pid, *start_time);
  if (!lock) return lock.error();
  auto release = MemoryRelease::find(pid, *tid, pins_);
  if (!release) return release.error();
  if (!*release) {
    return Error(Domain::kFormat, ENOENT,
                 process(pid) +
                     ": phos's agent, which has the record of its released GPU memory, "
                     "is not in it; restore with the phos that dumped it (" +
                     image.phos_version + ")");
  }
  (*release)->agent()->note_copies(DriverCopies::kBack);
  if (auto r = lock->note(image.state, image_dir_.get()); !r) return r;
  // Held from here on: whatever fails, recover() sees to it that the process does not stay.
  auto [it, added] = held_.emplace(pid, Held(*tid, image.state, *start_time, std::move(*lock)));
  if (!added) return process_error(pid, EBUSY, "it is being restored already");
  Held& held = it->second;
  held.restored = true;
  held.room = std::move(restore_room_[image.pid]);
  held.release = std::move(*release);
  Saved& saved = saved_.at(image.pid);
  held.chain = std::move(saved.chain);
  held.loader = std::move(saved.loader);
  if (auto r = load_memory(pid, &held, true); !r) return r;
  if (auto r = held.release->let_go(); !r) return r;
  held.leaving = true;
  return {};
}

// The plugin does that, unless it has died with criu. The images are as they were.
void Session::kill_unrestored(int pid, Held* held) {
  const UniqueFd process_fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!process_fd || has_ended(pid, held->restore_tid, held->start_time)) return;
  if (!held->failure_reported) {
    log(LogLevel::kError, "daemon",
        "%s is killed: its GPU memory could not be restored, and criu has died; the images are "
        "still good for another restore",
        process(pid).c_str());
    held->failure_reported = true;
  }
  syscall(SYS_pidfd_send_signal, process_fd.get(), SIGKILL, nullptr, 0);
}

}  // namespace phos
