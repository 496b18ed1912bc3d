// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/session_log.h"

#include <syslog.h>
#include <unistd.h>

#include <cstdio>

namespace phos {
namespace {

thread_local SessionLog* t_current = nullptr;

// By LogLevel.
constexpr int kPriority[] = {LOG_ERR, LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG};

}  // namespace

SessionLog* SessionLog::current() {
  return t_current;
}

void SessionLog::set_pid(int pid) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (pid_ == 0) pid_ = pid;
}

void SessionLog::set_checkpoint(const std::string& id) {
  std::lock_guard<std::mutex> lock(mutex_);
  checkpoint_ = id;
}

int SessionLog::pid() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return pid_;
}

std::string SessionLog::checkpoint() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return checkpoint_;
}

void SessionLog::begin_reply() {
  std::lock_guard<std::mutex> lock(mutex_);
  replying_ = true;
}

std::vector<std::pair<LogLevel, std::string>> SessionLog::end_reply() {
  std::lock_guard<std::mutex> lock(mutex_);
  replying_ = false;
  return std::exchange(lines_, {});
}

std::string SessionLog::marks() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text = "session=" + std::to_string(id_);
  if (pid_) text += " pid=" + std::to_string(pid_);
  if (!checkpoint_.empty()) text += " checkpoint=" + checkpoint_;
  return text;
}

bool SessionLog::keep(LogLevel level, const std::string& line) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (replying_) lines_.emplace_back(level, line);
  return replying_;
}

SessionLog::Scope::Scope(SessionLog* log) : previous_(std::exchange(t_current, log)) {}

SessionLog::Scope::~Scope() {
  t_current = previous_;
}

void install_daemon_log(LogLevel max, bool to_stderr) {
  openlog("phosd", LOG_PID, LOG_DAEMON);
  set_log_sink([max, to_stderr](LogLevel level, const std::string& line) {
    if (t_current && t_current->keep(level, line)) return;
    if (level > max) return;
    const std::string marks = t_current ? t_current->marks() + " " : "";
    if (to_stderr) {
      fprintf(stderr, "phosd[%d]: %s%s\n", getpid(), marks.c_str(), line.c_str());
    } else {
      syslog(kPriority[static_cast<int>(level)], "%s%s", marks.c_str(), line.c_str());
    }
  });
}

}  // namespace phos
