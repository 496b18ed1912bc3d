// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_proof.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/uvm_kmod.h"
#include "gpu-tracker/track/uvm_rehearsal.h"

namespace phos {
namespace {

using Step = UvmRehearsal::Step;

constexpr uint64_t kPage = 1 << PHOS_UVM_PAGE_SHIFT;

bool none(size_t) {
  return false;
}
bool all(size_t) {
  return true;
}
bool written(size_t page) {
  return std::count(std::begin(UvmRehearsal::kWritten), std::end(UvmRehearsal::kWritten), page);
}
bool debugged(size_t page) {
  return std::count(std::begin(UvmRehearsal::kDebugged), std::end(UvmRehearsal::kDebugged), page);
}

const struct {
  Step step;
  const char* name;
  bool ranges;            // all of them are made or gone
  bool (*dirty)(size_t);  // and of its pages these have a record
} kSteps[] = {
    {Step::kMap, "making ranges", true, none},
    {Step::kFill, "writing to all of it", false, all},
    {Step::kWrite, "writing to pages of it", false, written},
    {Step::kDebug, "a debugger's write", false, debugged},
    {Step::kUnmap, "ending the ranges", true, none},
};

// In order.
std::vector<std::pair<uint64_t, uint64_t>> all_ranges() {
  std::vector<std::pair<uint64_t, uint64_t>> ranges = {
      {UvmRehearsal::kAddress, UvmRehearsal::kAddress + UvmRehearsal::kPages * kPage}};
  for (const uint64_t other : UvmRehearsal::kOthers) ranges.emplace_back(other, other + kPage);
  return ranges;
}

// What the record has that it should not, or the other way round; empty: nothing.
std::string difference(const UvmEpoch& epoch, bool range, bool (*dirty)(size_t)) {
  if (!epoch.doubt().empty()) return epoch.doubt();
  auto ranges = epoch.ranges();
  std::sort(ranges.begin(), ranges.end());
  if (range ? ranges != all_ranges() : !ranges.empty()) {
    return std::to_string(ranges.size()) + " ranges are recorded, not the right ones";
  }
  size_t expected = 0;
  for (size_t i = 0; i < UvmRehearsal::kPages; i++) {
    expected += dirty(i);
    if (!range && epoch.maybe_dirty(UvmRehearsal::kAddress + i * kPage, kPage) != dirty(i)) {
      return "the record of page " + std::to_string(i) + " is wrong";
    }
  }
  if (epoch.granted_pages() == expected) return "";
  return std::to_string(epoch.granted_pages()) + " pages are recorded, not " +
         std::to_string(expected);
}

// Which nvidia-uvm is loaded: the kernel gives each load another number.
uint64_t load_number() {
  struct stat module = {};
  return stat("/sys/module/nvidia_uvm", &module) == 0 ? module.st_ino : 0;
}

}  // namespace

Result<void> prove_uvm_layout(const phos_kmod_layout& layout) {
  const std::string what = "trying phos.ko on a process of its own";
  auto rehearsal = UvmRehearsal::begin();
  if (!rehearsal) return rehearsal.error().wrap(what);
  if (auto r = rehearsal->take(Step::kOpen); !r) return r.error().wrap(what);
  auto tracker = UvmKmod::start(rehearsal->pid(), 64, layout);
  if (!tracker) return tracker.error().wrap(what);
  for (const auto& step : kSteps) {
    if (auto r = rehearsal->take(step.step); !r) return r.error().wrap(what);
    const std::string wrong = difference((*tracker)->next_epoch(), step.ranges, step.dirty);
    if (wrong.empty()) continue;
    return Error(Domain::kErrno, ENOTSUP,
                 what + ": " + step.name + " is not recorded as it should be (" + wrong + ")");
  }
  return {};
}

Result<void> prove_uvm_layout_once(const UvmLayout& layout) {
  static std::mutex mutex;
  static uint64_t proved = 0;
  static std::string version;
  std::lock_guard lock(mutex);
  const uint64_t load = load_number();
  if (load != 0 && load == proved && version == layout.version) return {};
  if (auto r = prove_uvm_layout(layout.offsets); !r) {
    return Error(Domain::kErrno, ENOTSUP,
                 "phos's table of nvidia-uvm " + layout.version + " is not of the one that is " +
                     "loaded: " + r.error().message() + "; build it with BTF (pahole)");
  }
  log(LogLevel::kDebug, "track", "phos.ko reads nvidia-uvm by phos's table of version %s: proved",
      layout.version.c_str());
  proved = load;
  version = layout.version;
  return {};
}

}  // namespace phos
