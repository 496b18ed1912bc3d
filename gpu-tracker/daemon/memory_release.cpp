// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/memory_release.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <set>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session_log.h"
#include "gpu-tracker/gate/left_probes.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// A phosd that is killed leaves threads parked for so long, unless another one takes over.
constexpr milliseconds kLease{10000}, kRenewal{2000};
// The driver frees and maps tens of gigabytes in milliseconds, in hundreds of pieces in tens.
constexpr milliseconds kMoveTimeout{60000};
constexpr milliseconds kStuckTimeout{500};
// For threads to be stopped where none holds a lock of the C library's.
constexpr milliseconds kStopPatience{5000};

std::string name_of(const AgentAllocation& a) {
  char text[80];
  snprintf(text, sizeof text, ", allocation at %#llx (%s)",
           static_cast<unsigned long long>(a.address), megabytes(a.size).c_str());
  return format_gpu_uuid(a.device_uuid) + text;
}

Error cannot_come_back(int pid, const AgentAllocation& a, const std::string& why) {
  return Error(Domain::kUsage, EIO,
               process(pid) + ", " + name_of(a) + " cannot be brought back: " + why);
}

const char* reason_of(const ReleasedMemory& m) {
  if (m.state == ReleasedState::kLost) return "its addresses are taken by other memory";
  if (m.memory.kind == AllocationKind::kManaged) {
    return "the driver gives managed memory at other addresses only";
  }
  return "there is not enough GPU memory";
}

}  // namespace

void log_address_events(int pid, const Agent& agent) {
  for (const std::string& e : agent.address_events()) {
    log(LogLevel::kWarn, "daemon", "%s: then %s", process(pid).c_str(), e.c_str());
  }
}

namespace {

bool any_away(const std::vector<ReleasedMemory>& released) {
  return std::any_of(released.begin(), released.end(),
                     [](const ReleasedMemory& m) { return m.state != ReleasedState::kInUse; });
}

}  // namespace

MemoryRelease::MemoryRelease(int pid, std::shared_ptr<Agent> agent)
    : pid_(pid), agent_(std::move(agent)) {
  if (auto start = read_start_time(pid)) start_time_ = *start;
}

Result<std::unique_ptr<MemoryRelease>> MemoryRelease::close(int pid, std::shared_ptr<Agent> agent,
                                                            const GatePins& pins) {
  std::unique_ptr<MemoryRelease> made(new MemoryRelease(pid, std::move(agent)));
  auto released = made->agent_->released();
  if (!released) return released.error();
  if (any_away(*released)) return process_error(pid, EBUSY, "its memory is away already");
  auto pin = pins.place_for(pid);
  if (!pin) return pin.error();
  auto gate = Gate::close(pid, *made->agent_, {kLease, GatedFunctions::kAll, *pin});
  if (!gate) return gate.error();
  made->gate_ = std::move(*gate);
  if (auto r = mark_probed_pages(pid); !r) return r.error();
  made->take_out_ = made->agent_->was_loaded();
  made->lease_ = std::jthread(
      [release = made.get(), session_log = SessionLog::current()](const std::stop_token& stop) {
        SessionLog::Scope scope(session_log);
        release->keep_lease(stop);
      });
  return made;
}

Result<std::unique_ptr<MemoryRelease>> MemoryRelease::find(int pid, int restore_tid,
                                                           const GatePins& pins) {
  auto agent = Agent::find(pid, restore_tid);
  if (!agent) return agent.error();
  if (!*agent) {
    if (auto r = Agent::remove_leftovers(pid, restore_tid); !r) {
      log(LogLevel::kDebug, "daemon", "%s", r.error().message().c_str());
    }
    return std::unique_ptr<MemoryRelease>();
  }
  std::unique_ptr<MemoryRelease> found(
      new MemoryRelease(pid, std::make_shared<Agent>(std::move(**agent))));
  auto released = found->agent_->released();
  if (!released) return released.error();
  found->away_ = any_away(*released);
  found->read_only_ = true;  // or may be
  // One that is open again, but not yet shown to have been left by all threads, is taken over too.
  if (!found->away_ && !found->agent_->gate().signal && !found->agent_->gate_was_used()) {
    // Whoever brought it is dead. It stays where memory that it stands in for needs it.
    let_agent_leave(pid, &found->agent_, true);
    return std::unique_ptr<MemoryRelease>();
  }
  auto gate = Gate::adopt(pid, *found->agent_, pins.find(pid));
  if (!gate) return gate.error();
  found->gate_ = std::move(*gate);
  return found;
}

