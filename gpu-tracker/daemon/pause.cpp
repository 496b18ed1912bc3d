// SPDX-License-Identifier: GPL-2.0-only
// Session::inspect and lock: refuse what could not be restored, then lock the rest, all together.
#include <algorithm>
#include <cerrno>
#include <future>
#include <map>
#include <random>
#include <system_error>
#include <thread>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/host_memory.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// First try at locking several processes together; each further one takes twice as long.
constexpr milliseconds kFirstAttempt{500};
// For another session that has the process; half of what CRIU gives a plugin's hook.
constexpr milliseconds kEndOfSession{5000};
constexpr milliseconds kLockPoll{20};

// With these settings NCCL talks through plain shared memory, which restores (seen on driver 580).
#define PHOS_NCCL_REMEDY "NCCL_P2P_DISABLE=1 NCCL_CUMEM_HOST_ENABLE=0"

// Memory that another process exported: the driver (580) checkpoints such a process and then
// cannot restore it (errors 1 and 801).
Error refuse_imports(int pid, uint64_t bytes) {
  return refuse(pid,
                "it has imported " + megabytes(bytes) +
                    " of GPU memory from another process (CUDA IPC or NCCL peer-to-peer), which "
                    "NVIDIA's driver cannot restore. NCCL: start the job with " PHOS_NCCL_REMEDY
                    "; other programs: close the imported memory first");
}

Error refuse_virtual_host_memory(int pid, uint64_t bytes) {
  return refuse(pid, "it has " + megabytes(bytes) +
                         " of host memory made by cuMemCreate (as NCCL's shared-memory transport "
                         "makes), which NVIDIA's driver cannot restore. NCCL: start the job "
                         "with " PHOS_NCCL_REMEDY);
}

// Images are named, as CRIU's are, by the pid that a process has in its own pid namespace.
Result<void> check_names(const std::vector<int>& pids) {
  std::map<int, int> named;
  for (int pid : pids) {
    auto status = read_proc_status(pid);
    if (!status) continue;  // it has ended
    const auto [other, is_new] = named.emplace(status->vpid, pid);
    if (is_new) continue;
    return refuse(pid, "it and " + process(other->second) + " are in different pid namespaces, " +
                           "where both are pid " + std::to_string(status->vpid) +
                           ", and would have one image between them; dump each by itself");
  }
  return {};
}

// Between two tries, so that processes that work in step are met at different points of it.
void let_run_for_a_moment() {
  thread_local std::minstd_rand random(std::random_device{}());
  std::this_thread::sleep_for(milliseconds(1 + random() % 20));
}

}  // namespace

// A session that has restored or dumped it may be about to end: it unpins all host buffers.
Result<ProcessLock> Session::wait_for_lock(int pid, uint64_t start_time) const {
  const auto deadline = steady_clock::now() + kEndOfSession;
  for (;;) {
    auto lock = take_lock(pid, start_time);
    if (lock || lock.error().code() != EAGAIN || steady_clock::now() > deadline) return lock;
    std::this_thread::sleep_for(kLockPoll);
  }
}

Result<std::optional<Session::Held>> Session::inspect_one(int pid) {
  auto tid = driver_.restore_thread_id(pid);
  if (!tid) {
    // 3: no CUDA in it. 304: libcuda could not look; a process that is gone is CRIU's to report.
    if (is_cuda_error(tid.error(), kCudaErrorNotInitialized)) return std::optional<Held>();
    if (!read_proc_status(pid)) return std::optional<Held>();
    return refuse(pid, tid.error().message());
  }
  auto start_time = read_start_time(pid);
  if (!start_time) return std::optional<Held>();
  auto held = inspect_living(pid, *tid, *start_time);
  // Whatever went wrong with a process that is ending is not worth an error: CRIU copes with it.
  if (held) return held;
  if (has_ended(pid, *tid, *start_time, held.error())) return std::optional<Held>();
  if (held.error().domain() == Domain::kCuda) return refuse(pid, held.error().message());
  return held;
}

Result<std::optional<Session::Held>> Session::inspect_living(int pid, int restore_tid,
                                                             uint64_t start_time) {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  if (status->state == 'T') {
    return refuse(pid,
                  "it is stopped (SIGSTOP), and NVIDIA's driver needs it running; send it SIGCONT "
                  "first");
  }
  if (status->tracer_pid != 0) {
    return refuse(pid, process(status->tracer_pid) +
                           " is tracing it (a debugger or another dump); end that first");
  }
  if (is_cgroup_frozen(pid)) {
    return refuse(
        pid,
        "its cgroup is frozen, and NVIDIA's driver needs it running; use CRIU 4.2 or newer, "
        "which thaws it for phos, or resume the container first");
  }
  auto lock = wait_for_lock(pid, start_time);
  if (!lock) return lock.error();
  auto state = driver_.state(pid);
  if (!state) return state.error();
  if (*state == CudaState::kFailed) {
    return refuse(
        pid,
        "an earlier checkpoint or restore of it failed in NVIDIA's driver (state failed), "
        "which does not come back; end it, and restore it from its last complete dump");
  }
  std::optional<Held> held(std::in_place, restore_tid, *state, start_time, std::move(*lock));
  if (*state != CudaState::kCheckpointed) {
    if (auto r = check_restorable(pid, &*held); !r) return r.error();
  }
  return Result<std::optional<Held>>(std::move(held));
}

