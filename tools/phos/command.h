// SPDX-License-Identifier: GPL-2.0-only
// What every phos command shares: its entry in the table, its options, its way to fail.
#pragma once

#include <boost/program_options.hpp>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"

namespace phos::cli {

inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;

// `args` are the words after the command's name. Returns the exit code.
int run_dump(const std::vector<std::string>& args);
int run_pre_dump(const std::vector<std::string>& args);
int run_restore(const std::vector<std::string>& args);
int run_status(const std::vector<std::string>& args);
int run_show(const std::vector<std::string>& args);
int run_verify(const std::vector<std::string>& args);
int run_diff(const std::vector<std::string>& args);
int run_squash(const std::vector<std::string>& args);
int run_rebase(const std::vector<std::string>& args);
int run_gc(const std::vector<std::string>& args);
int run_extract(const std::vector<std::string>& args);
int run_check(const std::vector<std::string>& args);
int run_daemon(const std::vector<std::string>& args);

// What a command accepts, for parsing and for its --help.
struct Syntax {
  std::string command;              // "dump"
  std::string usage;                // "-t PID -D DIR [options] [-- criu options]"
  std::string about;                // a few lines on what the command does
  std::string positional;           // option that takes words without a dash; empty: none are taken
  bool takes_criu_options = false;  // words after "--"
  boost::program_options::options_description options;
};

struct Parsed {
  boost::program_options::variables_map values;
  std::vector<std::string> criu_options;
  bool help = false;  // the help text was printed; nothing else is to be done

  bool has(const char* name) const { return values.count(name) != 0; }
  // The words without a dash, which Syntax::positional took.
  std::vector<std::string> words(const char* positional) const {
    if (!has(positional)) return {};
    return values[positional].as<std::vector<std::string>>();
  }
};

// Adds --jobs, and reads it: threads, 0 if it was not given.
void add_jobs(Syntax& syntax, const char* what);
Result<unsigned> jobs_of(const Parsed& parsed);

Result<Parsed> parse(Syntax& syntax, const std::vector<std::string>& args);

// Prints "phos COMMAND: message" to stderr and returns `code`.
int fail(const std::string& command, const std::string& message, int code = kExitFailed);

// "1.5 GiB".
std::string format_bytes(uint64_t bytes);

}  // namespace phos::cli
