// SPDX-License-Identifier: GPL-2.0-only
// The gate's breakpoints in CRIU's images.
//
// The gate stays armed from before a dump freezes the process until it is gone or has its memory
// back: whenever CRIU dies and the kernel lets the threads go, they park. So the copies of
// libcuda's code that CRIU saves hold breakpoints (int3), behind which there is no uprobe in a
// restored process. They are taken out before it executes anything.
#pragma once

#include <cstddef>

#include "gpu-tracker/base/result.h"

namespace phos {

// Puts back, at every place at which a gate may have a probe, the byte that libcuda's file has, if
// there is a breakpoint instead. For a process that CRIU has restored and not let go yet, also one
// that does not use CUDA: forked children have copies. Of every libcuda in it: the gate closes only
// where there is one, but a second may have come since. Returns how many there were; 0 if the
// process has no libcuda. An error: some may be left, and it must not run.
Result<size_t> remove_left_probes(int pid);

// Has CRIU save the pages with the probes that are there now. The kernel puts a probe into a copy
// of the page without marking it as written to (soft-dirty): a dump on top of a pre-dump would look
// for such pages in the pre-dump, which has none, and fail. Writes a byte of each page that is
// there already. The process may run; nothing but probes may come and go in libcuda's code. An
// error: the kernel refuses to write (CONFIG_PROC_MEM_NO_FORCE), remove_left_probes() could not
// either, and the probes must not get into an image.
Result<void> mark_probed_pages(int pid);

}  // namespace phos
