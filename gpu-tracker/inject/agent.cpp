// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/agent.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/agent_loader.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Between the SIGKILL that a thread takes and the mark that it exits nothing tells of either.
constexpr milliseconds kDyingTime{50};
// Its threads exit one by one.
constexpr milliseconds kExitTime{1000};

Error refusal(int pid, int result, int detail) {
  switch (result) {
    case PHOS_RESULT_UNGUARDED:
      return process_error(pid, EAGAIN, "the lease of its gate has expired");
    case PHOS_RESULT_BAD_TABLE:
      return process_error(pid, EPROTO,
                           "the record of its released GPU memory has been overwritten, by the "
                           "program itself; nothing was changed");
    case PHOS_RESULT_NO_HOOKS:
      return process_error(pid, ENOTSUP,
                           "its libcuda has unknown code at an entry point (number " +
                               std::to_string(detail) +
                               "), so its GPU memory is not released; the driver saves it");
    case PHOS_RESULT_THREAD_INSIDE:
      return process_error(pid, EBUSY,
                           "one of its threads is freeing memory that phos stands in for; let it "
                           "go on, then try again");
    case PHOS_RESULT_IN_USE:
      return process_error(pid, EBUSY, "phos's agent in it still stands in for some of its memory");
    case PHOS_RESULT_UNPROTECTED:
      return process_error(pid, ENOTSUP, "its managed memory cannot be made read-only");
    case PHOS_RESULT_STALE:
      return process_error(pid, ESTALE, "its managed memory is not what it was");
    case PHOS_RESULT_NO_MEMORY:
      return process_error(pid, ENOMEM, "no memory in it for the record of what is released");
    case PHOS_RESULT_NO_SIGNAL:
      return process_error(pid, ENOTSUP, "it ignores every real-time signal");
    case PHOS_RESULT_GATE_BUSY:
      return process_error(pid, EBUSY, "threads may still be parked at its gate");
    default:
      return process_error(pid, EPROTO,
                           "phos's agent in it refuses a command (" + std::to_string(result) + ")");
  }
}

// What fails in a process that ends can be anything: its memory goes first, its threads last.
Error unless_ended(int pid, int restore_tid, const Error& error) {
  // Somebody uses, stops or traces it: that does not look like an end.
  const auto patience = error.code() == EBUSY    ? milliseconds(0)
                        : is_ending(restore_tid) ? kExitTime
                                                 : kDyingTime;
  const auto deadline = steady_clock::now() + patience;
  for (;;) {
    if (is_ending(pid)) return process_error(pid, ESRCH, "it has ended");
    if (steady_clock::now() >= deadline) return error;
    std::this_thread::sleep_for(milliseconds(1));
  }
}

// The managed memory driver's file. (The simulation's memfd has its name.)
bool is_managed_mapping(const ProcMapping& m) {
  return m.perms[3] == 's' && m.path.find("/dev/nvidia-uvm") != std::string::npos;
}

// Adds the range, or makes the last one longer by it.
void add_to(std::vector<AddressRange>* ranges, const AddressRange& r) {
  if (!ranges->empty() && ranges->back().end == r.begin) {
    ranges->back().end = r.end;
  } else {
    ranges->push_back(r);
  }
}

// The ranges in ascending order, cut where managed memory begins and ends.
std::vector<phos_address_range> with_managed(std::span<const AddressRange> ranges,
                                             const std::vector<AddressRange>& managed) {
  std::vector<phos_address_range> cut;
  auto m = managed.begin();
  for (AddressRange r : ranges) {
    while (r.begin < r.end) {
      while (m != managed.end() && m->end <= r.begin) ++m;
      const bool more = m != managed.end() && m->begin < r.end;
      const bool inside = more && m->begin <= r.begin;
      const uint64_t end = inside ? std::min(m->end, r.end) : more ? m->begin : r.end;
      cut.push_back({r.begin | (inside ? PHOS_RANGE_MANAGED : 0), end});
      r.begin = end;
    }
  }
  return cut;
}

