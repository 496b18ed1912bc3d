// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/command.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <iostream>

namespace phos::cli {

namespace po = boost::program_options;

Result<Parsed> parse(Syntax& syntax, const std::vector<std::string>& args) {
  Parsed parsed;
  std::vector<std::string> own = args;
  if (syntax.takes_criu_options) {
    auto dashes = std::find(own.begin(), own.end(), "--");
    if (dashes != own.end()) parsed.criu_options.assign(dashes + 1, own.end());
    own.erase(dashes, own.end());
  }
  syntax.options.add_options()("help,h", "print this text");
  po::options_description all = syntax.options;
  po::positional_options_description words;
  if (!syntax.positional.empty()) {
    words.add(syntax.positional.c_str(), -1);
    all.add_options()(syntax.positional.c_str(), po::value<std::vector<std::string>>());
  }
  // No guessing: a script that abbreviates would change its meaning with the next option.
  int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
  std::string see = "; see `phos " + syntax.command + " --help`";
  try {
    po::store(po::command_line_parser(own).options(all).positional(words).style(style).run(),
              parsed.values);
    if (parsed.has("help")) {
      std::cout << "Usage: phos " << syntax.command << " " << syntax.usage << "\n\n"
                << syntax.about << "\nOptions:\n"
                << syntax.options;
      parsed.help = true;
      return parsed;
    }
    po::notify(parsed.values);
  } catch (const po::too_many_positional_options_error&) {
    return Error(Domain::kUsage, EINVAL, "there is a word too many on the command line" + see);
  } catch (const po::error& e) {
    return Error(Domain::kUsage, EINVAL, e.what() + see);
  }
  return parsed;
}

void add_jobs(Syntax& syntax, const char* what) {
  const std::string text = std::string("threads that ") + what +
                           "; as many as there are processors, 4 at least, unless given";
  syntax.options.add_options()("jobs,j", po::value<int>()->value_name("N"), text.c_str());
}

Result<unsigned> jobs_of(const Parsed& parsed) {
  constexpr int kMaxJobs = 1024;
  if (!parsed.has("jobs")) return 0u;
  const int jobs = parsed.values["jobs"].as<int>();
  if (jobs >= 1 && jobs <= kMaxJobs) return static_cast<unsigned>(jobs);
  return Error(Domain::kUsage, EINVAL, "--jobs must be from 1 to " + std::to_string(kMaxJobs));
}

int fail(const std::string& command, const std::string& message, int code) {
  fprintf(stderr, "phos %s: %s\n", command.c_str(), message.c_str());
  return code;
}

std::string format_bytes(uint64_t bytes) {
  static const char* const kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1023.95 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    unit++;
  }
  char text[32];
  snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", value, kUnits[unit]);
  return text;
}

}  // namespace phos::cli
