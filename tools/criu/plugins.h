// SPDX-License-Identifier: GPL-2.0-only
// Plugin names to files: where plugins lie and how their files are named.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::criu {

struct Plugin {
  std::string name;  // short: "phos" for phos_plugin.so
  std::string dir;   // where it was found
  std::string file;  // its name in `dir`
};

// Directories to search, in order: $PHOS_PLUGIN_PATH, ../lib/criu beside `self_dir`, the directory
// phos was built for, the usual ones of distributions.
std::vector<std::string> plugin_dirs(const std::string& self_dir);

// Finds each of `names` ("phos", "phos_plugin" or "phos_plugin.so"). An unknown name fails with a
// message that lists the known ones.
Result<std::vector<Plugin>> find_plugins(const std::vector<std::string>& names,
                                         const std::vector<std::string>& dirs);

// Names of the *.so files in `dir`, sorted: what criu would load from it. Empty when unreadable.
std::vector<std::string> shared_objects(const std::string& dir);

}  // namespace phos::criu