MemoryRelease::~MemoryRelease() {
  end_lease();
  if (open_ || !gate_) return;
  if (has_ended(pid_, agent_->restore_tid(), start_time_)) return;
  if (away_) {
    // The gate's destructor would open it. The process is about to be killed, or to be taken over.
    (void)gate_.release();
    new std::shared_ptr<Agent>(agent_);
    return;
  }
  if (auto r = open(); !r) log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
}

void MemoryRelease::keep_lease(const std::stop_token& stop) {
  std::unique_lock<std::mutex> hold(gate_mutex_);
  for (;;) {
    lease_ends_.wait_for(hold, stop, kRenewal, [] { return false; });
    if (stop.stop_requested()) return;
    // If it has expired, hold() says so.
    if (!gate_->renew()) return;
  }
}

void MemoryRelease::end_lease() {
  if (!lease_.joinable()) return;
  lease_.request_stop();
  lease_.join();
}

Result<void> MemoryRelease::check_quiet() {
  std::lock_guard<std::mutex> hold(gate_mutex_);
  if (auto r = gate_->check_quiet(); !r) return r;
  // A thread that is freeing memory which the agent stands in for is parked in the middle of that.
  auto standing_in = agent_->contents_loaded();
  if (standing_in) return {};
  if (standing_in.error().code() != EBUSY) return standing_in.error();
  return process_error(pid_, EAGAIN,
                       "one of its threads is freeing memory that phos stands in for");
}

Result<void> MemoryRelease::hold() {
  end_lease();
  return gate_->hold();
}

Result<std::vector<AgentRelease>> MemoryRelease::release(const std::vector<AgentAllocation>& memory,
                                                         const DumpId& dump) {
  agent_->set_command_timeout(kMoveTimeout);
  agent_->note_released_by(dump);
  const bool before = away_;
  away_ = true;
  auto results = agent_->release(memory);
  if (results) {
    away_ = before || std::any_of(results->begin(), results->end(), [](const AgentRelease& r) {
              return r.status == ReleaseStatus::kReleased ||
                     r.status == ReleaseStatus::kReallocated || r.status == ReleaseStatus::kLost;
            });
    return results;
  }
  // Refused before anything was touched, or not answered.
  auto released = agent_->released();
  if (released) away_ = any_away(*released);
  return results;
}

Result<DumpRound> MemoryRelease::save_managed(ManagedCopy& copy,
                                              const std::vector<AgentAllocation>& memory) {
  if (auto r = agent_->check_no_locks(); !r) return r.error();
  read_only_ = true;
  agent_->set_command_timeout(kMoveTimeout);
  return copy.save(*agent_, memory);
}

void MemoryRelease::log_lost() const {
  log_address_events(pid_, *agent_);
}

Result<void> MemoryRelease::check_closed() {
  auto closed = gate_->check_closed();
  if (closed || closed.error().code() != EAGAIN) return closed;
  return process_error(
      pid_, EBUSY,
      "a thread may have entered the driver while its memory was away, and have got "
      "wrong answers (" +
          closed.error().message() + ")");
}

