// SPDX-License-Identifier: GPL-2.0-only
// Agent: release and map back.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "gpu-tracker/inject/agent.h"

namespace phos {
namespace {

Error nonsense(int pid) {
  return process_error(pid, EPROTO, "phos's agent in it gives a record that makes no sense");
}

Result<ReleasedMemory> decode(int pid, const phos_allocation& a) {
  if (a.status < PHOS_RELEASED_RESERVED || a.status > PHOS_RELEASED_IN_USE || !a.size ||
      a.address + a.size < a.address || a.export_type > PHOS_EXPORT_FD) {
    return nonsense(pid);
  }
  ReleasedMemory out;
  out.state = static_cast<ReleasedState>(a.status);
  out.driver_result = a.result;
  out.memory.kind =
      a.kind == PHOS_KIND_MANAGED ? AllocationKind::kManaged : AllocationKind::kDevice;
  out.memory.address = a.address;
  out.memory.size = a.size;
  out.memory.mapping_address = a.mapping_address;
  out.memory.mapping_size = a.mapping_size;
  out.memory.buffer_id = a.buffer_id;
  out.memory.context = a.context;
  out.memory.device = a.device;
  memcpy(out.memory.device_uuid.data(), a.device_uuid, sizeof a.device_uuid);
  out.memory.export_type = static_cast<ExportType>(a.export_type);
  return out;
}

const char* name_of(uint32_t call) {
  switch (call) {
    case PHOS_CALL_MEM_FREE:
      return "cuMemFree";
    case PHOS_CALL_MEM_ALLOC:
      return "cuMemAlloc";
    case PHOS_CALL_RESERVE:
      return "cuMemAddressReserve";
    case PHOS_CALL_ADDRESS_FREE:
      return "cuMemAddressFree";
    case PHOS_CALL_MMAP:
      return "mmap";
    case PHOS_CALL_MUNMAP:
      return "munmap";
    case PHOS_CALL_MMAP_KEPT:
      return "mmap (of what is kept)";
    case PHOS_CALL_MUNMAP_KEPT:
      return "munmap (of what is kept)";
    default:
      return "?";
  }
}

}  // namespace

std::vector<std::string> Agent::address_events() const {
  const phos_mailbox& m = mailbox_->payload();
  const uint32_t all = m.address_event_count;
  const uint32_t count = std::min(all, PHOS_MAX_ADDRESS_EVENTS);
  std::vector<std::string> lines;
  for (uint32_t i = 0; i < count; i++) {
    phos_address_event e;
    memcpy(&e, &m.address_events[i], sizeof e);
    char line[160];
    snprintf(line, sizeof line, "%s(%#llx, %#llx) = %d, %#llx", name_of(e.call),
             static_cast<unsigned long long>(e.asked), static_cast<unsigned long long>(e.size),
             e.result, static_cast<unsigned long long>(e.got));
    lines.emplace_back(line);
  }
  if (all > count) lines.push_back("and " + std::to_string(all - count) + " more");
  return lines;
}

Result<std::vector<AgentRelease>> Agent::release(std::span<const AgentAllocation> allocations) {
  std::vector<AgentRelease> results;
  results.reserve(allocations.size());
  bool stop = false;
  while (!allocations.empty() && !stop) {
    if (auto r = settle(); !r) return r.error();
    const size_t count = std::min<size_t>(allocations.size(), PHOS_MAILBOX_MAX_ALLOCATIONS);
    phos_allocation* records = mailbox_->payload().allocations;
    for (size_t i = 0; i < count; i++) {
      phos_allocation a = {};
      a.address = allocations[i].address;
      a.buffer_id = allocations[i].buffer_id;
      memcpy(&records[i], &a, sizeof a);
    }
    if (auto r = run(PHOS_COMMAND_RELEASE, static_cast<uint32_t>(count)); !r) return r.error();
    for (size_t i = 0; i < count; i++) {
      phos_allocation a;
      memcpy(&a, &records[i], sizeof a);
      if (a.status > PHOS_RELEASE_NOT_REACHED) return nonsense(pid_);
      results.push_back({static_cast<ReleaseStatus>(a.status), a.result});
      stop = stop || a.status == PHOS_RELEASE_LOST || a.status == PHOS_RELEASE_NOT_REACHED;
    }
    allocations = allocations.subspan(count);
  }
  results.resize(results.size() + allocations.size());  // kNotReached
  return results;
}

Result<std::vector<ReleasedMemory>> Agent::run_released(phos_agent_command command) {
  if (auto r = run(command, 0); !r) return r.error();
  const uint32_t count = mailbox_->shared().count;
  if (count > PHOS_MAILBOX_MAX_ALLOCATIONS) return nonsense(pid_);
  std::vector<ReleasedMemory> out;
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

Result<std::vector<ReleasedMemory>> Agent::map_back(const MapBackOptions& options) {
  if (auto r = settle(); !r) return r.error();
  mailbox_->shared().argument = options.native_misses;
  auto released = run_released(PHOS_COMMAND_MAP_BACK);
  if (released) missing_hook_ = static_cast<int>(mailbox_->shared().argument);
  return released;
}

std::vector<AddressRange> Agent::driver_copies() const {
  const phos_mailbox& m = mailbox_->payload();
  const uint32_t noted = __atomic_load_n(&m.driver_copy_count, __ATOMIC_ACQUIRE);
  const uint32_t count = std::min(noted, PHOS_MAX_DRIVER_COPIES);
  std::vector<AddressRange> copies;
  for (uint32_t i = 0; i < count; i++) {
    phos_address_range range;
    memcpy(&range, &m.driver_copies[i], sizeof range);
    copies.push_back({range.begin, range.end});
  }
  return copies;
}

Result<void> Agent::empty_driver_copies(std::span<const AddressRange> ranges) {
  if (auto r = settle(); !r) return r;
  for (size_t i = 0; i < ranges.size(); i++) {
    mailbox_->payload().ranges[i] = {ranges[i].begin, ranges[i].end};
  }
  return run(PHOS_COMMAND_EMPTY_COPIES, static_cast<uint32_t>(ranges.size()));
}

DriverCopies Agent::copies_state() const {
  switch (__atomic_load_n(&mailbox_->payload().driver_copies_state, __ATOMIC_ACQUIRE)) {
    case PHOS_COPIES_KEPT:
      return DriverCopies::kKept;
    case PHOS_COPIES_BACK:
      return DriverCopies::kBack;
    default:
      return DriverCopies::kEmpty;
  }
}

void Agent::note_copies(DriverCopies state) {
  const auto value = static_cast<uint32_t>(state);
  __atomic_store_n(&mailbox_->payload().driver_copies_state, value, __ATOMIC_RELEASE);
}

void Agent::note_released_by(const std::array<uint8_t, 16>& dump_id) {
  memcpy(mailbox_->payload().released_by, dump_id.data(), dump_id.size());
}

std::array<uint8_t, 16> Agent::released_by() const {
  std::array<uint8_t, 16> id;
  memcpy(id.data(), mailbox_->payload().released_by, id.size());
  return id;
}

Result<std::vector<ReleasedMemory>> Agent::released() {
  return run_released(PHOS_COMMAND_RELEASED);
}

Result<std::vector<ReleasedMemory>> Agent::take_away_managed() {
  return run_released(PHOS_COMMAND_TAKE_AWAY);
}

Result<std::vector<ReleasedMemory>> Agent::contents_loaded() {
  return run_released(PHOS_COMMAND_LOADED);
}

}  // namespace phos
