// SPDX-License-Identifier: GPL-2.0-only
// What nvidia-uvm grants, as a DirtySource of managed memory.
#pragma once

#include <cstdint>
#include <memory>

#include "gpu-tracker/track/dirty_source.h"
#include "gpu-tracker/track/uvm_epoch.h"
#include "gpu-tracker/track/uvm_tracker.h"

namespace phos {

// Certainly clean needs two things proved: that writes were revoked after the mark, and that no
// device writes by itself to pages it had pinned before (no_outside_writer). Only managed memory
// may be asked about: of all other memory nvidia-uvm knows nothing.
class UvmSource : public DirtySource {
 public:
  explicit UvmSource(std::unique_ptr<UvmTracker> tracker) : tracker_(std::move(tracker)) {}

  const char* name() const override { return tracker_->name(); }
  void mark() override { take(); }
  void prove(const IdleProof& proof) override { proof_ = proof; }
  // Reads the whole record, of all memory: ask about ranges, not about pages.
  DirtyAnswer ask(uint64_t address, uint64_t size) override;

  // mark(), and what was recorded since the last one: for rounds, which go on with what has
  // changed.
  UvmEpoch take();

 private:
  std::unique_ptr<UvmTracker> tracker_;
  IdleProof proof_;
};

}  // namespace phos
