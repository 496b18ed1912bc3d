// SPDX-License-Identifier: GPL-2.0-only
// Session: the driver's own copy of a process (driver_copy.h), on the released path.
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

double ms(std::chrono::microseconds t) {
  return static_cast<double>(t.count()) / 1000;
}

// The agent in a process that a phosd which died has left; nothing: there is none.
Result<std::optional<Agent>> find_agent(int pid, int restore_tid) {
  const auto deadline = steady_clock::now() + kEndOfPhosd;
  for (;;) {
    auto agent = Agent::find(pid, restore_tid);
    if (agent || agent.error().code() != EBUSY || steady_clock::now() > deadline) return agent;
    std::this_thread::sleep_for(kPoll);
  }
}

Result<void> load(int pid, const PageChain& chain) {
  const auto start = steady_clock::now();
  auto loaded = load_driver_copy(pid, chain);
  if (!loaded) return loaded.error();
  log(LogLevel::kInfo, "daemon", "%s: the driver's own copy, %s, put back in %.1f ms",
      process(pid).c_str(), megabytes(*loaded).c_str(), ms(since(start)));
  return {};
}

}  // namespace

// The process is checkpointed and frozen. Whatever cannot be done CRIU does.
Result<void> Session::save_copy(int pid, Held* held) {
  if (!held->release || !held->release->is_away() || !held->image) return {};
  const auto start = steady_clock::now();
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  auto ranges =
      usable_copies(*maps, held->release->agent()->driver_copies(), held->memory.own + kRounding);
  if (!ranges) return ranges.error().wrap(process(pid));
  if (ranges->empty()) return {};
  auto store = PageStore::create(image_dir_.get(), dump_id_, storage_.pages);
  if (!store) return store.error();
  ProcessImage image = *held->image;
  const PreviousPages* previous = held->copy ? held->copy->previous() : nullptr;
  auto saved = save_driver_copy(pid, *ranges, store->get(), previous, &image);
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

// The image is written, and says where the copy is saved. How many bytes CRIU will not find. An
// error: whether it will is not known.
Result<uint64_t> Session::empty_copy(int pid, Held* held) {
  if (held->copies.empty()) return uint64_t{0};
  Agent* agent = held->release->agent();
  // Kept open, whatever becomes of the directory.
  auto chain = open_chain(*held, *held->image, PageIo::kCached);
  auto emptied = chain ? Result<void>() : Result<void>(chain.error());
  if (emptied) {
    held->copy_chain = std::make_unique<PageChain>(std::move(*chain));
    agent->set_command_timeout(kEmptyTimeout);
    emptied = agent->empty_driver_copies(held->copies);
  }
  if (emptied) {
    uint64_t bytes = 0;
    for (const AddressRange& r : held->copies) bytes += r.end - r.begin;
    return bytes;
  }
  if (auto idle = agent->wait_idle(); !idle) return idle.error();
  log(LogLevel::kWarn, "daemon", "%s: CRIU saves the driver's own copy as well: %s",
      process(pid).c_str(), emptied.error().message().c_str());
  if (agent->copies_state() != DriverCopies::kKept) return uint64_t{0};
  std::erase_if(held->image->allocations,
                [](const AllocationInfo& a) { return a.path == MemoryPath::kCopy; });
  auto written = write_process_image(image_dir_.get(), *held->image, unsynced_.get());
  if (!written) return written.error();
  return uint64_t{0};
}

// Of a process that phosd did not dump itself.
Result<void> Session::open_copy(int pid, const DumpId& dump, Held* held) {
  const std::string what = "the driver's own copy of " + process(pid) + " is in its images alone";
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  if (auto r = open_noted_dir(); !r) return r.error().wrap(what);
  auto image = read_process_image(image_dir_.get(), status->vpid);
  if (!image) return image.error().wrap(what);
  if (image->dump_id != dump || !has_driver_copy(*image)) {
    return Error(Domain::kFormat, static_cast<int>(ImageError::kMixedDumps),
                 what + ", dump " + format_dump_id(dump) + ", and these are of dump " +
                     format_dump_id(image->dump_id));
  }
  auto chain = PageChain::open(image_dir_.get(), std::move(*image), PageIo::kCached);
  if (!chain) return chain.error().wrap(what);
  held->copy_chain = std::make_unique<PageChain>(std::move(*chain));
  return {};
}

// Before the driver restores the process. `held`: null in a restore. The agent's note tells whether
// it is to be done, whoever has emptied it.
Result<void> Session::put_copy_back(int pid, CudaState state, Held* held,
                                    const ProcessImage* image) {
  if (!held) {
    const bool wanted = state == CudaState::kCheckpointed && has_driver_copy(*image);
    return wanted ? load(pid, *saved_.at(image->pid).chain) : Result<void>();
  }
  std::optional<Agent> found;
  Agent* agent = held->release ? held->release->agent() : nullptr;
  if (!held->release && held->taken_over) {
    auto left = find_agent(pid, held->restore_tid);
    if (!left) return left.error();
    if (*left) agent = &found.emplace(std::move(**left));
  }
  if (!agent) return {};
  // What it was told, by a phosd that died perhaps, is done then, or will not be. Before the
  // driver's checkpoint it was not told to empty anything, and may wait for a lock of the frozen
  // process's.
  if (state == CudaState::kCheckpointed) {
    if (auto r = agent->wait_idle(); !r) return r;
  }
  if (agent->copies_state() != DriverCopies::kEmpty) return {};
  if (state != CudaState::kCheckpointed) {
    held->lost = Error(Domain::kCuda, kCudaErrorIllegalState,
                       process(pid) +
                           " was restored by NVIDIA's driver without its own copy, which "
                           "is in phos's images: by whoever called it, cuda-checkpoint "
                           "perhaps; end it (kill -KILL " +
                           std::to_string(pid) + "), and restore it from its last complete dump");
    return *held->lost;
  }
  if (!held->copy_chain) {
    if (auto r = open_copy(pid, agent->released_by(), held); !r) return r;
  }
  if (auto r = load(pid, *held->copy_chain); !r) return r;
  agent->note_copies(DriverCopies::kBack);
  return {};
}

// The driver has restored the process.
void Session::forget_copy(const Held& held) {
  Agent* agent = held.release ? held.release->agent() : nullptr;
  if (agent) agent->note_copies(DriverCopies::kKept);
}

}  // namespace phos
