// SPDX-License-Identifier: GPL-2.0-only
// What phosd can be told: flags, and a file whose keys are named as the flags are (phosd(8)).
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/daemon/tracker_choice.h"
#include "gpu-tracker/image/durability.h"
#include "gpu-tracker/image/page_codec.h"

namespace phos {

struct DaemonConfig {
  std::string run_dir;  // holds the lock files
  std::string socket;
  uint64_t pool_size = 0;                  // bytes of pinned host memory that sessions share
  std::chrono::seconds idle_timeout{300};  // 0: stays for ever
  unsigned max_sessions = 32;
  double max_slowdown = 3;  // percent of its speed that copying may cost a running process
  TrackerChoice tracker = TrackerChoice::kContent;
  bool release = true;  // GPU memory, before the driver's checkpoint, where that can be
  // Of what is saved of GPU memory; a dump may ask for something else.
  CompressionChoice compress;
  unsigned compress_threads = 1;  // that a dump compresses and encrypts with
  std::string key_file;           // absolute; empty: encrypted images cannot be read or written
  bool encrypt = false;           // a dump may ask for it too, but not for the opposite
  Durability durability = Durability::kDisk;
  // Saved pages go from the disk into GPU memory where that can be. Not by default yet: it has not
  // run on a real GPU.
  bool direct_storage = false;
  bool read_ahead_to_gpu = true;         // pages that are read ahead wait in free GPU memory
  LogLevel log_level = LogLevel::kInfo;  // for the system log; criu's has a level of its own
};

struct DaemonCommandLine {
  DaemonConfig config;
  bool foreground = false;
  bool help = false;
  bool version = false;
};

// The defaults on this machine. `run_dir`: of PHOS_RUN_DIR, empty: none was given.
DaemonConfig default_config(const std::string& run_dir);

// Sets in `config` what the file names. Errors name the file and the line.
Result<void> read_config_file(const std::string& path, DaemonConfig* config);

// `args`: without the program's name. Reads the configuration file too; a flag overrides it. Only
// a file that was asked for must exist.
Result<DaemonCommandLine> parse_daemon_command_line(const std::vector<std::string>& args,
                                                    const std::string& run_dir);

// The flags, for --help.
std::string daemon_usage();

// "4096", "512M", "16G", "25%" (of `ram` bytes) -> bytes. K, M, G, T are powers of 1024.
Result<uint64_t> parse_size(const std::string& text, uint64_t ram);

}  // namespace phos
