// SPDX-License-Identifier: GPL-2.0-only
// Session: room on the GPUs for processes that are to come back.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {
namespace {

// Of a GPU, beside what is known to be needed: for the driver's own, and for what others allocate
// meanwhile.
constexpr uint64_t kSpare = uint64_t{1} << 30;
constexpr uint64_t kSpareShare = 32;
constexpr uint64_t kEverything = uint64_t{1} << 56;

// A restore takes what the kernel driver had accounted to the process, and 4 to 8 MiB more for the
// driver's own (580.159.04, one context with 2 MiB to 16 GiB of memory in one piece or in 512).
constexpr uint64_t kForDriver = uint64_t{32} << 20, kLeastForDriver = uint64_t{8} << 20;

// A process that is about to end lets go of its memory within it.
constexpr std::chrono::milliseconds kRoomPoll{250};

std::string in_words(const DeviceRoom::Shortage& s) {
  return "needs " + megabytes(s.needed) + " of memory on " + format_gpu_uuid(s.gpu) + ", where " +
         std::to_string(s.free >> 20) + " MiB are free";
}

}  // namespace

GpuUuid Session::restored_on(const GpuUuid& gpu) const {
  for (const GpuPair& pair : gpu_pairs_) {
    if (pair.from == gpu) return pair.to;
  }
  return gpu;
}

Session::Room Session::claim_room(const ProcessImage& image) {
  Room room;
  if (!engines_) return room;
  std::vector<uint64_t> needed(image.gpus.size());
  for (const AllocationInfo& a : image.allocations) {
    // Managed memory is the CPU's, where there is no room.
    if (a.gpu < 0 || a.kind == MemoryKind::kManaged) continue;
    needed[static_cast<size_t>(a.gpu)] += a.size;
  }
  // Contexts, code, and all of what is not listed: on which of its GPUs it is, is not known. Nor,
  // where nothing is listed, which those are.
  const uint64_t more = unlisted_bytes(image);
  const bool anywhere = std::all_of(needed.begin(), needed.end(), [](uint64_t n) { return !n; });
  for (size_t i = 0; i < needed.size(); i++) {
    if (!needed[i] && !anywhere) continue;
    const GpuUuid gpu = restored_on(image.gpus[i].uuid);
    const uint64_t bytes = needed[i] + more;
    room.claims.push_back(engines_->room().claim(gpu, bytes + bytes / kSpareShare + kSpare));
  }
  return room;
}

void Session::make_room(const Room& room) {
  if (engines_) engines_->room().make_room(room.claims);
}

// As it was accounted when the process was checkpointed. An image that does not have that, GPU by
// GPU, is taken to have what is not listed in equal parts on all that it uses; nothing is asked for
// where it does not tell which these are.
std::vector<DeviceRoom::Need> Session::needs_of(const ProcessImage& image) const {
  std::vector<uint64_t> listed(image.gpus.size()), released(image.gpus.size());
  uint64_t all_listed = 0;
  for (const AllocationInfo& a : image.allocations) {
    if (a.gpu < 0 || a.kind == MemoryKind::kManaged) continue;
    all_listed += a.size;
    listed[static_cast<size_t>(a.gpu)] += a.size;
    if (a.path == MemoryPath::kReleased) released[static_cast<size_t>(a.gpu)] += a.size;
  }
  if (all_listed == 0 && image.gpu_bytes.empty() && image.gpus.size() > 1) return {};
  const auto in_use = [&](uint64_t n) { return all_listed == 0 || n; };
  const auto parts = static_cast<uint64_t>(std::count_if(listed.begin(), listed.end(), in_use));
  const uint64_t more = unlisted_bytes(image);
  std::vector<DeviceRoom::Need> needs;
  for (size_t i = 0; i < image.gpus.size(); i++) {
    uint64_t bytes = in_use(listed[i]) ? listed[i] + more / parts : 0;
    if (!image.gpu_bytes.empty()) bytes = image.gpu_bytes[i];
    if (!bytes) continue;
    const uint64_t later = std::min(released[i], bytes);
    needs.push_back({restored_on(image.gpus[i].uuid), bytes - later + kForDriver, later});
  }
  return needs;
}

// Of a process that this session, or a phosd that died, has dumped.
std::vector<DeviceRoom::Need> Session::needs_of(int pid, Held* held) {
  if (held->image) return needs_of(*held->image);
  std::vector<DeviceRoom::Need> needs;
  for (const auto& [gpu, bytes] : held->memory.own_on) {
    if (bytes) needs.push_back({gpu, bytes + kForDriver, 0});
  }
  auto status = read_proc_status(pid);
  if (!needs.empty() || !held->taken_over || !status || !open_noted_dir() || !image_dir_) {
    return needs;
  }
  auto image = read_process_image(image_dir_.get(), status->vpid);
  if (!image || (!left_dump_.empty() && format_dump_id(image->dump_id) != left_dump_)) return needs;
  if (held->room.claims.empty()) held->room.claims = claim_room(*image).claims;
  return needs_of(*image);
}

std::optional<DeviceRoom::Shortage> Session::admit(const std::vector<DeviceRoom::Need>& needs,
                                                   Room* room) {
  const auto free = [&](const GpuUuid& gpu) -> std::optional<uint64_t> {
    auto bytes = driver_.free_memory(gpu);
    if (bytes) return *bytes;
    log(LogLevel::kWarn, "daemon", "cannot tell how much memory of %s is free: %s",
        format_gpu_uuid(gpu).c_str(), bytes.error().message().c_str());
    return {};
  };
  // phosd's own, if it is to load what was released.
  std::vector<DeviceRoom::Need> all = needs;
  for (DeviceRoom::Need& need : all) {
    if (need.later && engines_) need.later += engines_->bytes_to_use(need.gpu);
  }
  room->admission = {};
  return device_room().admit(all, free, &room->admission);
}