Result<AgentAllocation> decode(int pid, const phos_allocation& a) {
  if (a.kind > PHOS_KIND_IMPORTED || a.export_type > PHOS_EXPORT_FD || !a.size ||
      a.address + a.size < a.address) {
    return process_error(pid, EPROTO, "phos's agent in it gives a record that makes no sense");
  }
  if (a.result) {
    return Error(Domain::kCuda, a.result,
                 "process " + std::to_string(pid) + ": device " + std::to_string(a.device) +
                     " has no UUID: CUDA error " + std::to_string(a.result));
  }
  AgentAllocation out;
  out.kind = static_cast<AllocationKind>(a.kind);
  out.address = a.address;
  out.size = a.size;
  out.mapping_address = a.mapping_address;
  out.mapping_size = a.mapping_size;
  out.buffer_id = a.buffer_id;
  out.context = a.context;
  out.device = a.device;
  memcpy(out.device_uuid.data(), a.device_uuid, sizeof a.device_uuid);
  out.export_type = static_cast<ExportType>(a.export_type);
  return out;
}

}  // namespace

const char* to_string(AllocationKind kind) {
  switch (kind) {
    case AllocationKind::kUnknown:
      return "unknown";
    case AllocationKind::kDevice:
      return "cuMemAlloc";
    case AllocationKind::kSmall:
      return "small cuMemAlloc";
    case AllocationKind::kVmm:
      return "VMM";
    case AllocationKind::kPool:
      return "pool";
    case AllocationKind::kManaged:
      return "managed";
    case AllocationKind::kImported:
      return "module or imported";
  }
  return "unknown";
}

Result<std::vector<AddressRange>> device_address_ranges(int pid) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  std::vector<AddressRange> ranges;
  for (const ProcMapping& m : *maps) {
    const bool reserved = m.path.empty() && !strcmp(m.perms, "---p");
    if (reserved || is_managed_mapping(m)) add_to(&ranges, {m.start, m.end});
  }
  return ranges;
}

Result<Agent> Agent::attach(int pid, int restore_tid, const AgentOptions& options) {
  auto agent = attach_living(pid, restore_tid, options);
  if (!agent) return unless_ended(pid, restore_tid, agent.error());
  return agent;
}

Result<Agent> Agent::attach_living(int pid, int restore_tid, const AgentOptions& options) {
  if (auto r = check_attachable(pid, restore_tid); !r) return r.error();
  const bool there = has_agent_thread(pid);
  auto mailbox = load_agent(pid, restore_tid, options);
  if (!mailbox) return mailbox.error();
  Agent agent(pid, restore_tid, options, std::move(*mailbox));
  agent.was_loaded_ = !there || agent.mailbox_->shared().leaving;
  agent.mailbox_->shared().leaving = 0;
  // A phosd that died may have left descriptors open.
  if (auto r = agent.run(PHOS_COMMAND_CLOSE, 0); !r) return r.error();
  return agent;
}

Result<std::optional<Agent>> Agent::find(int pid, int restore_tid, const AgentOptions& options) {
  auto found = Mailbox::find(pid);
  if (!found) return found.error();
  if (!*found || (*found)->state() != PHOS_AGENT_READY || !has_agent_thread(pid)) {
    return std::optional<Agent>();
  }
  Agent agent(pid, restore_tid, options, std::move(**found));
  // Ends, or waits for, what a phosd that died has begun, which may be EXIT; and closes what it has
  // left open.
  if (auto r = agent.settle(); !r) return r.error();
  if (agent.mailbox_->state() != PHOS_AGENT_READY) return std::optional<Agent>();
  if (auto r = agent.run(PHOS_COMMAND_CLOSE, 0); !r) return r.error();
  return std::optional<Agent>(std::move(agent));
}

Result<void> Agent::remove_leftovers(int pid, int restore_tid, const AgentOptions& options) {
  if (auto r = check_attachable(pid, restore_tid); !r) return r;
  return phos::remove_leftovers(pid, restore_tid, options);
}

Agent::Agent(Agent&& other) noexcept
    : pid_(other.pid_),
      restore_tid_(other.restore_tid_),
      options_(other.options_),
      mailbox_(std::move(other.mailbox_)),
      cost_(other.cost_),
      was_loaded_(other.was_loaded_),
      missing_hook_(other.missing_hook_) {
  other.mailbox_.reset();
}

Agent::~Agent() {
  if (mailbox_) (void)detach().ok();
}

