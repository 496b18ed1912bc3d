// SPDX-License-Identifier: GPL-2.0-only
// Where the probes of gates are pinned while memory is away (gate/gate.h), so that they outlive a
// phosd that is killed: a file each in a BPF file system, named after the process's pid and start
// time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos {

class GatePins {
 public:
  // `bpffs`: where the system has its own, if it has; else phosd mounts one at `run_dir`/bpf.
  explicit GatePins(const std::string& run_dir, const std::string& bpffs = "/sys/fs/bpf");

  // Makes the directory for new pins, and says where one of this process is to be. ENOTSUP: there
  // is no BPF file system, nor can one be mounted that outlives this process.
  Result<std::string> place_for(int pid) const;

  // The pin that a phosd which died has left of this process, as it was found; empty: none.
  std::string find(int pid) const;

  // Removes those of processes that have ended.
  void remove_stale() const;

  // Unmounts phosd's own BPF file system, unless a pin is in it. Nobody is to make one any more.
  void leave() const;

 private:
  std::string bpffs_;                     // of the system
  std::vector<std::string> directories_;  // in the system's, and phosd's own
};

}  // namespace phos
