// SPDX-License-Identifier: GPL-2.0-only
#include "tools/criu/front_end.h"

#include <cerrno>
#include <cstdlib>
#include <fstream>

#include "tools/criu/command_line.h"
#include "tools/criu/locate.h"
#include "tools/criu/plugin_dir.h"
#include "tools/criu/plugins.h"

namespace phos::criu {
namespace {

// The file that makes `criu swrk` ignore CRIU_LIBS_DIR, or "".
std::string config_with_libdir() {
  std::string files[3] = {"/etc/criu/default.conf", "", ""};
  if (const char* home = getenv("HOME")) files[1] = std::string(home) + "/.criu/default.conf";
  if (const char* named = getenv("CRIU_CONFIG_FILE")) files[2] = named;
  for (const std::string& file : files) {
    if (file.empty()) continue;
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
      size_t at = line.find_first_not_of(" \t");
      if (at != std::string::npos && line.compare(at, 6, "libdir") == 0) return file;
    }
  }
  return "";
}

// The directory that holds the plugins `line` enables and no other.
Result<std::string> plugin_dir(const CommandLine& line, const std::string& self_dir) {
  if (line.has_libdir) {
    return Error(Domain::kUsage, EINVAL,
                 "--enable-plugin and -L/--libdir exclude each other: criu loads plugins from one "
                 "directory; leave one of them out");
  }
  auto plugins = find_plugins(line.plugins, plugin_dirs(self_dir));
  if (!plugins) return plugins.error();
  if (line.command == "swrk") {
    if (std::string file = config_with_libdir(); !file.empty()) {
      return Error(Domain::kUsage, EINVAL,
                   file +
                       " sets libdir, which overrides --enable-plugin for swrk; remove that "
                       "line or leave out --enable-plugin");
    }
  }
  return plugin_dir_for(*plugins);
}

}  // namespace

Result<Invocation> prepare(const std::vector<std::string>& argv, const std::string& self_dir) {
  auto line = parse_command_line(argv);
  if (!line) return line.error();
  Invocation start;
  start.args = line->args;
  start.prints_help = line->help && line->command != "swrk";
  if (!line->plugins.empty() && !start.prints_help) {
    auto dir = plugin_dir(*line, self_dir);
    if (!dir) return dir.error();
    if (line->is_rpc()) {
      start.libs_dir = *dir;
    } else {
      start.args.insert(start.args.begin() + static_cast<long>(line->libdir_at), {"-L", *dir});
    }
  }
  auto path = find_stock_criu(self_dir);
  if (!path) return path.error();
  start.path = *path;
  return start;
}

}  // namespace phos::criu
