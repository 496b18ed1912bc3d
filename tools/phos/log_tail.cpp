// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/log_tail.h"

namespace phos::cli {

void LogTail::poll(const std::function<void(const std::string&)>& line) {
  if (!in_.is_open()) in_.open(path_);
  if (!in_.is_open()) return;
  in_.clear();  // the end of the last time is not the end any more
  char buf[8192];
  while (in_.read(buf, sizeof buf), in_.gcount() > 0) {
    partial_.append(buf, static_cast<size_t>(in_.gcount()));
    size_t start = 0;
    for (size_t end; (end = partial_.find('\n', start)) != std::string::npos; start = end + 1) {
      line(partial_.substr(start, end - start));
    }
    partial_.erase(0, start);
  }
}

std::string plugin_text(const std::string& line) {
  size_t at = line.find("phos:");
  return at == std::string::npos ? "" : line.substr(at);
}

std::string error_text(const std::string& line) {
  // "(00.012345) Error (criu/seize.c:123): text", with the pid of a task before Error at times.
  size_t at = line.find("Error (");
  if (at == std::string::npos) return "";
  if (line.find_first_not_of("(0123456789.) :", 0) != at) return "";
  // Where CAP_SYS_RESOURCE is missing CRIU says this first of all, and goes on.
  if (line.find("Can't setup RLIMIT_NOFILE") != std::string::npos) return "";
  return line.substr(at);
}

}  // namespace phos::cli