// What the driver would checkpoint but could not restore.
Result<void> Session::check_restorable(int pid, Held* held) const {
  if (auto memory = driver_.process_memory(pid)) {
    held->memory = *memory;
    if (memory->imported) return refuse_imports(pid, memory->imported);
  } else {
    log(LogLevel::kWarn, "daemon", "%s: cannot tell whether it uses memory of another process (%s)",
        process(pid).c_str(), memory.error().message().c_str());
  }
  // In a locked process the question itself would block.
  if (held->found != CudaState::kRunning) return {};
  auto bytes = find_virtual_host_memory(pid, held->restore_tid);
  if (bytes && *bytes) return refuse_virtual_host_memory(pid, *bytes);
  if (bytes) return {};
  const int code = bytes.error().code();
  if (bytes.error().domain() == Domain::kErrno && (code == ETIMEDOUT || code == EBUSY)) {
    const std::string detail = code == EBUSY ? "" : " (" + bytes.error().message() + ")";
    return refuse(pid, "its CUDA restore thread is busy" + detail +
                           "; another checkpoint tool may be at work, try again later");
  }
  log(LogLevel::kWarn, "daemon",
      "%s: cannot tell whether it has host memory made by cuMemCreate (%s)", process(pid).c_str(),
      bytes.error().message().c_str());
  return {};
}

Result<void> Session::lock_or_leave(int pid, unsigned timeout_ms) {
  auto r = driver_.lock(pid, timeout_ms);
  // An illegal state is not ours to undo: another tool has locked it meanwhile.
  if (r || is_cuda_error(r.error(), kCudaErrorIllegalState)) return r;
  // The driver undoes a lock that timed out; make sure, so that no failure leaves it locked.
  if (auto now = driver_.state(pid); now && *now == CudaState::kLocked) {
    (void)driver_.unlock(pid).ok();
  }
  return r;
}

Result<bool> Session::try_lock(const std::vector<int>& pids, unsigned timeout_ms) {
  const auto start = steady_clock::now();
  std::vector<Result<void>> results(pids.size());
  try {
    std::vector<std::future<void>> others;  // their destructors wait
    for (size_t i = 1; i < pids.size(); i++) {
      others.push_back(std::async(std::launch::async, [this, &pids, &results, i, timeout_ms] {
        results[i] = lock_or_leave(pids[i], timeout_ms);
      }));
    }
    results[0] = lock_or_leave(pids[0], timeout_ms);
  } catch (const std::system_error& e) {  // no more threads to be had
    for (size_t i = 0; i < pids.size(); i++) {
      auto now = driver_.state(pids[i]);
      if (now && *now == CudaState::kLocked) (void)driver_.unlock(pids[i]).ok();
    }
    return Error(Domain::kErrno, e.code().value(),
                 std::string("cannot start a thread to lock a process: ") + e.what());
  }

  std::optional<Error> failure;
  bool in_time = true;
  for (size_t i = 0; i < pids.size(); i++) {
    auto it = held_.find(pids[i]);
    it->second.locked = results[i].ok();
    it->second.lock_time = since(start);
    if (results[i].ok()) continue;
    const Held& held = it->second;
    if (has_ended(pids[i], held.restore_tid, held.start_time, results[i].error())) {
      held_.erase(it);
    } else if (is_cuda_error(results[i].error(), kCudaErrorNotReady)) {
      in_time = false;
    } else {
      failure = refuse(pids[i], results[i].error().message());
    }
  }
  if (in_time && !failure) return true;
  auto unlocked = unlock_all(pids);
  if (!unlocked) return unlocked.error();
  if (failure) return *failure;
  return false;
}

Result<void> Session::unlock_all(const std::vector<int>& pids) {
  Result<void> result;
  for (int pid : pids) {
    auto it = held_.find(pid);
    if (it == held_.end() || !it->second.locked) continue;
    auto r = driver_.unlock(pid);
    it->second.locked = !r;
    if (r) continue;
    if (has_ended(pid, it->second.restore_tid, it->second.start_time, r.error())) {
      held_.erase(it);
    } else {
      result = refuse(pid, r.error().message());
    }
  }
  return result;
}

std::vector<int> Session::to_lock() const {
  std::vector<int> pids;
  for (const auto& [pid, held] : held_) {
    if (held.found == CudaState::kRunning && !held.locked) pids.push_back(pid);
  }
  return pids;
}