// What is to be loaded, by the agent's word on what it has mapped and the image's on what was
// saved.
Result<MemoryRelease::Plan> MemoryRelease::plan(const PageChain& chain,
                                                const std::vector<ReleasedMemory>& back,
                                                bool all_of_image) const {
  const std::vector<AllocationInfo>& saved = chain.image().allocations;
  Plan work;
  std::set<uint64_t> loaded;
  for (const ReleasedMemory& m : back) {
    if (m.state == ReleasedState::kInUse) continue;
    if (m.state != ReleasedState::kNative && m.state != ReleasedState::kAdopted) {
      const std::string code =
          m.driver_result ? " (CUDA error " + std::to_string(m.driver_result) + ")" : "";
      const bool managed = m.memory.kind == AllocationKind::kManaged;
      if (managed || m.state == ReleasedState::kLost) log_address_events(pid_, *agent_);
      return cannot_come_back(pid_, m.memory, reason_of(m) + code);
    }
    auto of_image = std::find_if(saved.begin(), saved.end(), [&](const AllocationInfo& a) {
      return a.address == m.memory.address && a.path == MemoryPath::kReleased;
    });
    if (of_image == saved.end()) {
      return cannot_come_back(pid_, m.memory, "the image does not hold it as released");
    }
    if (of_image->size != m.memory.size) {
      return cannot_come_back(pid_, m.memory,
                              "the image has " + std::to_string(of_image->size) + " bytes of it");
    }
    const auto index = static_cast<size_t>(of_image - saved.begin());
    if ((of_image->kind == MemoryKind::kManaged) != (m.memory.kind == AllocationKind::kManaged)) {
      return cannot_come_back(pid_, m.memory, "the image has another kind of memory there");
    }
    if (m.memory.kind == AllocationKind::kManaged) {
      work.managed.push_back({index, m.memory});
    } else {
      MemoryToLoad load;
      load.allocation = index;
      load.target = m.memory;
      work.device.push_back(std::move(load));
    }
    loaded.insert(m.memory.address);
  }
  if (!all_of_image) return work;
  for (const AllocationInfo& a : saved) {
    if (a.path != MemoryPath::kReleased || loaded.contains(a.address)) continue;
    AgentAllocation missing;
    missing.address = a.address;
    missing.size = a.size;
    if (a.gpu >= 0) missing.device_uuid = chain.image().gpus[static_cast<size_t>(a.gpu)].uuid;
    return cannot_come_back(pid_, missing, "the process's own record does not have it");
  }
  return work;
}

Result<BroughtBack> MemoryRelease::bring_back(const PageChain& chain, MemoryLoader& loader,
                                              bool all_of_image,
                                              const std::function<void()>& mapped) {
  if (agent_->released_by() != chain.image().dump_id) {
    return Error(Domain::kFormat, static_cast<int>(ImageError::kMixedDumps),
                 process(pid_) + ": its GPU memory was taken away by dump " +
                     format_dump_id(agent_->released_by()) + ", and the images are of dump " +
                     format_dump_id(chain.image().dump_id) + "; files of two dumps are mixed");
  }
  // Where it waits for a thread that CRIU has frozen there is no use in waiting for it.
  agent_->set_command_timeout(agent_->is_busy() ? kStuckTimeout : kMoveTimeout);
  auto stopped = keep_from_managed();
  if (!stopped) return stopped.error();
  agent_->set_command_timeout(kMoveTimeout);
  auto done = map_and_load(chain, loader, all_of_image, mapped);
  if (done) {
    away_ = read_only_ = false;
    return done;
  }
  const auto& saved = chain.image().allocations;
  const bool any = std::any_of(saved.begin(), saved.end(), [](const AllocationInfo& a) {
    return a.kind == MemoryKind::kManaged && a.path == MemoryPath::kReleased;
  });
  if (!any) return done;
  // Its threads reach it without the driver, and are about to go on.
  auto left = agent_->take_away_managed();
  const bool there = !left || std::any_of(left->begin(), left->end(), [](const ReleasedMemory& m) {
    return m.memory.kind == AllocationKind::kManaged && m.state == ReleasedState::kNative;
  });
  if (there && !has_ended(pid_, agent_->restore_tid(), start_time_)) {
    log(LogLevel::kError, "daemon",
        "%s is killed: its managed memory is there without its contents, and cannot be taken away "
        "again (%s)",
        process(pid_).c_str(), left ? "it is in use" : left.error().message().c_str());
    kill(pid_, SIGKILL);
  }
  return done;
}

// Is it this phosd that traces it, for the gate?
static bool is_traced_by_us(int tid) {
  auto status = read_proc_status(tid);
  auto tracer = status && status->tracer_pid ? read_proc_status(status->tracer_pid) : status;
  return status && status->tracer_pid && tracer && tracer->tgid == getpid();
}

// Threads that may reach managed memory while it is without its contents are stopped. Those of a
// process that CRIU has frozen are, by CRIU.
Result<std::unique_ptr<StoppedProcess>> MemoryRelease::keep_from_managed() {
  auto released = agent_->released();
  if (!released) return released.error();
  const bool any = std::any_of(released->begin(), released->end(), [](const ReleasedMemory& m) {
    return m.memory.kind == AllocationKind::kManaged;
  });
  auto status = read_proc_status(pid_);
  if (!status) return status.error();
  const bool frozen = status->tracer_pid && !is_traced_by_us(pid_);
  if (!any || frozen) return std::unique_ptr<StoppedProcess>();
  auto agent_tid = agent_->thread_id();
  if (!agent_tid) return agent_tid.error();
  for (const auto deadline = steady_clock::now() + kStopPatience;;) {
    // Those that the gate keeps stopped go on with it.
    std::set<int> except{*agent_tid, agent_->restore_tid()};
    auto threads = list_threads(pid_);
    if (!threads) return threads.error();
    for (const ThreadInfo& t : *threads) {
      if (is_traced_by_us(t.tid)) except.insert(t.tid);
    }
    auto stopped = StoppedProcess::stop(pid_, except, kStopPatience);
    if (!stopped) return stopped;
    auto locks = agent_->check_no_locks();
    if (locks) return stopped;
    if (locks.error().code() != EDEADLK || steady_clock::now() > deadline) return locks.error();
  }
}

