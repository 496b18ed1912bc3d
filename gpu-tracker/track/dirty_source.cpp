// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/dirty_source.h"

#include <iterator>

namespace phos {

DirtyAnswer ContentSource::ask(uint64_t /*address*/, uint64_t /*size*/) {
  return {DirtyAnswer::Verdict::kMaybeDirty, "only its content tells"};
}

void ActivitySource::mark() {
  proof_ = {};
  failure_.clear();
  events_.clear();
  ledger_complete_ = true;
  update();
  // What was read now happened before the mark. A record that is still being written then belongs
  // to a call in progress, and turns up among the events as one too many.
  base_ = last_.counts;
  events_.clear();
  written_.clear();
  ledger_complete_ = true;
}

void ActivitySource::update() {
  if (!failure_.empty()) return;
  auto now = watch_->read();
  if (!now) {
    failure_ = now.error().message();
    return;
  }
  last_ = std::move(*now);
  ledger_complete_ = ledger_complete_ && last_.ledger_complete;
  events_.insert(events_.end(), std::make_move_iterator(last_.events.begin()),
                 std::make_move_iterator(last_.events.end()));
  last_.events.clear();
  for (const phos_activity_write& w : last_.writes) written_.add(w.start, w.end);
  last_.writes.clear();
}

std::string ActivitySource::obstacle() const {
  if (!failure_.empty()) return failure_;
  if (!last_.doubts.empty()) return last_.doubts.front();
  if (!proof_.no_call_in_progress) return "a call may have been in progress at the mark";
  return "";
}

DirtyAnswer ActivitySource::ask(uint64_t address, uint64_t size) {
  update();
  std::string reason = obstacle();
  if (reason.empty() && !proof_.gpu_idle) reason = "work from before the mark may still run";
  if (reason.empty() && !proof_.no_outside_writer) {
    reason = "other processes or devices may write to it";
  }
  const ActivityCounts &now = last_.counts, &then = base_;
  if (reason.empty() && (now.allocate != then.allocate || now.free != then.free)) {
    reason = "the process has allocated or freed memory";
  }
  if (reason.empty() && now.anywhere != then.anywhere) {
    reason = "the process has made a call that may write anywhere";
  }
  if (reason.empty() && now.submit != then.submit && !proof_.no_aliases) {
    reason = "the process has copied to memory that may have another address";
  }
  if (reason.empty() && written_.overlap(address, size)) reason = "the process has copied to it";
  if (!reason.empty()) return {DirtyAnswer::Verdict::kMaybeDirty, reason};
  return {DirtyAnswer::Verdict::kCertainlyClean, ""};
}

LedgerAnswer ActivitySource::allocations() {
  update();
  std::string reason = obstacle();
  if (reason.empty() && last_.counts.undescribed != base_.undescribed) {
    reason = "the process has made a call that may allocate or free something unknown";
  }
  const bool none = last_.counts.allocate == base_.allocate && last_.counts.free == base_.free;
  if (reason.empty() && none) return {LedgerAnswer::Verdict::kUnchanged, {}, ""};
  if (reason.empty() && !ledger_complete_)
    reason = "allocations went by faster than they were read";
  if (!reason.empty()) return {LedgerAnswer::Verdict::kScan, {}, reason};
  return {LedgerAnswer::Verdict::kEvents, events_, ""};
}

std::optional<ActivityCounts> ActivitySource::calls() {
  update();
  if (!failure_.empty() || !last_.doubts.empty()) return std::nullopt;
  return last_.counts;
}

Result<void> ActivitySource::stop() {
  failure_ = "the process is no longer watched";
  return watch_->stop();
}

}  // namespace phos
