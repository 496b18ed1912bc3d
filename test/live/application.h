// SPDX-License-Identifier: GPL-2.0-only
// A CUDA process that does to its device memory all that is hard on whoever copies it meanwhile:
// pages go A, B, A; work of several streams overlaps; memory is freed, and other memory comes to
// its address. What it does follows from a seed; when it does it does not.
//
// Commands on stdin, replies on stdout: "ok [value]" or "error TEXT".
//   pause                      its threads stop between two calls; the GPU may be busy
//   resume
//   read ADDRESS SIZE FILE     the memory's bytes to FILE, as the driver hands them out; replies
//   the
//                              buffer id, 0: no such memory
//   peek ADDRESS SIZE FILE     the same past the lock of the driver; only on the simulation
//   count                      how many calls were made
#pragma once

#include <string>

namespace live_test {

// `arguments`: "SEED,THREADS". Returns when stdin ends.
int run_application(const std::string& arguments);

}  // namespace live_test