// Waits for a command that is still under way.
Result<void> Agent::settle() {
  if (!mailbox_) return process_error(pid_, EINVAL, "phos has let go of its agent");
  if (mailbox_->idle()) return {};
  mailbox_->cancel();
  auto idle = mailbox_->wait_idle(options_.command_timeout);
  if (!idle) return idle.error();
  if (!*idle) {
    return process_error(pid_, ETIMEDOUT,
                         "phos's agent in it is still busy with an earlier question; the process "
                         "is stopped or locked, or its driver hangs");
  }
  return {};
}

Result<void> Agent::run(phos_agent_command command, uint32_t count) {
  if (auto r = settle(); !r) return r;
  mailbox_->start(command, count);
  auto done = mailbox_->wait_idle(options_.command_timeout);
  if (!done) return done.error();
  if (!*done) {
    mailbox_->cancel();
    return process_error(pid_, ETIMEDOUT,
                         "phos's agent in it did not answer within " +
                             std::to_string(options_.command_timeout.count()) +
                             " ms; the process is stopped or locked, or its driver hangs");
  }
  return answer();
}

Result<void> Agent::answer() {
  const int32_t result = mailbox_->shared().result;
  const int32_t driver_result = mailbox_->shared().driver_result;
  if (result == PHOS_RESULT_OK) return {};
  if (result == PHOS_RESULT_DRIVER && driver_result) {
    return Error(Domain::kCuda, driver_result,
                 "process " + std::to_string(pid_) +
                     ": its driver does not tell about its memory: CUDA error " +
                     std::to_string(driver_result));
  }
  return refusal(pid_, result, driver_result);
}

Result<std::vector<AgentAllocation>> Agent::enumerate(AgentGuard guard) {
  auto ranges = device_address_ranges(pid_);
  if (!ranges) return ranges.error();
  return enumerate(*ranges, guard);
}

Result<std::vector<AgentAllocation>> Agent::enumerate(std::span<const AddressRange> ranges,
                                                      AgentGuard guard) {
  auto maps = read_proc_maps(pid_);
  if (!maps) return maps.error();
  std::vector<AddressRange> managed;
  for (const ProcMapping& m : *maps) {
    if (is_managed_mapping(m)) add_to(&managed, {m.start, m.end});
  }
  std::vector<phos_address_range> left = with_managed(ranges, managed);
  if (left.size() > PHOS_MAILBOX_MAX_RANGES) {
    return process_error(pid_, E2BIG, "it has too many address ranges to look through");
  }
  std::vector<AgentAllocation> all;
  cost_ = {};
  for (const AddressRange& r : ranges) cost_.probed_bytes += r.end - r.begin;
  while (!left.empty()) {
    if (auto r = settle(); !r) return r.error();
    for (size_t i = 0; i < left.size(); i++) {
      memcpy(&mailbox_->payload().ranges[i], &left[i], sizeof left[i]);
    }
    mailbox_->shared().argument = static_cast<uint32_t>(guard);
    if (auto r = run(PHOS_COMMAND_ENUMERATE, static_cast<uint32_t>(left.size())); !r) {
      return r.error();
    }
    auto some = read_allocations(mailbox_->shared().count);
    if (!some) return some.error();
    all.insert(all.end(), some->begin(), some->end());
    cost_.driver_calls += mailbox_->shared().driver_calls;
    cost_.time += std::chrono::nanoseconds(mailbox_->shared().nanoseconds);
    // 0, or the scan was cut short for want of room; each time something must have been found.
    const uint64_t next = mailbox_->shared().next_address;
    if (!next || some->empty()) break;
    left.erase(left.begin(),
               std::find_if(left.begin(), left.end(), [&](const auto& r) { return r.end > next; }));
    if (left.empty()) continue;
    const uint64_t flags = left.front().begin & PHOS_RANGE_MANAGED;
    left.front().begin = std::max(left.front().begin, next | flags);
  }
  return all;
}

