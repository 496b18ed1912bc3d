// SPDX-License-Identifier: GPL-2.0-only
// Reads a log file while another process writes it.
#pragma once

#include <fstream>
#include <functional>
#include <string>

namespace phos::cli {

class LogTail {
 public:
  explicit LogTail(std::string path) : path_(std::move(path)) {}

  // Calls `line` for each complete line that was added since the last call. The file need not
  // exist.
  void poll(const std::function<void(const std::string&)>& line);

 private:
  std::string path_;
  std::ifstream in_;
  std::string partial_;
};

// The text from "phos:" on if `line` of criu's log comes from the plugin, else "".
std::string plugin_text(const std::string& line);

// The text from "Error" on if `line` of criu's log is an error, else "".
std::string error_text(const std::string& line);

}  // namespace phos::cli
