// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/config.h"

#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <boost/program_options.hpp>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <limits>
#include <optional>
#include <set>
#include <sstream>
#include <thread>

#include "gpu-tracker/abi/protocol.h"

namespace phos {
namespace {

namespace po = boost::program_options;

// By default a quarter of the machine's memory, which a node with several GPUs can spare, and no
// more than it takes to keep a few copies under way.
constexpr uint64_t kPoolDivisor = 4, kPoolMax = uint64_t{16} << 30;
constexpr unsigned kMaxSessions = 4096;
constexpr unsigned kMaxIdleSeconds = 365 * 24 * 3600;
constexpr unsigned kMaxCompressThreads = 1024, kDefaultCompressThreads = 16;

Error usage(const std::string& what) {
  return Error(Domain::kUsage, EINVAL, what);
}

uint64_t machine_memory() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

Result<unsigned> parse_number(const std::string& text, unsigned min, unsigned max) {
  unsigned value = 0;
  const char* last = text.data() + text.size();
  auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc() || end != last || value < min || value > max) {
    return usage("must be a whole number from " + std::to_string(min) + " to " +
                 std::to_string(max));
  }
  return value;
}

Result<double> parse_percentage(std::string text) {
  if (!text.empty() && text.back() == '%') text.pop_back();
  double value = 0;
  const char* last = text.data() + text.size();
  auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc() || end != last || !(value >= 0 && value <= 100)) {
    return usage("must be a percentage from 0 to 100");
  }
  return value;
}

Result<LogLevel> parse_level(const std::string& text) {
  if (text == "error") return LogLevel::kError;
  if (text == "warning") return LogLevel::kWarn;
  if (text == "info") return LogLevel::kInfo;
  if (text == "debug") return LogLevel::kDebug;
  return usage("must be error, warning, info or debug");
}

Result<TrackerChoice> parse_tracker(const std::string& text) {
  if (text == "auto") return TrackerChoice::kAuto;
  if (text == "activity") return TrackerChoice::kActivity;
  if (text == "content") return TrackerChoice::kContent;
  if (text == "verify") return TrackerChoice::kVerify;
  return usage("must be auto, activity, content or verify");
}

Result<bool> parse_auto(const std::string& text) {
  if (text == "auto") return true;
  if (text == "off") return false;
  return usage("must be auto or off");
}

Result<bool> parse_switch(const std::string& text) {
  if (text == "on") return true;
  if (text == "off") return false;
  return usage("must be on or off");
}

Result<bool> parse_read_ahead(const std::string& text) {
  if (text == "gpu") return true;
  if (text == "host") return false;
  return usage("must be gpu or host");
}

// phosd's working directory is the root directory.
Result<std::string> parse_file(const std::string& text) {
  if (text.empty() || text[0] != '/') return usage("must be an absolute path");
  return text;
}

// As many as a dump may take of a machine that has other things to do.
unsigned default_compress_threads() {
  return std::clamp(std::thread::hardware_concurrency() / 2, 1u, kDefaultCompressThreads);
}

template <typename T>
Result<void> assign(Result<T> parsed, T* to) {
  if (!parsed) return parsed.error();
  *to = *parsed;
  return {};
}

Result<void> set_socket(const std::string& path, DaemonConfig* config) {
  if (path.empty() || path[0] != '/') return usage("must be an absolute path");
  if (path.size() >= sizeof(sockaddr_un::sun_path)) {
    return usage("must be shorter than " + std::to_string(sizeof(sockaddr_un::sun_path)) +
                 " characters");
  }
  config->socket = path;
  return {};
}

Result<void> set_idle_timeout(const std::string& text, DaemonConfig* config) {
  auto seconds = parse_number(text, 0, kMaxIdleSeconds);
  if (!seconds) return seconds.error();
  config->idle_timeout = std::chrono::seconds(*seconds);
  return {};
}

struct Setting {
  const char* name;
  const char* help;
  Result<void> (*set)(const std::string& text, DaemonConfig* config);
};

