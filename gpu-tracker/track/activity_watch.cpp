// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/activity_watch.h"

#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <map>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/activity_program.h"
#include "gpu-tracker/track/entry_points.h"
#include "gpu-tracker/track/instruction.h"

namespace phos {
namespace {

uint32_t write_shape(WriteShape shape) {
  switch (shape) {
    case WriteShape::kSize3:
      return PHOS_SHAPE_SIZE_3;
    case WriteShape::kSize4:
      return PHOS_SHAPE_SIZE_4;
    case WriteShape::kSize5:
      return PHOS_SHAPE_SIZE_5;
    case WriteShape::kSet1:
      return PHOS_SHAPE_SET_1;
    case WriteShape::kSet2:
      return PHOS_SHAPE_SET_2;
    case WriteShape::kSet4:
      return PHOS_SHAPE_SET_4;
    case WriteShape::kRows1:
      return PHOS_SHAPE_ROWS_1;
    case WriteShape::kRows2:
      return PHOS_SHAPE_ROWS_2;
    case WriteShape::kRows4:
      return PHOS_SHAPE_ROWS_4;
    case WriteShape::k2D:
      return PHOS_SHAPE_2D;
    case WriteShape::k3D:
      return PHOS_SHAPE_3D;
    case WriteShape::kAnywhere:
      break;
  }
  return PHOS_SHAPE_NONE;
}

uint32_t record_shape(const EntryPoint& entry) {
  switch (entry.shape) {
    case CallShape::kOutSize:
      return PHOS_SHAPE_OUT_SIZE;
    case CallShape::kOutPitch:
      return PHOS_SHAPE_OUT_PITCH;
    case CallShape::kOut:
      return PHOS_SHAPE_OUT;
    case CallShape::kAtSize:
      return PHOS_SHAPE_AT_SIZE;
    case CallShape::kAt:
      return PHOS_SHAPE_AT;
    case CallShape::kNone:
    case CallShape::kUnknown:
    case CallShape::kNothing:
      break;
  }
  return write_shape(entry.writes);
}

std::string process(int pid) {
  return "process " + std::to_string(pid);
}

}  // namespace

Result<std::unique_ptr<ActivityWatch>> ActivityWatch::start(int pid, const Options& options) {
  if (auto able = check_uprobe_multi(); !able) return able.error();
  std::unique_ptr<ActivityWatch> watch(new ActivityWatch(pid));
  auto text = LibraryText::find(pid);
  if (!text) return text.error();
  watch->text_ = std::move(*text);
  auto functions = read_exported_functions(watch->text_->file());
  if (!functions) return functions.error();
  if (auto r = watch->choose_probes(*functions); !r) return r.error();
  if (auto r = watch->attach(options); !r) return r.error();
  return watch;
}

ActivityWatch::ActivityWatch(int pid) : pid_(pid) {}

ActivityWatch::~ActivityWatch() {
  if (auto r = stop(); !r) log(LogLevel::kError, "track", "%s", r.error().message().c_str());
}

void ActivityWatch::add_doubt(const std::string& doubt) {
  if (std::find(doubts_.begin(), doubts_.end(), doubt) == doubts_.end()) doubts_.push_back(doubt);
}

void ActivityWatch::add_probe(const ExportedFunction& function) {
  const EntryPoint entry = find_entry_point(function.name);
  if (entry.effects == kHarmless) return;
  const auto at = function.offset ? emulated_entry(function.code) : std::nullopt;
  if (!at) {
    add_doubt(function.name +
              " cannot be counted: it begins with an instruction that the kernel does not emulate");
    return;
  }
  const uint64_t offset = function.offset + *at;
  auto same = std::find_if(probes_.begin(), probes_.end(),
                           [&](const Probe& p) { return p.offset == offset; });
  uint32_t shape = record_shape(entry);
  if (same == probes_.end()) {
    probes_.push_back({});
    cookies_.push_back(0);
    same = probes_.end() - 1;
    same->function = function.name;
    same->described = entry.shape != CallShape::kUnknown;
    same->exact = shape >= PHOS_SHAPE_WRITES;
    same->recorded = shape != PHOS_SHAPE_NONE && !same->exact;
    same->work = entry.work;
    same->offset = offset;
  } else {
    // Two names, one function: which was called cannot be told.
    same->function += "/" + function.name;
    const uint32_t before = PHOS_ACTIVITY_COOKIE_SHAPE(cookies_[same - probes_.begin()]);
    if (before != shape || entry.shape == CallShape::kUnknown) {
      same->described = false;
      same->recorded = false;
      same->exact = false;
      shape = PHOS_SHAPE_NONE;
    }
  }
  same->effects |= entry.effects;
  const auto index = same - probes_.begin();
  cookies_[index] = PHOS_ACTIVITY_COOKIE(index, shape);
}

Result<void> ActivityWatch::choose_probes(const std::vector<ExportedFunction>& functions) {
  for (const ExportedFunction& f : functions) {
    if (f.name.rfind("cu", 0) == 0) add_probe(f);
  }
  if (probes_.empty() || probes_.size() > PHOS_ACTIVITY_MAX_PROBES) {
    return Error(Domain::kFormat, ENOTSUP,
                 "libcuda.so of " + process(pid_) + " has " + std::to_string(probes_.size()) +
                     " functions to be counted, which phos does not expect");
  }
  return {};
}

Result<void> ActivityWatch::attach(const Options& options) {
  auto program = ActivityProgram::load(options.ring_bytes, options.writes);
  if (!program) return program.error();
  program_ = std::move(*program);
  std::vector<UprobeTarget> targets;
  for (size_t i = 0; i < probes_.size(); i++) {
    targets.push_back({probes_[i].offset, cookies_[i]});
    offsets_.push_back(probes_[i].offset);
  }
  auto link = program_->attach(pid_, text_->file(), targets);
  if (!link) return link.error();
  link_ = std::move(*link);
  auto text = text_->look(offsets_);
  if (!text) return text.error();
  if (text->armed != text->places ||
      !std::all_of(offsets_.begin(), offsets_.end(),
                   [&](uint64_t offset) { return text_->maps_offset(offset); })) {
    return Error(Domain::kErrno, EIO,
                 "of " + std::to_string(probes_.size()) + " probes in libcuda.so of " +
                     process(pid_) + " only " + std::to_string(text->armed) + " are in place");
  }
  return {};
}

// The out-pointer's value, read by us because the thread made no further call; 0 if unreadable.
uint64_t ActivityWatch::value_at(uint64_t address) const {
  uint64_t value = 0;
  iovec here = {&value, sizeof value};
  iovec there = {reinterpret_cast<void*>(address), sizeof value};
  if (process_vm_readv(pid_, &here, 1, &there, 1, 0) != sizeof value) return 0;
  return value;
}

Result<void> ActivityWatch::collect_events(ActivitySnapshot* snapshot) {
  std::map<uint64_t, phos_activity_record> calls;
  std::map<uint64_t, uint64_t> results;
  auto r = program_->consume([&](const phos_activity_record& record) {
    if (record.kind == PHOS_RECORD_CALL) {
      calls[record.sequence] = record;
    } else {
      results[record.sequence] = record.address;
    }
  });
  if (!r) return r;
  received_ += calls.size();
  for (const auto& [sequence, call] : calls) {
    const Probe& probe = probes_.at(call.probe);
    LedgerEvent event;
    event.function = probe.function;
    event.thread = call.thread;
    event.size = call.size;
    event.address = call.address;
    if (call.shape == PHOS_SHAPE_AT || call.shape == PHOS_SHAPE_AT_SIZE) {
      event.kind = probe.effects & kFree ? LedgerEvent::Kind::kFreed : LedgerEvent::Kind::kMapped;
    } else if (auto result = results.find(sequence); result != results.end()) {
      event.address = result->second;
    } else {
      event.address = value_at(call.address);
    }
    snapshot->events.push_back(std::move(event));
  }
  return {};
}

Result<ActivitySnapshot> ActivityWatch::read() {
  if (!link_) return Error(Domain::kUsage, EINVAL, "the activity watch has been stopped");
  if (auto r = text_->check_alive(); !r) return r.error();
  ActivitySnapshot snapshot;
  const phos_activity_state& state = program_->state();
  // A call adds to its own counter, then to `calls`, then writes its record: read the same way
  // round, whatever is missing at the end belongs to a call that is being recorded right now.
  uint64_t wanted = 0;
  for (size_t i = 0; i < probes_.size(); i++) {
    const uint64_t n = read_counter(state.counts[i]);
    const Probe& p = probes_[i];
    if (p.effects & kSubmit) snapshot.counts.submit += n;
    if (p.effects & kAllocate) snapshot.counts.allocate += n;
    if (p.effects & kFree) snapshot.counts.free += n;
    if ((p.effects & (kAllocate | kFree)) && !p.described) snapshot.counts.undescribed += n;
    if (p.recorded) wanted += n;
    if ((p.effects & kSubmit) && !p.exact) snapshot.counts.anywhere += n;
    if (p.work == Work::kCopy) snapshot.counts.copy += n;
    if (p.work == Work::kLaunch) snapshot.counts.launch += n;
    if (p.work == Work::kGraphLaunch) snapshot.counts.graph_launch += n;
  }
  snapshot.counts.anywhere += read_counter(state.anywhere);
  const uint64_t lost = read_counter(state.lost);
  if (auto r = collect_events(&snapshot); !r) return r.error();
  // A call that has been counted and has no range yet has not begun: its range comes next time.
  if (auto r = program_->take_writes(&snapshot.writes); !r) return r.error();
  snapshot.ledger_complete = lost == lost_ && received_ + lost >= wanted;
  lost_ = lost;

  auto missed = program_->missed_runs();
  if (!missed) return missed.error();
  if (*missed) add_doubt("the kernel has left out calls");
  auto text = text_->look(offsets_);
  if (!text) {
    add_doubt("libcuda.so is no longer where it was: " + text.error().message());
  } else if (text->armed != text->places) {
    add_doubt("some probes are no longer in place");
  }
  snapshot.doubts = doubts_;
  return snapshot;
}

Result<void> ActivityWatch::stop() {
  if (!link_) return {};
  link_.reset();
  return text_->wait_clean(offsets_);
}

}  // namespace phos
