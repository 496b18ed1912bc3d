// SPDX-License-Identifier: GPL-2.0-only
#include "test/uvm/managed.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace uvm_test {
namespace {

using phos::Domain;
using phos::Error;
using phos::Result;
using phos::UniqueFd;

constexpr char kDevice[] = "/dev/nvidia-uvm";

// nvidia-uvm's commands are plain numbers. `status` is an NV_STATUS, 0 for success.
constexpr unsigned long kInitialize = 0x30000001, kMmInitialize = 75, kValidateRange = 72,
                        kEnableReadDuplication = 44, kDisableReadDuplication = 45, kMigrate = 51,
                        kToolsWrite = 63;

struct Initialize {
  uint64_t flags;
  int32_t status;
};
struct MmInitialize {
  int32_t uvm_fd;
  int32_t status;
};
struct Range {  // of several commands
  uint64_t base, length;
  int32_t status;
};
struct Migrate {
  uint64_t base, length;
  uint8_t destination[16];
  uint32_t flags;
  uint64_t semaphore_address;
  uint32_t semaphore_payload;
  int32_t cpu_node;
  uint64_t user_space_start, user_space_length;
  int32_t status;
};
struct ToolsWrite {
  uint64_t buffer, size, target, written;
  int32_t status;
};
// The CPU's name in nvidia-uvm.
constexpr uint8_t kCpu[16] = {0xa6, 0x5e, 0x0f, 0x4e, 0xd7, 0xd4, 0x7b, 0xa2,
                              0x50, 0x47, 0x41, 0x2c, 0x14, 0x2a, 0x77, 0x73};

uint64_t number(const void* p) {
  return reinterpret_cast<uintptr_t>(p);
}

}  // namespace

Result<void> Space::call(unsigned long command, void* parameters, const int32_t* status,
                         const char* what) const {
  const int fd = command == kMmInitialize ? mm_fd_.get() : fd_.get();
  if (ioctl(fd, command, parameters) != 0) return Error::from_errno(errno, what);
  if (*status != 0) {
    return Error(Domain::kFormat, *status,
                 std::string(what) + ": nvidia-uvm answers " + std::to_string(*status));
  }
  return {};
}

Result<Space> Space::make() {
  Space space;
  space.fd_ = UniqueFd(open(kDevice, O_RDWR | O_CLOEXEC));
  space.mm_fd_ = UniqueFd(open(kDevice, O_RDWR | O_CLOEXEC));
  if (!space.fd_ || !space.mm_fd_) return Error::from_errno(errno, kDevice);
  Initialize initialize = {};
  if (auto r = space.call(kInitialize, &initialize, &initialize.status, "UVM_INITIALIZE"); !r) {
    return r.error();
  }
  MmInitialize mm = {space.fd_.get(), 0};
  if (auto r = space.call(kMmInitialize, &mm, &mm.status, "UVM_MM_INITIALIZE"); !r) {
    return r.error();
  }
  return space;
}

Result<uint8_t*> Space::map(uintptr_t address, size_t size) const {
  void* p = mmap(reinterpret_cast<void*>(address), size, PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_FIXED_NOREPLACE, fd_.get(), static_cast<off_t>(address));
  if (p == MAP_FAILED) return Error::from_errno(errno, "mapping managed memory");
  Range range = {address, size, 0};
  if (auto r = call(kValidateRange, &range, &range.status, "UVM_VALIDATE_VA_RANGE"); !r) {
    return r.error();
  }
  return static_cast<uint8_t*>(p);
}

Result<void> Space::revoke_writes(const void* address, size_t size) const {
  Range range = {number(address), size, 0};
  auto r = call(kEnableReadDuplication, &range, &range.status, "UVM_ENABLE_READ_DUPLICATION");
  if (!r) return r;
  return call(kDisableReadDuplication, &range, &range.status, "UVM_DISABLE_READ_DUPLICATION");
}

std::vector<uint8_t> Space::migration(const void* address, size_t size) {
  Migrate migrate = {};
  migrate.base = number(address);
  migrate.length = size;
  memcpy(migrate.destination, kCpu, sizeof kCpu);
  const auto* bytes = reinterpret_cast<const uint8_t*>(&migrate);
  return {bytes, bytes + sizeof migrate};
}

Result<void> Space::migrate(void* migration) const {
  auto* migrate = static_cast<Migrate*>(migration);
  return call(kMigrate, migrate, &migrate->status, "UVM_MIGRATE");
}

Result<void> Space::migrate(const void* address, size_t size) const {
  return migrate(migration(address, size).data());
}

Result<void> Space::write_as_debugger(void* address, const void* data, size_t size) const {
  ToolsWrite write = {number(data), size, number(address), 0, 0};
  return call(kToolsWrite, &write, &write.status, "UVM_TOOLS_WRITE_PROCESS_MEMORY");
}

}  // namespace uvm_test
