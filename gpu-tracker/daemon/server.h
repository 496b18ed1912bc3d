// SPDX-License-Identifier: GPL-2.0-only
// Server: lets clients in, one thread each, and decides when phosd leaves.
#pragma once

#include <chrono>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/listen.h"
#include "gpu-tracker/daemon/node.h"

namespace phos {

class Server {
 public:
  // `signal_fd`: readable when phosd was asked to stop (a signalfd). All outlive the server.
  Server(Node& node, Listener& listener, int signal_fd)
      : node_(node), listener_(listener), signal_fd_(signal_fd) {}
  ~Server();

  // Until nothing was to be done for config().idle_timeout, or until it is told to stop. Then lets
  // nobody in any more and returns when the last session has ended and holds no process.
  Result<void> run();

 private:
  using Clock = std::chrono::steady_clock;
  struct Client {
    std::thread thread;
    bool ended = false;        // guarded by mutex_
    bool was_session = false;  // the same
    int left_pid = 0;          // which it brings back; 0: none
  };

  // What poll(2) is to wait for: -1 without end.
  int wait_ms() const;
  bool may_leave_when_idle() const;
  bool is_idle() const;
  void admit_waiting();
  void start_client(UniqueFd socket);
  void start(const std::string& name, std::function<bool()> work, int left_pid = 0);
  // What a phosd that was killed together with its client has left. Again and again: one that was
  // told to stop may still have begun sessions, and be killed.
  void bring_back_left_processes();
  void join_ended();

  Node& node_;
  Listener& listener_;
  const int signal_fd_;
  UniqueFd ended_fd_;  // eventfd: some client's thread has ended
  std::mutex mutex_;
  std::list<Client> clients_;
  Clock::time_point last_work_;
  Clock::time_point accept_again_;  // after a failure of accept()
  Clock::time_point look_again_;    // for left processes
  bool held_elsewhere_ = false;     // another phosd holds processes, which it may leave
};

}  // namespace phos
