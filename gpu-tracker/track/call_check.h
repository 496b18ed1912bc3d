// SPDX-License-Identifier: GPL-2.0-only
// Is a thread of another process inside a call into libcuda? Told from outside, without stopping
// it: return probes would tell too, but make the kernel map an [uprobes] area, which CRIU refuses.
//
// Each thread is looked at while it sleeps; that it has not run meanwhile is known from its count
// of context switches. A call in progress has left on the thread's stack, from the stack pointer
// up: return addresses into libcuda; and above the lowest of these a return address into the code
// that has called it, or, if that code has nothing left to do and has jumped, the thread's start
// routine in glibc's descriptor of the thread, which lies at the top of its stack. So a thread is
// outside when
//  - no word from its stack pointer to the end of its stack points into libcuda's code, or
//  - above the lowest word that does, none points into code but libcuda's and the C library's. Then
//    the thread is one of libcuda's own, which calls no function of the API (a host function that
//    breaks the rules and does is not seen).
// Words that happen to look like code can make a thread seem inside, never outside. Not seen are
// calls that a thread has left by switching stacks: in a signal handler on a stack of its own, or
// in a coroutine, that interrupts the driver and then sleeps.
#pragma once

#include <chrono>

#include "gpu-tracker/base/result.h"

namespace phos {

// Every call into libcuda that was in progress when this was called has ended when it returns.
// Threads are found outside one after the other: what they call afterwards is not the question.
// EBUSY: not within `limit`; some thread runs, is inside, or cannot be judged, and the message says
// which. Reads the stacks of all threads, a fraction of a millisecond for dozens of them.
Result<void> wait_for_calls(int pid, std::chrono::milliseconds limit);

}  // namespace phos
