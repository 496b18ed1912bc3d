// SPDX-License-Identifier: GPL-2.0-only
// Takes --enable-plugin out of a criu command line and leaves everything else as it was.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::criu {

struct CommandLine {
  std::vector<std::string> args;     // argv without --enable-plugin; args[0] is argv[0]
  std::vector<std::string> plugins;  // names as given, in order, each once
  std::string command;               // "dump", "swrk", ...; empty: none given
  size_t libdir_at = 1;              // where "-L DIR" goes in args
  bool has_libdir = false;           // the user gave -L or --libdir
  bool help = false;                 // criu will print its help text

  // Modes whose options come by RPC: they are told of the plugins by CRIU_LIBS_DIR.
  bool is_rpc() const { return command == "swrk" || command == "service" || command == "rpc"; }
};

// Follows getopt_long's rules (permutation, clusters of short options, abbreviated long options),
// so that --enable-plugin in the place of another option's value stays that value.
// Fails when --enable-plugin has no value.
Result<CommandLine> parse_command_line(const std::vector<std::string>& argv);

}  // namespace phos::criu
