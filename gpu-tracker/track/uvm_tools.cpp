// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_tools.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <utility>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/uvm_files.h"

namespace phos {
namespace {

constexpr char kDevice[] = "/dev/nvidia-uvm-tools";
constexpr char kAccessCounters[] =
    "/sys/module/nvidia_uvm/parameters/uvm_perf_access_counter_migration_enable";

// nvidia-uvm's uvm_ioctl.h and uvm_types.h, of drivers 565 to 595; and of 550 to 555, where events
// of the same form are asked for by a version. 560 has but older ones.
constexpr unsigned long kEnableEvents = 58, kFlushEvents = 67, kInitEventTracker = 76,
                        kInitEventTracker550 = 56;
constexpr uint32_t kVersion2 = 2;          // UvmToolsEventQueueVersion_V2
constexpr uint32_t kIllegalAction = 0x16;  // NV_ERR_ILLEGAL_ACTION: no address space in that file
constexpr uint8_t kCpuFault = 1, kGpuFault = 3;

struct InitEventTracker {
  uint64_t queue, entries, control;
  uint8_t processor[16];
  uint32_t all_processors, uvm_fd, status;
  uint32_t requested, granted;  // versions; 550's
};
static_assert(sizeof(InitEventTracker) == 64);

struct EnableEvents {
  uint64_t types;
  uint32_t status;
};

struct FlushEvents {
  uint32_t status;
};

// UvmEventEntry_V2; both kinds of fault have their address here.
struct Event {
  uint8_t type;
  uint8_t padding[7];
  uint64_t address;
  uint8_t rest[56];
};
static_assert(sizeof(Event) == 72 && offsetof(Event, address) == 8);

// UvmToolsEventControlData, and 550's of version 2, which has its version in front of the counters.
constexpr size_t kEventTypes = 64;
struct Control {
  uint32_t get_ahead, get_behind, put_ahead, put_behind;
  uint64_t dropped[1 + kEventTypes];
};
static_assert(sizeof(Control) == 536);

size_t whole_pages(size_t bytes) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

Error driver_error(uint32_t status, const std::string& what) {
  char number[16];
  snprintf(number, sizeof number, "%#x", status);
  return Error(Domain::kErrno, ENOTSUP, what + ": nvidia-uvm answers " + number);
}

Result<UniqueFd> open_tools() {
  UniqueFd device(open(kDevice, O_RDWR | O_CLOEXEC));
  if (device) return device;
  if (errno == ENOENT || errno == ENXIO || errno == ENODEV) {
    return Error(Domain::kErrno, ENOTSUP,
                 std::string("no ") + kDevice + "; nvidia-modprobe -c 0 -u makes it");
  }
  return Error::from_errno(errno, std::string("opening ") + kDevice);
}

// They move memory that is only mapped from afar, and tell nobody.
Result<void> check_access_counters() {
  int value = 0;
  if (std::ifstream(kAccessCounters) >> value && value > 0) {
    return Error(Domain::kErrno, ENOTSUP,
                 std::string("nvidia-uvm migrates memory by access counters, of which it sends no "
                             "events; set its parameter ") +
                     (strrchr(kAccessCounters, '/') + 1) + " to 0");
  }
  return {};
}

void* map_shared(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

}  // namespace

struct UvmTools::Queue {
  ~Queue() {
    tools.reset();  // it has the memory pinned
    if (events) munmap(events, whole_pages(size * sizeof(Event)));
    if (control) munmap(control, whole_pages(sizeof(Control)));
  }

  // False: the file is not of an address space.
  Result<bool> start(UniqueFd file, uint32_t entries) {
    auto device = open_tools();
    if (!device) return device.error();
    tools = std::move(*device);
    uvm = std::move(file);
    size = entries;
    events = static_cast<Event*>(map_shared(whole_pages(size * sizeof(Event))));
    control = static_cast<Control*>(map_shared(whole_pages(sizeof(Control))));
    if (!events || !control) return Error::from_errno(ENOMEM, "a queue of events");
    InitEventTracker init = {};
    init.queue = reinterpret_cast<uintptr_t>(events);
    init.entries = size;
    init.control = reinterpret_cast<uintptr_t>(control);
    init.all_processors = 1;
    init.uvm_fd = static_cast<uint32_t>(uvm.get());
    if (ioctl(tools.get(), kInitEventTracker, &init) == 0) {
      counters = control->dropped;
    } else if (errno == EINVAL) {  // no such command
      init.requested = kVersion2;
      counters = control->dropped + 1;
      if (ioctl(tools.get(), kInitEventTracker550, &init) != 0) {
        return Error::from_errno(errno, "making a queue of events");
      }
      if (!init.status && init.granted != kVersion2) {
        return Error(Domain::kErrno, ENOTSUP,
                     "this nvidia-uvm has no events that phos knows; it needs a driver before 560, "
                     "or 565 and newer");
      }
    } else {
      return Error::from_errno(errno, "making a queue of events");
    }
    if (init.status == kIllegalAction) return false;
    if (init.status) return driver_error(init.status, "making a queue of events");
    EnableEvents enable = {(1ull << kCpuFault) | (1ull << kGpuFault), 0};
    if (ioctl(tools.get(), kEnableEvents, &enable) != 0) {
      return Error::from_errno(errno, "enabling events");
    }
    if (enable.status) return driver_error(enable.status, "enabling events");
    return true;
  }