Result<std::vector<AgentAllocation>> Agent::read_allocations(uint32_t count) {
  if (count > PHOS_MAILBOX_MAX_ALLOCATIONS) {
    return process_error(pid_, EPROTO, "phos's agent in it claims more memory than there is room");
  }
  std::vector<AgentAllocation> out;
  out.reserve(count);
  for (uint32_t i = 0; i < count; i++) {
    phos_allocation copy;
    memcpy(&copy, &mailbox_->payload().allocations[i], sizeof copy);
    auto decoded = decode(pid_, copy);
    if (!decoded) return decoded.error();
    out.push_back(*decoded);
  }
  return out;
}

Result<void> Agent::export_batch(std::span<const AgentAllocation> batch, AgentGuard guard,
                                 std::vector<AgentExport>* exports) {
  if (auto r = settle(); !r) return r;
  phos_export* records = mailbox_->payload().exports;
  for (size_t i = 0; i < batch.size(); i++) {
    phos_export e = {};
    e.address = batch[i].address;
    e.buffer_id = batch[i].buffer_id;
    e.type = static_cast<uint32_t>(batch[i].export_type);
    memcpy(&records[i], &e, sizeof e);
  }
  mailbox_->shared().argument = static_cast<uint32_t>(guard);
  if (auto r = run(PHOS_COMMAND_EXPORT, static_cast<uint32_t>(batch.size())); !r) return r;
  bool fds = false;
  for (size_t i = 0; i < batch.size(); i++) {
    phos_export e;
    memcpy(&e, &records[i], sizeof e);
    AgentExport out;
    out.type = batch[i].export_type;
    out.driver_result = e.driver_result;
    const bool unguarded = e.status == PHOS_EXPORT_UNGUARDED && guard == AgentGuard::kCaller;
    if (e.status > PHOS_EXPORT_UNGUARDED || e.status == PHOS_EXPORT_FULL || unguarded) {
      return process_error(pid_, EPROTO, "phos's agent in it could not export what it was asked");
    }
    out.status = static_cast<ExportStatus>(e.status);
    memcpy(out.ipc_handle.data(), e.ipc_handle, sizeof e.ipc_handle);
    if (out.type == ExportType::kFd && e.fd >= 0) {
      fds = true;
      auto fd = mailbox_->fetch(e.fd);
      if (!fd) return fd.error();
      if (out.status == ExportStatus::kExported) out.fd = std::move(*fd);
    }
    exports->push_back(std::move(out));
  }
  return fds ? run(PHOS_COMMAND_CLOSE, 0) : Result<void>();
}

Result<std::vector<AgentExport>> Agent::export_memory(std::span<const AgentAllocation> allocations,
                                                      AgentGuard guard) {
  std::vector<AgentExport> exports;
  exports.reserve(allocations.size());
  while (!allocations.empty()) {
    size_t count = 0, fds = 0;
    while (count < allocations.size() && count < PHOS_MAILBOX_MAX_EXPORTS) {
      if (allocations[count].export_type == ExportType::kFd && ++fds > PHOS_EXPORT_MAX_FDS) break;
      count++;
    }
    if (auto r = export_batch(allocations.first(count), guard, &exports); !r) {
      // Whatever went wrong, nothing is to stay open over there.
      if (r.error().code() != ESRCH) (void)run(PHOS_COMMAND_CLOSE, 0).ok();
      return r.error();
    }
    allocations = allocations.subspan(count);
  }
  return exports;
}

Result<void> Agent::detach(bool leaving) {
  if (!mailbox_) return {};
  if (leaving) mailbox_->shared().leaving = 1;
  Result<void> result;
  if (mailbox_->idle()) {
    mailbox_->drop_payload();
  } else {
    mailbox_->cancel();
    result = process_error(pid_, ETIMEDOUT,
                           "phos's agent in it is busy; it will sleep once the driver answers");
  }
  mailbox_.reset();
  return result;
}

Result<void> Agent::unload() {
  auto done = unload_living();
  if (!done) return unless_ended(pid_, restore_tid_, done.error());
  return done;
}

Result<void> Agent::unload_living() {
  if (auto r = check_attachable(pid_, restore_tid_); !r) return r;
  if (auto r = run(PHOS_COMMAND_EXIT, 0); !r) return r;
  Mailbox mailbox = std::move(*mailbox_);
  mailbox_.reset();
  return remove_agent(pid_, restore_tid_, options_, std::move(mailbox));
}

}  // namespace phos
