// SPDX-License-Identifier: GPL-2.0-only
// The process whose threads are parked: this binary once more, told by a contract::Worker what its
// threads are to do. The thread that reads the commands does not call CUDA after the start.
#pragma once

namespace gate_test {

// Reads commands from stdin until its end; replies "ok [value]" or "error CUresult".
int run_target();

}  // namespace gate_test
