// SPDX-License-Identifier: GPL-2.0-only
// The thread of NVIDIA's driver in a process that serves its checkpoints
// (cuCheckpointProcessGetRestoreThreadId): idle nearly always, so that it can be made to call
// functions.
#pragma once

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/inject/remote_thread.h"

namespace phos {

// Stops it where it waits for work, for which it has a second. EBUSY: it does not; ESRCH: the
// process has ended.
Result<RemoteThread> attach_restore_thread(int pid, int tid);

}  // namespace phos
