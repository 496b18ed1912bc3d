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

}  // namespace

std::vector<DeviceRoom::Claim> Session::claim_room(const ProcessImage& image) {
  std::vector<DeviceRoom::Claim> claims;
  if (!engines_) return claims;
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
    claims.push_back(engines_->room().claim(gpu, bytes + bytes / kSpareShare + kSpare));
  }
  return claims;
}

Result<void> Session::with_room(int pid, const std::function<Result<void>()>& attempt,
                                const std::function<bool(const Error&)>& may_help) {
  if (!engines_) return attempt();
  const uint64_t before = engines_->room().freed();
  auto done = attempt();
  if (done || !may_help(done.error()) || !engines_->room().reclaim(before)) return done;
  log(LogLevel::kWarn, "daemon",
      "%s: trying again without the pages that were read ahead into GPU memory: %s",
      process(pid).c_str(), done.error().message().c_str());
  return attempt();
}

}  // namespace phos
