// SPDX-License-Identifier: GPL-2.0-only
// libcuda's code in one process: where it is mapped, and which of its functions hold breakpoints.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

class LibraryText {
 public:
  // Of process `pid` as it is now. ENOENT: no libcuda.so is mapped; ENOTSUP: two different ones.
  static Result<LibraryText> find(int pid);
  // However many different ones there are.
  static Result<std::vector<LibraryText>> find_all(int pid);

  // A path under which the library's file can be opened, also where the process's root or the path
  // has changed since.
  const std::string& file() const { return file_; }

  // Does [address] lie in the library's executable mappings?
  bool contains(uint64_t address) const;
  // Where in the file that address is; nothing if it is not the library's.
  std::optional<uint64_t> offset_of(uint64_t address) const;
  // Is this place in the file mapped executable?
  bool maps_offset(uint64_t offset) const;

  // Its addresses in the process.
  std::vector<uint64_t> addresses_of(uint64_t offset) const;

  // Of the instructions at `offsets` (in the file), wherever they are mapped: how many there are,
  // and how many are breakpoints. ESRCH, EIO: the address space is gone.
  struct Breakpoints {
    size_t places = 0, armed = 0;
  };
  Result<Breakpoints> look(const std::vector<uint64_t>& offsets) const;

  // Waits until none is a breakpoint, once the last descriptor of their link has been closed. The
  // kernel removes them before close() returns, unless another descriptor of the link exists: a
  // child of ours that is between fork and exec. Then it is a matter of moments. ETIMEDOUT says
  // that the memory must not be dumped; a process that has ended or become another is clean.
  Result<void> wait_clean(const std::vector<uint64_t>& offsets) const;

  // ESRCH: the process that find() saw has ended.
  Result<void> check_alive() const;

 private:
  struct Range {
    uint64_t start = 0, end = 0, offset = 0;
  };

  explicit LibraryText(int pid) : pid_(pid) {}

  int pid_;
  uint64_t start_time_ = 0;
  std::string file_;
  uint64_t device_ = 0, inode_ = 0;
  std::vector<Range> ranges_;
};

}  // namespace phos
