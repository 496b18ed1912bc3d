// SPDX-License-Identifier: GPL-2.0-only
// A CUDA process whose threads do nothing but allocate and free device memory, in each way of which
// phos takes handles. Commands on stdin, replies on stdout: "ok [value]" or "error TEXT".
//   count      how many calls were made
//   slowest    microseconds of the slowest call that freed memory since this was asked
#pragma once

#include <string>

namespace live_test {

// Returns when stdin ends.
int run_churn(int threads);

}  // namespace live_test
