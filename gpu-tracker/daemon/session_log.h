// SPDX-License-Identifier: GPL-2.0-only
// Where phosd's log lines go: those that are about a request under way into its reply, and so into
// CRIU's log; all others to the system log, marked with the session they belong to.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/base/log.h"

namespace phos {

// Of one session. Thread-safe.
class SessionLog {
 public:
  explicit SessionLog(unsigned id) : id_(id) {}

  // The first process that the session is about, and the id of its dump, for the system log.
  void set_pid(int pid);
  void set_checkpoint(const std::string& id);
  int pid() const;                 // 0: not set
  std::string checkpoint() const;  // empty: not set

  // Between the two, lines are kept for the reply.
  void begin_reply();
  std::vector<std::pair<LogLevel, std::string>> end_reply();

  // "session=3 pid=4242 checkpoint=0123...", as far as it is known.
  std::string marks() const;

  // Keeps the line; false: no reply is under way.
  bool keep(LogLevel level, const std::string& line);

  // While it lives, what the calling thread logs is the session's. Each thread that works for a
  // session needs one of its own.
  class Scope {
   public:
    explicit Scope(SessionLog* log);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    SessionLog* const previous_;
  };
  // The calling thread's; null: none.
  static SessionLog* current();

 private:
  mutable std::mutex mutex_;
  const unsigned id_;
  int pid_ = 0;
  std::string checkpoint_;
  bool replying_ = false;
  std::vector<std::pair<LogLevel, std::string>> lines_;
};

// Makes log() go that way. `to_stderr` instead of syslog(3); lines above `level` are dropped there.
void install_daemon_log(LogLevel level, bool to_stderr);

}  // namespace phos
