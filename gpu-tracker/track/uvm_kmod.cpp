// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_kmod.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/uvm_files.h"
#include "gpu-tracker/track/uvm_layout.h"
#include "gpu-tracker/track/uvm_proof.h"

namespace phos {
namespace {

Result<UniqueFd> open_module() {
  UniqueFd device(open(PHOS_KMOD_DEVICE, O_RDWR | O_CLOEXEC));
  if (device) return device;
  if (errno == ENOENT || errno == ENXIO) {
    return Error(Domain::kErrno, ENOTSUP,
                 std::string("no ") + PHOS_KMOD_DEVICE + ": phos.ko is not loaded (kmod/README)");
  }
  return Error::from_errno(errno, std::string("opening ") + PHOS_KMOD_DEVICE);
}

// That of the nvidia-uvm that is loaded; what is from the table has been proved.
Result<UvmLayout> usable_layout() {
  auto layout = uvm_layout();
  if (!layout || layout->version.empty()) return layout;
  if (auto r = prove_uvm_layout_once(*layout); !r) return r.error();
  return layout;
}

}  // namespace

Result<std::unique_ptr<UvmKmod>> UvmKmod::start(pid_t pid, uint32_t chunks) {
  if (auto device = open_module(); !device) return device.error();
  auto layout = usable_layout();
  if (!layout) return layout.error();
  return start(pid, chunks, layout->offsets);
}

Result<std::unique_ptr<UvmKmod>> UvmKmod::start(pid_t pid, uint32_t chunks,
                                                const phos_kmod_layout& layout) {
  std::unique_ptr<UvmKmod> tracker(new UvmKmod(pid));
  tracker->slots_ = std::bit_ceil(2 * chunks);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  tracker->table_bytes_ = (tracker->slots_ * sizeof(phos_kmod_slot) + page - 1) / page * page;
  if (auto r = tracker->track(layout); !r) return r.error();
  return tracker;
}

Result<std::string> UvmKmod::check() {
  if (auto device = open_module(); !device) return device.error();
  auto layout = usable_layout();
  if (!layout) return layout.error();
  if (layout->version.empty()) return std::string("the BTF of nvidia-uvm");
  return "phos's table of nvidia-uvm " + layout->version + ", proved";
}

Result<void> UvmKmod::track(const phos_kmod_layout& layout) {
  const std::string what = "tracking managed memory of process " + std::to_string(pid_);
  auto device = open_module();
  if (!device) return device.error();
  device_ = std::move(*device);
  phos_kmod_track want = {};
  want.abi = PHOS_KMOD_ABI;
  want.pid = pid_;
  want.slots = slots_;
  want.layout = layout;
  auto files = UvmFiles::of(pid_);
  if (!files) return files.error().wrap(what);
  if (files->copies.size() > PHOS_KMOD_MAX_SPACES) {
    return Error(Domain::kErrno, ENOTSUP, what + ": it has too many files of nvidia-uvm");
  }
  for (const UniqueFd& copy : files->copies) want.spaces[want.space_count++] = copy.get();
  if (ioctl(device_.get(), PHOS_KMOD_TRACK, &want) != 0) {
    if (errno == EOPNOTSUPP) {
      return Error(
          Domain::kErrno, ENOTSUP,
          what + ": this kernel's struct mutex has not the size that phos's table of " +
              "nvidia-uvm is for (lock debugging, PREEMPT_RT?); build nvidia-uvm with BTF");
    }
    if (errno != EPROTO && errno != ENOTTY) return Error::from_errno(errno, what);
    return Error(Domain::kErrno, ENOTSUP,
                 what + ": phos.ko is of another version; load this one's");
  }
  files->copies.clear();  // they would keep the spaces alive
  // phos.ko notices a space that is made from now on, but not one made since they were listed.
  if (!files->are_all()) return Error::from_errno(EAGAIN, what + ": it is opening nvidia-uvm");
  void* tables = mmap(nullptr, 2 * table_bytes_, PROT_READ, MAP_SHARED, device_.get(), 0);
  if (tables == MAP_FAILED) return Error::from_errno(errno, what);
  tables_ = static_cast<const char*>(tables);
  return {};
}

UvmKmod::~UvmKmod() {
  if (tables_) munmap(const_cast<char*>(tables_), 2 * table_bytes_);
}

UvmEpoch UvmKmod::read(unsigned long command) {
  UvmEpoch epoch;
  phos_kmod_epoch e = {};
  if (ioctl(device_.get(), command, &e) != 0) {
    epoch.add_doubt(Error::from_errno(errno, "asking phos.ko for the record").message());
    return epoch;
  }
  const auto* slots = reinterpret_cast<const phos_kmod_slot*>(tables_ + e.table * table_bytes_);
  for (uint32_t i = 0; i < slots_; i++) {
    const uint64_t key = __atomic_load_n(&slots[i].key, __ATOMIC_ACQUIRE);
    if (key != 0) epoch.add(key, slots[i].record);
  }
  if (e.doubts & PHOS_KMOD_DRIVER_GONE) epoch.add_doubt("nvidia-uvm has been unloaded");
  if (e.doubts & PHOS_KMOD_NEW_SPACE) epoch.add_doubt("it has opened nvidia-uvm once more");
  if (e.doubts & PHOS_KMOD_PROCESS_GONE) {
    epoch.add_doubt("it has ended or executed another program");
  }
  if (e.full || e.unread) {
    epoch.add_doubt("of its grants " + std::to_string(e.full) + " found no room, " +
                    std::to_string(e.unread) + " make no sense");
  }
  return epoch;
}

UvmEpoch UvmKmod::next_epoch() {
  UvmEpoch epoch = read(PHOS_KMOD_NEXT_EPOCH);
  if (!epoch.doubt().empty()) {
    log(LogLevel::kWarn, "track", "managed memory of process %d may all be dirty: %s", pid_,
        epoch.doubt().c_str());
  }
  return epoch;
}

UvmEpoch UvmKmod::so_far() {
  return read(PHOS_KMOD_SO_FAR);
}

}  // namespace phos
