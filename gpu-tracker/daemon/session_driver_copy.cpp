// SPDX-License-Identifier: GPL-2.0-only
// Session: the driver's own copy of a process (driver_copy.h), on the released path.
#include <fcntl.h>

#include <algorithm>
#include <thread>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/driver_copy.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {
namespace {

using std::chrono::steady_clock;

// It is no larger than what the kernel driver accounts to the process, but for rounding.
constexpr uint64_t kRounding = 1 << 30;
// For the kernel to take it out of the process.
constexpr std::chrono::milliseconds kEmptyTimeout{10000};
// For a phosd that was killed to be gone.
constexpr std::chrono::milliseconds kEndOfPhosd{10000}, kPoll{5};

bool is_plain_memory(const std::vector<ProcMapping>& maps, const AddressRange& range) {
  return std::any_of(maps.begin(), maps.end(), [&](const ProcMapping& m) {
    return m.start <= range.begin && m.end >= range.end && m.path.empty() &&
           std::string(m.perms) == "rw-p";
  });
}

double ms(std::chrono::microseconds t) {
  return static_cast<double>(t.count()) / 1000;
}

// What the agent, in a process that is not trusted, says of where it is; what is no longer mapped
// the driver has not needed.
Result<std::vector<AddressRange>> find_copies(int pid, const Agent& agent, uint64_t most) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  std::vector<AddressRange> found;
  uint64_t bytes = 0;
  for (const AddressRange& range : agent.driver_copies()) {
    if (range.begin >= range.end || range.begin % 4096 || range.end % 4096) continue;
    const bool again = std::any_of(found.begin(), found.end(), [&](const AddressRange& other) {
      return range.begin < other.end && other.begin < range.end;
    });
    if (again || !is_plain_memory(*maps, range)) continue;
    found.push_back(range);
    bytes += range.end - range.begin;
  }
  if (bytes > most) return process_error(pid, EFBIG, "it claims more than it had on its GPUs");
  return found;
}

// The dump that has emptied the driver's copy in process `pid`; nothing: none has, or it is back.
// What a phosd that died has told the agent to do is done afterwards, or will not be.
Result<std::optional<DumpId>> is_emptied(int pid, int restore_tid) {
  const auto deadline = steady_clock::now() + kEndOfPhosd;
  for (;;) {
    auto agent = Agent::find(pid, restore_tid);
    if (agent && *agent && (*agent)->copies_are_empty()) {
      return std::optional<DumpId>((*agent)->released_by());
    }
    if (agent) return std::optional<DumpId>();
    if (agent.error().code() != EBUSY || steady_clock::now() > deadline) return agent.error();
    std::this_thread::sleep_for(kPoll);
  }
}

}  // namespace

UnsyncedFiles* Session::files_of_copies() {
  if (unsynced_) return unsynced_.get();
  if (!copies_unsynced_) {
    UniqueFd directory(fcntl(image_dir_.get(), F_DUPFD_CLOEXEC, 0));
    if (!directory) return nullptr;
    copies_unsynced_ = std::make_unique<UnsyncedFiles>(std::move(directory));
  }
  return copies_unsynced_.get();
}

// The process is checkpointed and frozen. Whatever cannot be done CRIU does.
Result<void> Session::save_copy(int pid, Held* held) {
  if (!held->release || !held->release->is_away() || !held->image) return {};
  const auto start = steady_clock::now();
  auto ranges = find_copies(pid, *held->release->agent(), held->memory.own + kRounding);
  if (!ranges) return ranges.error();
  if (ranges->empty()) return {};
  PageStoreOptions options = storage_.pages;
  // CRIU's images are not durable yet either; finish() sees to it.
  options.later = files_of_copies();
  if (!options.later) return Error::from_errno(errno, "cannot use the image directory");
  auto store = PageStore::create(image_dir_.get(), dump_id_, options);
  if (!store) return store.error();
  std::optional<PreviousPages> previous;
  if (held->image->parent_dump_id != DumpId{}) previous = open_previous(held->image->pid);
  ProcessImage image = *held->image;
  auto saved =
      save_driver_copy(pid, *ranges, store->get(), previous ? &*previous : nullptr, &image);
  if (!saved) return saved.error();
  held->image = std::move(image);
  held->copies = std::move(*ranges);
  held->copy_time = since(start);
  const PageStoreStatistics s = (*store)->statistics();
  log(LogLevel::kInfo, "daemon",
      "%s: the driver's own copy, %s, saved in %.1f ms, of which %s are new", process(pid).c_str(),
      megabytes(*saved).c_str(), ms(held->copy_time), megabytes(s.bytes).c_str());
  return {};
}