// Processes that work together (NCCL ranks) wait for each other's GPU work: locked one after the
// other, the first blocks the second for ever. Locked at once they all drain, unless some have
// begun a step that others have not; then all are let go and met again a little later.
void Session::note_stopped(const std::vector<int>& pids) {
  for (int pid : pids) {
    Held& held = held_.at(pid);
    if (!held.stopped) held.stopped = steady_clock::now();
  }
}

Result<void> Session::lock_all(steady_clock::time_point deadline, unsigned timeout_ms) {
  note_stopped(to_lock());
  auto attempt = to_lock().size() == 1 ? milliseconds(timeout_ms) : kFirstAttempt;
  for (;;) {
    const std::vector<int> pids = to_lock();
    if (pids.empty()) return {};
    const milliseconds left =
        std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
    if (left <= milliseconds(0)) {
      return refuse(pids[0], "its GPU work did not finish within " + std::to_string(timeout_ms) +
                                 " ms; raise criu's --timeout, or dump between two pieces of work");
    }
    // Rather one long last attempt than two that are both too short for a long kernel.
    const milliseconds limit = left < attempt * 3 ? left : attempt;
    auto locked = try_lock(pids, static_cast<unsigned>(limit.count()));
    if (!locked) return locked.error();
    if (*locked) return {};
    attempt = std::min(attempt * 2, milliseconds(timeout_ms));
    let_run_for_a_moment();
  }
}

// For another phosd, should this one die. A pre-dump's images may be complete before the agent has
// left: nobody is to remove them as those of a failed dump.
Result<void> Session::note(Held* held) {
  auto noted =
      held->lock.note(held->found, image_dir_.get(),
                      stage_ == DumpStage::kDump ? format_dump_id(dump_id_) : std::string());
  held->noted = noted.ok();
  return noted;
}

Result<void> Session::lock(unsigned timeout_ms) {
  const std::vector<int> wanted = to_lock();
  const auto deadline = steady_clock::now() + milliseconds(timeout_ms);
  for (int pid : wanted) {
    Held& held = held_.at(pid);
    auto noted = note(&held);
    if (!noted) log(LogLevel::kWarn, "daemon", "%s", noted.error().message().c_str());
  }
  auto behind_gates = lock_behind_gates(wanted, deadline, timeout_ms);
  if (!behind_gates) return behind_gates.error();
  if (!*behind_gates) {
    if (auto r = lock_all(deadline, timeout_ms); !r) return r;
  }
  for (int pid : wanted) {
    auto it = held_.find(pid);
    if (it == held_.end()) continue;
    Held& held = it->second;
    log(LogLevel::kInfo, "daemon", "%s: %s of GPU memory, locked in %.1f ms", process(pid).c_str(),
        megabytes(held.memory.own).c_str(), static_cast<double>(held.lock_time.count()) / 1000);
    // Once more, now that nothing can change: what was imported while we looked.
    auto memory = driver_.process_memory(pid);
    if (memory && memory->imported) return refuse_imports(pid, memory->imported);
    if (memory) held.memory = *memory;
    if (held.copy) held.managed = held.copy->managed();
    if (auto r = check_managed(pid, held); !r) return r;
  }
  return {};
}

Result<std::vector<FoundProcess>> Session::inspect(int pid) {
  const std::vector<int> tree = with_descendants(pid);
  inspected_.push_back(pid);
  Group group;
  for (int member : tree) {
    if (held_.count(member) || group.count(member)) continue;
    auto held = inspect_one(member);
    if (!held) return held.error();
    if (held->has_value()) group.emplace(member, std::move(**held));
  }
  std::vector<int> pids;
  for (const Group* some : {&held_, &group}) {
    for (const auto& [member, held] : *some) pids.push_back(member);
  }
  if (auto r = check_names(pids); !r) return r.error();
  // A CPU-only dump may go where it likes.
  if (!group.empty() && image_dir_) {
    auto ok = check_image_directory(image_dir_.get());
    if (!ok) return refuse(group.begin()->first, ok.error().message());
  }
  if (!group.empty() && gpus_.empty()) {
    auto gpus = driver_.gpus();
    if (!gpus) return gpus.error();
    gpus_ = std::move(*gpus);
  }
  held_.merge(group);
  std::vector<FoundProcess> found;
  for (int member : tree) {
    auto it = held_.find(member);
    const bool listed = std::any_of(found.begin(), found.end(),
                                    [&](const FoundProcess& f) { return f.pid == member; });
    if (it != held_.end() && !listed)
      found.push_back({member, it->second.restore_tid, it->second.found});
  }
  return found;
}

Result<void> Session::check_leftover(int pid) {
  auto memory = driver_.process_memory(pid);
  if (driver_.restore_thread_id(pid)) {
    return refuse(pid, "it began to use CUDA while it was being dumped; try again");
  }
  if (memory && memory->own) {
    return refuse(pid, "it has " + megabytes(memory->own) +
                           " of GPU memory without CUDA (graphics, video), which cannot be saved");
  }
  return {};
}

}  // namespace phos
