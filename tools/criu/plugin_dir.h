// SPDX-License-Identifier: GPL-2.0-only
// criu loads every *.so of one directory. This makes a directory that holds the chosen ones only.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "tools/criu/plugins.h"

namespace phos::criu {

// A directory whose *.so files are exactly `plugins`: the one they lie in if that is so already,
// else <state_dir>/plugins/<names>-<hash>, made here (root-owned, mode 0755, symbolic links).
// The same plugins always get the same directory, and it never changes once it is there.
// Where `state_dir` cannot be used safely: a fresh private directory under /tmp.
Result<std::string> plugin_dir_for(const std::vector<Plugin>& plugins,
                                   const std::string& state_dir = "/run/phos");

}  // namespace phos::criu