  // Moves what is in the queue to `faults`.
  void drain(Faults* faults) {
    FlushEvents flush = {};
    if (ioctl(uvm.get(), kFlushEvents, &flush) != 0 || flush.status) {
      faults->doubt = "nvidia-uvm does not flush its events";
    }
    const uint32_t put = __atomic_load_n(&control->put_behind, __ATOMIC_ACQUIRE) & (size - 1);
    for (; get != put; get = (get + 1) & (size - 1)) {
      const Event& e = events[get];
      if (e.type == kCpuFault || e.type == kGpuFault) {
        faults->chunks.insert(e.address & ~(PHOS_UVM_CHUNK - 1));
      } else {
        faults->doubt = "nvidia-uvm sends events that nobody asked for";
      }
    }
    __atomic_store_n(&control->get_ahead, get, __ATOMIC_RELEASE);
    __atomic_store_n(&control->get_behind, get, __ATOMIC_RELEASE);
    uint64_t now = 0;
    for (size_t i = 0; i < kEventTypes; i++) {
      now += __atomic_load_n(&counters[i], __ATOMIC_ACQUIRE);
    }
    if (now != dropped) faults->doubt = "events of faults found no room in the queue";
    dropped = now;
  }

  UniqueFd uvm, tools;
  uint32_t size = 0, get = 0;
  Event* events = nullptr;
  Control* control = nullptr;
  const uint64_t* counters = nullptr;  // of events that found no room
  uint64_t dropped = 0;
};

UvmTools::UvmTools(pid_t pid) : pid_(pid) {
  last_.doubt = "faults of which nobody was told may be served in it";
}

UvmTools::~UvmTools() = default;

Result<void> UvmTools::check() {
  auto device = open_tools();
  if (!device) return device.error();
  if (auto r = check_access_counters(); !r) return r;
  auto calls = UvmWatch::start_calls(getpid(), 1);
  return calls ? Result<void>() : calls.error();
}

Result<std::unique_ptr<UvmTools>> UvmTools::start(pid_t pid, uint32_t events) {
  std::unique_ptr<UvmTools> tracker(new UvmTools(pid));
  if (auto r = tracker->watch(events); !r) {
    return r.error().wrap("watching managed memory of process " + std::to_string(pid));
  }
  return tracker;
}

Result<void> UvmTools::watch(uint32_t events) {
  if (auto device = open_tools(); !device) return device.error();
  if (auto r = check_access_counters(); !r) return r;
  // First: of a space that is made from now on it tells.
  auto calls = UvmWatch::start_calls(pid_, events);
  if (!calls) return calls.error();
  calls_ = std::move(*calls);
  auto files = UvmFiles::of(pid_);
  if (!files) return files.error();
  for (UniqueFd& file : files->copies) {
    auto queue = std::make_unique<Queue>();
    auto started = queue->start(std::move(file), std::bit_ceil(std::max(2u, events)));
    if (!started) return started.error();
    if (*started) queues_.push_back(std::move(queue));
  }
  if (queues_.empty()) {
    return Error(Domain::kErrno, ENXIO, "none of its files is an address space of nvidia-uvm");
  }
  return {};
}

void UvmTools::drain() {
  for (auto& queue : queues_) queue->drain(&running_);
}

void UvmTools::add_faults(UvmEpoch* epoch) const {
  phos_uvm_record all;
  memset(&all, 0xff, sizeof all);
  for (const Faults* faults : {&last_, &running_}) {
    for (const uint64_t chunk : faults->chunks) epoch->add(chunk, all);
    if (!faults->doubt.empty()) epoch->add_doubt(faults->doubt);
  }
}

UvmEpoch UvmTools::next_epoch() {
  UvmEpoch epoch = calls_->next_epoch();
  drain();
  add_faults(&epoch);
  if (!running_.doubt.empty()) {
    log(LogLevel::kWarn, "track", "managed memory of process %d may all be dirty: %s", pid_,
        running_.doubt.c_str());
  }
  last_ = std::exchange(running_, {});
  return epoch;
}

UvmEpoch UvmTools::so_far() {
  UvmEpoch epoch = calls_->so_far();
  drain();
  add_faults(&epoch);
  return epoch;
}

}  // namespace phos
