// SPDX-License-Identifier: GPL-2.0-only
// Managed memory made through /dev/nvidia-uvm as libcuda makes it, but without libcuda or a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace uvm_test {

constexpr size_t kPage = 4096;
constexpr size_t kChunk = 2 << 20;           // what nvidia-uvm handles as one block, at most
constexpr uintptr_t kAddress = 0x200000000;  // where nothing else is

// One process's address space in nvidia-uvm. May be used by several threads.
class Space {
 public:
  static phos::Result<Space> make();

  // A managed range at this address (a multiple of kPage), which must be free. munmap() ends it.
  phos::Result<uint8_t*> map(uintptr_t address, size_t size) const;

  // Takes all permission to write to it away; the next write to a page is a fault.
  phos::Result<void> revoke_writes(const void* address, size_t size) const;
  // Maps it for writing on the CPU, all at once.
  phos::Result<void> migrate(const void* address, size_t size) const;
  // The same in two steps: what the driver is to be told, and a copy of that, anywhere.
  static std::vector<uint8_t> migration(const void* address, size_t size);
  phos::Result<void> migrate(void* migration) const;
  // Writes as a debugger does.
  phos::Result<void> write_as_debugger(void* address, const void* data, size_t size) const;

  // What nvidia-uvm knows it by.
  int fd() const { return fd_.get(); }

 private:
  phos::Result<void> call(unsigned long command, void* parameters, const int32_t* status,
                          const char* what) const;

  phos::UniqueFd fd_, mm_fd_;
};

}  // namespace uvm_test