// The driver is not asked before there is enough: a restore that finds too little loses the
// process.
Result<void> Session::wait_for_room(int pid, const std::vector<DeviceRoom::Need>& needs,
                                    Room* room) {
  auto shortage = admit(needs, room);
  if (!shortage) return {};
  // Nobody stages pages while this one waits.
  std::vector<DeviceRoom::Claim> everything;
  for (const auto& need : needs) everything.push_back(device_room().claim(need.gpu, kEverything));
  if (!std::exchange(room->reclaimed, true) &&
      device_room().reclaim(everything, device_room().freed())) {
    log(LogLevel::kInfo, "daemon",
        "%s: pages that were read ahead into GPU memory are given up for it", process(pid).c_str());
    shortage = admit(needs, room);
  }
  bool told = false;
  while (shortage && room_waited_ < room_patience_) {
    if (!std::exchange(told, true)) {
      log(LogLevel::kWarn, "daemon", "%s waits for room on a GPU: it %s", process(pid).c_str(),
          in_words(*shortage).c_str());
    }
    std::this_thread::sleep_for(kRoomPoll);
    room_waited_ += kRoomPoll;
    if (client_gone_ && client_gone_()) break;
    // It may have been killed, or somebody else has brought it back.
    if (auto state = driver_.state(pid); !state || *state != CudaState::kCheckpointed) return {};
    shortage = admit(needs, room);
  }
  if (!shortage) return {};
  // Of a program that leaves little of a GPU to others there was never more than that.
  std::vector<DeviceRoom::Need> least = needs;
  for (DeviceRoom::Need& need : least) need.by_driver -= kForDriver - kLeastForDriver;
  if (!admit(least, room)) return {};
  return Error(Domain::kUsage, ENOMEM, process(pid) + " " + in_words(*shortage));
}

// What is to be done about a process that cannot be restored, or not yet.
std::string Session::remedy(int pid, const Held* held, bool lost) const {
  if (!held) {
    return "free memory on that GPU and run criu restore again; the images are complete";
  }
  if (!lost) {
    return "free memory on that GPU; the process stays checkpointed by NVIDIA's driver until then";
  }
  const bool complete =
      dumping_ && held->image && faccessat(image_dir_.get(), kInventory, F_OK, 0) == 0;
  return "end it (kill -KILL " + std::to_string(pid) + "), and restore it from " +
         (complete ? "this dump, which is complete" : "its last complete dump");
}

// Of a process that is checkpointed. `held`: null in a restore.
Result<void> Session::restore_by_driver(int pid, const std::vector<DeviceRoom::Need>& needs,
                                        Held* held, Room* room) {
  if (held && held->lost) return *held->lost;
  if (auto r = wait_for_room(pid, needs, room); !r) {
    return Error(r.error().domain(), r.error().code(),
                 r.error().message() + "; " + remedy(pid, held, false));
  }
  auto restored = driver_.restore(pid, gpu_pairs_);
  room->admission.by_driver.clear();
  if (restored) return {};
  room->admission = {};
  if (!is_cuda_error(restored.error(), kCudaErrorOutOfMemory) &&
      !is_cuda_error(restored.error(), kCudaErrorOperatingSystem)) {
    return restored;
  }
  // Somebody has taken the memory since. If that was too much for this driver, it says so whenever
  // it is asked again.
  auto state = driver_.state(pid);
  if (!state || *state != CudaState::kCheckpointed) return restored;
  auto again = driver_.restore(pid, gpu_pairs_);
  if (again || !is_cuda_error(again.error(), kCudaErrorOperatingSystem)) return again;
  state = driver_.state(pid);
  if (!state || *state != CudaState::kCheckpointed) return again;
  // Without its first answer (of another phosd, or of a driver that means something else) it may
  // be.
  const bool found_too_little = is_cuda_error(restored.error(), kCudaErrorOutOfMemory);
  if (held && !found_too_little) return restored;
  const Error lost(
      Domain::kCuda, kCudaErrorOperatingSystem,
      "NVIDIA's driver has lost " + process(pid) +
          ": it found too little GPU memory for it, and does not restore it any more (" +
          restored.error().message() + ", then " + again.error().message() + "); " +
          remedy(pid, held, true));
  if (held) held->lost = lost;
  return lost;
}

Result<void> Session::with_room(int pid, Room* room, const std::function<Result<void>()>& attempt,
                                const std::function<bool(const Error&)>& may_help) {
  if (!engines_) return attempt();
  DeviceRoom& all = engines_->room();
  const DeviceRoom::Freed before = all.freed();
  auto done = attempt();
  // Without claims it has got what it needs.
  if (done || room->claims.empty() || room->reclaimed || !may_help(done.error())) return done;
  room->reclaimed = true;
  // Nobody takes what is given up now.
  std::vector<DeviceRoom::Claim> everything;
  for (const auto& c : room->claims) everything.push_back(all.claim(c.gpu(), kEverything));
  if (!all.reclaim(room->claims, before)) return done;
  log(LogLevel::kWarn, "daemon",
      "%s: trying again without the pages that were read ahead into GPU memory: %s",
      process(pid).c_str(), done.error().message().c_str());
  return attempt();
}

}  // namespace phos
