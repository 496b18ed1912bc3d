// SPDX-License-Identifier: GPL-2.0-only
// Signals that would end the program and leave half of what it writes: work is ended in order
// instead.
#pragma once

#include "gpu-tracker/base/result.h"

namespace phos::cli {

// From now on SIGINT, SIGTERM and SIGHUP only make check_interrupted() fail. One that is ignored
// (nohup) stays so.
void catch_interrupts();

// Error EINTR once there was one. Any thread.
Result<void> check_interrupted();

}  // namespace phos::cli
