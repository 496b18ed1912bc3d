// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_choice.h"

#include <unistd.h>

#include <string>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/uvm_kmod.h"
#include "gpu-tracker/track/uvm_tools.h"
#include "gpu-tracker/track/uvm_watch.h"

namespace phos {

Result<std::unique_ptr<UvmTracker>> start_uvm_tracker(pid_t pid) {
  using Tracker = std::unique_ptr<UvmTracker>;
  auto bpf = UvmWatch::start(pid);
  if (bpf) return Tracker(std::move(*bpf));
  std::string why_not = "uvm-bpf: " + bpf.error().message();
  const auto started = [&](Tracker tracker) {
    log(LogLevel::kInfo, "track", "%s tracks managed memory of process %d; not %s", tracker->name(),
        pid, why_not.c_str());
    return tracker;
  };
  auto kmod = UvmKmod::start(pid);
  if (kmod) return started(std::move(*kmod));
  why_not += "; uvm-kmod: " + kmod.error().message();
  auto tools = UvmTools::start(pid);
  if (tools) return started(std::move(*tools));
  return Error(bpf.error().domain(), bpf.error().code(),
               why_not + "; uvm-tools: " + tools.error().message());
}

UvmTrackers check_uvm_trackers() {
  UvmTrackers trackers;
  if (auto bpf = UvmWatch::start(getpid()); !bpf) trackers.bpf = bpf.error();
  trackers.kmod = UvmKmod::check();
  trackers.tools = UvmTools::check();
  return trackers;
}

}  // namespace phos
