// SPDX-License-Identifier: GPL-2.0-only
// The process that is watched: this binary once more, told by a contract::Worker what to call.
#pragma once

namespace track_test {

// Reads commands from stdin until its end; replies "ok [value]" or "error CUresult".
int run_target();

}  // namespace track_test
