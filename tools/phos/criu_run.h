// SPDX-License-Identifier: GPL-2.0-only
// Runs criu as a child, as the criu front end would: progress from its log, signals passed on,
// reasons of failure.
#pragma once

#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "tools/criu/front_end.h"

namespace phos::cli {

struct CriuRun {
  std::vector<std::string> args;  // after the program's name
  std::string log_path;           // the log that criu writes
  std::string title;              // for the progress line: "dump of 123 (python3)"
  bool verbose = false;           // print each line of the plugin to stderr
};

struct CriuExit {
  int code = 0;         // exit code, or -signal that ended criu
  int interrupted = 0;  // signal that this command received meanwhile; 0: none
  double seconds = 0;   // wall time
  std::string output;   // what criu printed to stdout and stderr: errors before it opened its log
};

// What `run` will start. Fails when criu or the plugin is not installed, or `args` contradict it.
// Made by the front end's own code, so no second program has to lie in the right place.
Result<criu::Invocation> prepare_criu(const CriuRun& run);

// Waits for criu to end. SIGINT and SIGTERM are passed on to it (once: those of a terminal reach it
// by themselves). On a terminal a line on stderr shows the phase.
Result<CriuExit> run_criu(const CriuRun& run, const criu::Invocation& start);

// The first `max` error lines of criu's log, without time stamps.
std::vector<std::string> log_errors(const std::string& log_path, size_t max);

// Prints why criu failed and where its log is, to stderr. `what`: "dumping process 123".
void report_failure(const std::string& command, const std::string& what, const CriuRun& run,
                    const CriuExit& exit);

}  // namespace phos::cli
