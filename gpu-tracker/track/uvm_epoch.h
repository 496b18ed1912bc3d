// SPDX-License-Identifier: GPL-2.0-only
// What happened to one process's managed memory in an epoch, as a tracker has recorded it.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/abi/uvm.h"

namespace phos {

class UvmEpoch {
 public:
  // Why the record may lack something, one line; then all memory may be dirty. Empty: it is
  // complete.
  const std::string& doubt() const { return doubt_; }

  // May any byte of [address, address + size) have been written to, provided that all permission
  // to write was revoked when the epoch had begun? True, too, where a range was made or has gone.
  bool maybe_dirty(uint64_t address, uint64_t size) const;

  // Pages that the process or a GPU was granted permission to write to, or a debugger wrote to;
  // whether or not they are mapped any more.
  size_t granted_pages() const;
  // [first, second): made or gone, by their addresses.
  const std::vector<std::pair<uint64_t, uint64_t>>& ranges() const { return ranges_; }

  // For those who record: a record with its key.
  void add(uint64_t key, const phos_uvm_record& record);
  void add_doubt(const std::string& doubt);

 private:
  using Pages = std::bitset<PHOS_UVM_WORDS * 64>;
  std::map<uint64_t, Pages> chunks_;  // by the address of each 2 MiB
  std::vector<std::pair<uint64_t, uint64_t>> ranges_;
  std::string doubt_;
};

}  // namespace phos
