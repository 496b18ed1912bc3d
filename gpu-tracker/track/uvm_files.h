// SPDX-License-Identifier: GPL-2.0-only
// The files of nvidia-uvm that a process has open: one for each of its address spaces there, and
// others.
#pragma once

#include <sys/types.h>

#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

struct UvmFiles {
  pid_t pid;
  std::vector<int> descriptors;  // in the process, in order
  // Of this process's own, in the same order. While one is open its address space lives, even when
  // the process has ended.
  std::vector<UniqueFd> copies;

  // ESRCH: there is no such process; ENXIO: it has none open; EPERM: they are not for us.
  static Result<UvmFiles> of(pid_t pid);
  // Has it no others, now?
  bool are_all() const;
};

}  // namespace phos
