// SPDX-License-Identifier: GPL-2.0-only
// Runs a program to its end and keeps what it printed.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::cli {

struct Captured {
  int code = 0;        // exit code, or -signal
  std::string output;  // stdout and stderr together
};

// argv[0] is the path to run. Its stdin is empty.
Result<Captured> capture(const std::vector<std::string>& argv);

}  // namespace phos::cli
