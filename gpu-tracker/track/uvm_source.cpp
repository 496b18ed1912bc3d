// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_source.h"

namespace phos {

UvmEpoch UvmSource::take() {
  proof_ = {};
  return tracker_->next_epoch();
}

DirtyAnswer UvmSource::ask(uint64_t address, uint64_t size) {
  const auto dirty = [](const std::string& reason) {
    return DirtyAnswer{DirtyAnswer::Verdict::kMaybeDirty, reason};
  };
  if (!proof_.writes_revoked) return dirty("it may have been writable at the mark");
  if (!proof_.no_outside_writer) return dirty("devices may write to pages of it");
  const UvmEpoch epoch = tracker_->so_far();
  if (!epoch.doubt().empty()) return dirty(epoch.doubt());
  if (epoch.maybe_dirty(address, size)) return dirty("it was made writable");
  return {DirtyAnswer::Verdict::kCertainlyClean, ""};
}

}  // namespace phos
