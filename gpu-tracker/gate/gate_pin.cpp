// SPDX-License-Identifier: GPL-2.0-only
// Gate: its probes, pinned in a BPF file system, for as long as threads must not go on whatever
// becomes of phosd.
#include <bpf/bpf.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/gate/gate.h"
#include "gpu-tracker/gate/gate_program.h"
#include "gpu-tracker/track/activity_program.h"
#include "gpu-tracker/track/uprobe_multi.h"

namespace phos {

// The link has the program, which has the maps.
Result<void> Gate::pin() {
  if (options_.pin.empty() || !pinned_.empty()) return {};
  if (bpf_obj_pin(link_.get(), options_.pin.c_str()) < 0) {
    const int code = errno;
    return bpf_error(code,
                     "pinning the gate of process " + std::to_string(pid_) + " at " + options_.pin);
  }
  pinned_ = options_.pin;
  return {};
}

Result<void> Gate::unpin() {
  if (pinned_.empty()) return {};
  if (unlink(pinned_.c_str()) < 0 && errno != ENOENT) {
    return Error::from_errno(errno, "removing " + pinned_);
  }
  pinned_.clear();
  return {};
}

// Whatever is wrong with it, the gate can be opened: then it goes.
void Gate::adopt_pinned(const std::string& pin) {
  pinned_ = pin;
  link_.reset(bpf_obj_get(pin.c_str()));
  Result<void> known;
  if (!link_) {
    known = bpf_error(errno, "opening " + pin);
  } else {
    auto program = GateProgram::adopt(pid_, link_.get());
    if (program) {
      program_ = std::move(*program);
      arrived_before_ = program_->arrived_before();
      closed_once_ = true;
    } else {
      known = program.error();
    }
  }
  // Who else had probes there before is not known any more.
  shared_ = unclean_ = true;
  if (auto r = choose_probes(); r) {
    own_offsets_ = offsets_;
  } else if (known) {
    known = r;
  }
  if (!known) log(LogLevel::kWarn, "gate", "%s", known.error().message().c_str());
}

// Those of a phosd that is just dying: they send their signal until the kernel has removed them.
void Gate::expect_probes() {
  if (auto r = choose_probes(); !r) return;
  // From now on there are only fewer.
  auto seen = text_.look(offsets_);
  if (!seen || seen->armed == 0) return;
  own_offsets_ = offsets_;
  shared_ = unclean_ = true;
}

}  // namespace phos
