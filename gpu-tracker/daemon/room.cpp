// SPDX-License-Identifier: GPL-2.0-only
// Session: room on the GPUs for processes that are to come back.
#include <algorithm>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {
namespace {

// Of a GPU, beside what is known to be needed: for the driver's own, and for what others allocate
// meanwhile.
constexpr uint64_t kSpare = uint64_t{1} << 30;
constexpr uint64_t kSpareShare = 32;
constexpr uint64_t kEverything = uint64_t{1} << 56;

}  // namespace

Session::Room Session::claim_room(const ProcessImage& image) {
  Room room;
  if (!engines_) return room;
  std::vector<uint64_t> needed(image.gpus.size());
  uint64_t listed = 0;
  for (const AllocationInfo& a : image.allocations) {
    listed += a.size;
    if (a.gpu >= 0) needed[static_cast<size_t>(a.gpu)] += a.size;
  }
  // Contexts, code, and all of what is not listed: on which of its GPUs it is, is not known. Nor,
  // where nothing is listed, which those are.
  const uint64_t more = image.device_bytes > listed ? image.device_bytes - listed : 0;
  const bool anywhere = std::all_of(needed.begin(), needed.end(), [](uint64_t n) { return !n; });
  for (size_t i = 0; i < needed.size(); i++) {
    if (!needed[i] && !anywhere) continue;
    GpuUuid gpu = image.gpus[i].uuid;
    for (const GpuPair& pair : gpu_pairs_) {
      if (pair.from == gpu) {
        gpu = pair.to;
        break;
      }
    }
    const uint64_t bytes = needed[i] + more;
    room.claims.push_back(engines_->room().claim(gpu, bytes + bytes / kSpareShare + kSpare));
  }
  return room;
}

void Session::make_room(const Room& room) {
  if (engines_) engines_->room().make_room(room.claims);
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
