// SPDX-License-Identifier: GPL-2.0-only
// The whole translation: from a criu command line with --enable-plugin to what starts stock criu.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::criu {

struct Invocation {
  std::string path;               // stock criu
  std::vector<std::string> args;  // args[0] is the caller's argv[0]
  std::string libs_dir;           // value for CRIU_LIBS_DIR; empty: leave the environment alone
  bool prints_help = false;       // criu will print its help text and end
};

// `self_dir`: directory of the running program. Errors: Domain::kCriu when there is no stock criu,
// Domain::kUsage or kErrno when the command line or a plugin is at fault.
Result<Invocation> prepare(const std::vector<std::string>& argv, const std::string& self_dir);

}  // namespace phos::criu
