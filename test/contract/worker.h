// SPDX-License-Identifier: GPL-2.0-only
// A worker is this test binary, run again as a separate process that a test tells what to do with
// CUDA, line by line. (fork() without exec is no way to get a second CUDA process.)
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace contract {

inline constexpr int kPatienceMs = 60000;  // only ever reached by a failure

class Worker {
 public:
  // `mode`: "cuda" initialises CUDA and makes device 0 current; "plain" never touches CUDA.
  // `environment`: extra "NAME=value" entries. The worker is killed with this object.
  explicit Worker(const std::string& mode = "cuda", std::vector<std::string> environment = {});
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  pid_t pid() const { return pid_; }
  void send(const std::string& command);
  // The next reply line; nothing if it does not come in time or the worker died.
  std::optional<std::string> reply(int timeout_ms = kPatienceMs);
  // send + reply with a generous limit; "no reply" when there is none.
  std::string ask(const std::string& command);
  // Nothing more will be sent: the worker returns from main().
  void close_input();
  // The worker's wait status once it has died; nothing if it lives on.
  std::optional<int> wait_death(int timeout_ms = kPatienceMs);

 private:
  pid_t pid_ = -1;
  int to_ = -1, from_ = -1;
  bool reaped_ = false;
  std::string buffer_;
};

// The worker's own side. Reads commands from stdin until its end; replies on stdout:
// "ok [value]" or "error CUresult".
int run_worker(const std::string& mode);

}  // namespace contract