// The image is written, and says where it is. An error: it may be gone at any time.
Result<void> Session::empty_copy(int pid, Held* held) {
  if (held->copies.empty()) return {};
  // Whatever becomes of the directory.
  auto chain = PageChain::open(image_dir_.get(), *held->image, PageIo::kCached);
  if (!chain) {
    log(LogLevel::kWarn, "daemon", "%s: CRIU saves the driver's own copy as well: %s",
        process(pid).c_str(), chain.error().message().c_str());
    return {};
  }
  held->copy_chain = std::make_unique<PageChain>(std::move(*chain));
  Agent* agent = held->release->agent();
  agent->set_command_timeout(kEmptyTimeout);
  auto emptied = agent->empty_driver_copies(held->copies);
  if (emptied) return {};
  if (auto idle = agent->wait_idle(); !idle) {
    return emptied.error().wrap(idle.error().message());
  }
  log(LogLevel::kWarn, "daemon", "%s: CRIU saves the driver's own copy as well: %s",
      process(pid).c_str(), emptied.error().message().c_str());
  return {};
}

// Of a process that phosd did not dump itself.
Result<void> Session::find_copy(int pid, Held* held) {
  auto emptied = is_emptied(pid, held->restore_tid);
  if (!emptied) return emptied.error();
  if (!*emptied) return {};
  const std::string what = "the driver's own copy of " + process(pid) + " is in its images alone";
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  if (auto r = open_noted_dir(); !r) return r.error().wrap(what);
  auto image = read_process_image(image_dir_.get(), status->vpid);
  if (!image) return image.error().wrap(what);
  if (image->dump_id != **emptied || !has_driver_copy(*image)) {
    return Error(Domain::kFormat, static_cast<int>(ImageError::kMixedDumps),
                 what + ", dump " + format_dump_id(**emptied) + ", and these are of dump " +
                     format_dump_id(image->dump_id));
  }
  auto chain = PageChain::open(image_dir_.get(), std::move(*image), PageIo::kCached);
  if (!chain) return chain.error().wrap(what);
  held->copy_chain = std::make_unique<PageChain>(std::move(*chain));
  return {};
}

// The process is checkpointed, and the driver is about to restore it. `held`: null in a restore.
Result<void> Session::put_copy_back(int pid, Held* held, const ProcessImage* image) {
  const PageChain* chain = nullptr;
  if (held) {
    if (held->copy_is_back) return {};
    if (held->taken_over && !held->copy_chain) {
      if (auto r = find_copy(pid, held); !r) return r;
    } else if (held->release) {
      if (auto r = held->release->agent()->wait_idle(); !r) return r;
    }
    chain = held->copy_chain.get();
  } else if (has_driver_copy(*image)) {
    chain = saved_.at(image->pid).chain.get();
  }
  if (!chain) return {};
  const auto start = steady_clock::now();
  auto loaded = load_driver_copy(pid, *chain);
  if (!loaded) return loaded.error();
  log(LogLevel::kInfo, "daemon", "%s: the driver's own copy, %s, put back in %.1f ms",
      process(pid).c_str(), megabytes(*loaded).c_str(), ms(since(start)));
  if (held) held->copy_is_back = true;
  return {};
}

}  // namespace phos