constexpr Setting kSettings[] = {
    {"socket", "path of the socket (default: " PHOS_RUN_DIR "/" PHOS_SOCKET_NAME ")", set_socket},
    {"pool-size",
     "pinned host memory for copying: bytes, with K, M, G or T, or N% of the machine's memory "
     "(default: 25%, at most 16G)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_size(text, machine_memory()), &config->pool_size);
     }},
    {"idle-timeout", "leave after so many seconds without work; 0: never (default: 300)",
     set_idle_timeout},
    {"max-sessions", "dumps and restores at once (default: 32)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_number(text, 1, kMaxSessions), &config->max_sessions);
     }},
    {"max-slowdown",
     "percent that copying may slow a running process down by; 0: no limit (default: 3)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_percentage(text), &config->max_slowdown);
     }},
    {"tracker", "how memory is followed: auto, activity, content or verify (default: content)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_tracker(text), &config->tracker);
     }},
    {"release",
     "auto: GPU memory is saved by phos alone where that can be; off: by the driver too "
     "(default: auto)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_auto(text), &config->release);
     }},
    {"compress",
     "how pages of GPU memory are stored: none, zstd, zstd:LEVEL or lz4 (default: none)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_compression(text), &config->compress);
     }},
    {"compress-threads",
     "threads that a dump compresses and encrypts with (default: half the processors, at most 16)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_number(text, 1, kMaxCompressThreads), &config->compress_threads);
     }},
    {"key-file", "key that images are encrypted with: 32 bytes or 64 hexadecimal digits",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_file(text), &config->key_file);
     }},
    {"encrypt", "on: phos's images are encrypted with the key of key-file (default: off)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_switch(text), &config->encrypt);
     }},
    {"durability",
     "disk: images are durable when a dump is done; memory: some time later (default: disk)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_durability(text), &config->durability);
     }},
    {"direct-storage",
     "auto: saved pages go from the disk into GPU memory where that can be; off: through host "
     "memory (default: off)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_auto(text), &config->direct_storage);
     }},
    {"read-ahead",
     "where a restore's pages wait for their process: gpu, memory of the GPU that is free, or host "
     "(default: gpu)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_read_ahead(text), &config->read_ahead_to_gpu);
     }},
    {"log-level", "error, warning, info or debug (default: info)",
     [](const std::string& text, DaemonConfig* config) {
       return assign(parse_level(text), &config->log_level);
     }},
};

po::options_description setting_options() {
  po::options_description options("Settings, also keys of the configuration file");
  for (const Setting& s : kSettings) {
    options.add_options()(s.name, po::value<std::string>()->value_name("VALUE"), s.help);
  }
  return options;
}

po::options_description command_options() {
  po::options_description options("Options");
  options.add_options()("foreground", "stay in the foreground and log to standard error");
  options.add_options()("config", po::value<std::string>()->value_name("FILE"),
                        "configuration file (default: " PHOS_CONFIG_FILE ")");
  options.add_options()("help,h", "print this text");
  options.add_options()("version,V", "print the version");
  return options;
}

Result<void> apply_values(const po::variables_map& values, DaemonConfig* config) {
  for (const Setting& s : kSettings) {
    if (!values.count(s.name)) continue;
    const std::string& text = values[s.name].as<std::string>();
    if (auto r = s.set(text, config); !r) {
      return usage(std::string(s.name) + " = '" + text + "': " + r.error().message());
    }
  }
  return {};
}

// The key of `line` as the flag is spelt: the file may say pool_size.
std::string with_dashes(std::string line) {
  std::replace(line.begin(),
               line.begin() + static_cast<long>(std::min(line.find('='), line.size())), '_', '-');
  return line;
}

// One line at a time, since Boost does not tell which one it dislikes. `seen`: keys so far.
Result<void> read_line(const std::string& line, std::set<std::string>* seen, DaemonConfig* config) {
  if (line.find_first_not_of(" \t") != std::string::npos &&
      line[line.find_first_not_of(" \t")] == '[') {
    return usage("there are no sections");
  }
  po::variables_map values;
  const po::options_description options = setting_options();
  std::istringstream in(with_dashes(line));
  try {
    po::store(po::parse_config_file(in, options), values);
  } catch (const po::unknown_option& e) {
    return usage("there is no setting '" + e.get_option_name() + "'");
  } catch (const po::error&) {
    return usage("'" + line + "' is not of the form KEY = VALUE");
  }
  for (const auto& value : values) {
    if (!seen->insert(value.first).second) return usage(value.first + " is set a second time");
  }
  return apply_values(values, config);
}

}  // namespace

