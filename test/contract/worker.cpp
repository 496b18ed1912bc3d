// SPDX-License-Identifier: GPL-2.0-only
// The test's handle on a worker process.
#include "test/contract/worker.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

extern char** environ;

namespace contract {
namespace {}  // namespace

Worker::Worker(const std::string& mode, std::vector<std::string> environment) {
  int in[2], out[2];
  if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) return;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], 0);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  std::string target = "--target=" + mode;
  char name[] = "contract-worker";
  char* argv[] = {name, target.data(), nullptr};
  std::vector<char*> envp;
  for (std::string& e : environment) envp.push_back(e.data());
  for (char** e = environ; *e; e++) envp.push_back(*e);
  envp.push_back(nullptr);
  if (posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, argv, envp.data())) pid_ = -1;
  posix_spawn_file_actions_destroy(&actions);
  close(in[0]);
  close(out[1]);
  to_ = in[1];
  from_ = out[0];
  if (reply() != "ok") fprintf(stderr, "worker %s did not start\n", mode.c_str());
}

Worker::~Worker() {
  if (pid_ > 0 && !reaped_) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  if (to_ >= 0) close(to_);
  close(from_);
}

void Worker::send(const std::string& command) {
  std::string line = command + "\n";
  if (write(to_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    perror("sending to a worker");
  }
}

std::optional<std::string> Worker::reply(int timeout_ms) {
  auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  for (;;) {
    size_t end = buffer_.find('\n');
    if (end != std::string::npos) {
      std::string line = buffer_.substr(0, end);
      buffer_.erase(0, end + 1);
      return line;
    }
    auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
        deadline - std::chrono::steady_clock::now());
    pollfd wait = {from_, POLLIN, 0};
    if (left.count() < 0 || poll(&wait, 1, static_cast<int>(left.count())) <= 0) return {};
    char chunk[1024];
    ssize_t n = read(from_, chunk, sizeof chunk);
    if (n <= 0) return {};
    buffer_.append(chunk, static_cast<size_t>(n));
  }
}

std::string Worker::ask(const std::string& command) {
  send(command);
  return reply().value_or("no reply");
}

void Worker::close_input() {
  close(to_);
  to_ = -1;
}

std::optional<int> Worker::wait_death(int timeout_ms) {
  int fd = static_cast<int>(syscall(SYS_pidfd_open, pid_, 0));
  pollfd wait = {fd, POLLIN, 0};
  int ready = poll(&wait, 1, timeout_ms);
  close(fd);
  int status = 0;
  if (ready != 1 || waitpid(pid_, &status, 0) != pid_) return {};
  reaped_ = true;
  return status;
}

}  // namespace contract