Result<BroughtBack> MemoryRelease::map_and_load(const PageChain& chain, MemoryLoader& loader,
                                                bool all_of_image,
                                                const std::function<void()>& mapped) {
  BroughtBack done;
  auto start = steady_clock::now();
  auto back = agent_->map_back();
  if (!back) return back.error();
  if (agent_->missing_hook()) {
    log(LogLevel::kWarn, "daemon",
        "%s: calls about memory that phos stands in for are answered as for VMM memory (entry "
        "point %d of libcuda)",
        process(pid_).c_str(), agent_->missing_hook());
  }
  auto work = plan(chain, *back, all_of_image);
  if (!work) return work.error();
  std::vector<AgentAllocation> memory;
  for (const MemoryToLoad& m : work->device) memory.push_back(m.target);
  // The gate is closed, and nobody but the agent has been in the driver since it was.
  auto handles = agent_->export_memory(memory, AgentGuard::kCaller);
  if (!handles) return handles.error();
  for (size_t i = 0; i < memory.size(); i++) {
    AgentExport& handle = (*handles)[i];
    if (handle.status != ExportStatus::kExported) {
      return cannot_come_back(pid_, memory[i],
                              "the driver gives no handle to it (CUDA error " +
                                  std::to_string(handle.driver_result) + ")");
    }
    work->device[i].handle = std::move(handle);
  }
  mapped();
  done.map_time = since(start);
  start = steady_clock::now();
  if (!work->device.empty()) {
    auto report = loader.load(std::move(work->device), {});
    if (!report) return report.error().wrap(process(pid_));
    done.load = *report;
  }
  auto managed = load_managed(*agent_, chain, work->managed);
  if (!managed) return managed.error().wrap(process(pid_));
  done.managed_bytes = *managed;
  done.load_time = since(start);
  done.allocations = memory.size() + work->managed.size();
  for (const ReleasedMemory& m : *back) done.adopted += m.state == ReleasedState::kAdopted;
  auto loaded = agent_->contents_loaded();
  if (!loaded) return loaded.error();
  return done;
}

// Of managed memory that was to be taken away.
Result<void> MemoryRelease::make_writable() {
  if (!read_only_) return {};
  auto loaded = agent_->contents_loaded();
  if (!loaded) return loaded.error();
  read_only_ = false;
  return {};
}

Result<void> MemoryRelease::let_go() {
  if (away_) return process_error(pid_, EBUSY, "its memory is away");
  if (auto r = make_writable(); !r) return r;
  end_lease();
  return gate_->release();
}

Result<void> MemoryRelease::open() {
  if (open_) return {};
  if (away_) return process_error(pid_, EBUSY, "its memory is away");
  end_lease();
  if (auto r = make_writable(); !r) return r;
  if (auto r = gate_->open(); !r) return r;
  if (auto left = gate_->leave_no_trace(); !left) {
    log(LogLevel::kDebug, "daemon", "%s; phos's agent sleeps on in it until the next dump",
        left.error().message().c_str());
  }
  gate_.reset();
  open_ = true;
  let_agent_leave(pid_, &agent_, take_out_);
  return {};
}

// Without its thread the library could not be taken out any more, if one may still be in there.
void let_agent_leave(int pid, std::shared_ptr<Agent>* agent, bool take_out) {
  const bool last = *agent && agent->use_count() == 1 && take_out;
  Result<void> left;
  if (last && !(*agent)->gate_was_used()) left = (*agent)->unload();
  if (last) (void)(*agent)->detach(true).ok();
  agent->reset();
  if (left || left.error().code() == EBUSY || left.error().code() == ESRCH) return;
  log(LogLevel::kWarn, "daemon", "%s: phos's agent sleeps on in it: %s", process(pid).c_str(),
      left.error().message().c_str());
}

}  // namespace phos