Result<uint64_t> parse_size(const std::string& text, uint64_t ram) {
  const Error error = usage(
      "must be a number of bytes, a number with K, M, G or T, or a percentage of the machine's "
      "memory from 1% to 90%");
  uint64_t value = 0;
  const char* last = text.data() + text.size();
  auto [end, failed] = std::from_chars(text.data(), last, value);
  if (failed != std::errc() || last - end > 1) return error;
  if (end == last) return value;
  if (*end == '%') {
    if (value < 1 || value > 90) return error;
    return static_cast<uint64_t>(static_cast<double>(ram) / 100 * static_cast<double>(value));
  }
  const size_t unit = std::string("KMGT").find(*end);
  if (unit == std::string::npos) return error;
  const unsigned shift = 10 * (static_cast<unsigned>(unit) + 1);
  if (value > std::numeric_limits<uint64_t>::max() >> shift) return error;
  return value << shift;
}

DaemonConfig default_config(const std::string& run_dir) {
  DaemonConfig config;
  config.run_dir = run_dir.empty() ? PHOS_RUN_DIR : run_dir;
  config.socket = config.run_dir + "/" PHOS_SOCKET_NAME;
  config.pool_size = std::min(machine_memory() / kPoolDivisor, kPoolMax);
  config.compress_threads = default_compress_threads();
  return config;
}

Result<void> read_config_file(const std::string& path, DaemonConfig* config) {
  std::ifstream in(path);
  if (!in) return Error::from_errno(errno, "opening " + path);
  std::set<std::string> seen;
  unsigned number = 0;
  for (std::string line; std::getline(in, line);) {
    number++;
    if (auto r = read_line(line, &seen, config); !r) {
      return r.error().wrap(path + ":" + std::to_string(number));
    }
  }
  if (in.bad()) return Error(Domain::kErrno, EIO, "reading " + path + " failed");
  return {};
}

Result<DaemonCommandLine> parse_daemon_command_line(const std::vector<std::string>& args,
                                                    const std::string& run_dir) {
  DaemonCommandLine result;
  po::options_description all;
  all.add(setting_options()).add(command_options());
  po::variables_map values;
  const int style = po::command_line_style::unix_style & ~po::command_line_style::allow_guessing;
  try {
    const po::positional_options_description no_words;
    po::store(po::command_line_parser(args).options(all).positional(no_words).style(style).run(),
              values);
  } catch (const po::too_many_positional_options_error&) {
    return usage("there is a word too many on the command line; see phosd --help");
  } catch (const po::error& e) {
    return usage(std::string(e.what()) + "; see phosd --help");
  }
  result.help = values.count("help") != 0;
  result.version = values.count("version") != 0;
  result.foreground = values.count("foreground") != 0;
  if (result.help || result.version) return result;

  result.config = default_config(run_dir);
  const bool named = values.count("config") != 0;
  const std::string file = named             ? values["config"].as<std::string>()
                           : run_dir.empty() ? PHOS_CONFIG_FILE
                                             : run_dir + "/" PHOS_CONFIG_NAME;
  if (named || access(file.c_str(), F_OK) == 0) {
    if (auto r = read_config_file(file, &result.config); !r) return r.error();
  }
  if (auto r = apply_values(values, &result.config); !r) return r.error();
  if (result.config.encrypt && result.config.key_file.empty()) {
    return usage("encrypt = on needs a key: set key-file in " + file);
  }
  return result;
}

std::string daemon_usage() {
  std::ostringstream out;
  out << "Usage: phosd [options]\n\n"
         "The daemon that CRIU's phos plugin talks to, one on each machine. The plugin starts it\n"
         "when none runs; see phosd(8).\n\n"
      << command_options() << "\n"
      << setting_options();
  return out.str();
}

}  // namespace phos
