// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/criu_run.h"

#include <poll.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "gpu-tracker/base/unique_fd.h"
#include "tools/criu/locate.h"
#include "tools/phos/log_tail.h"
#include "tools/phos/progress_line.h"

extern char** environ;

namespace phos::cli {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTickMs = 100;  // how often the progress line is drawn

// SIGINT and SIGTERM as a descriptor for as long as this lives.
class SignalGuard {
 public:
  SignalGuard() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, &old_);
    fd_ = UniqueFd(signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  }
  ~SignalGuard() { sigprocmask(SIG_SETMASK, &old_, nullptr); }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

  int fd() const { return fd_.get(); }
  const sigset_t& old_mask() const { return old_; }

 private:
  sigset_t old_;
  UniqueFd fd_;
};

// Shows what the plugin writes to CRIU's log.
class Progress {
 public:
  explicit Progress(const CriuRun& run) : run_(run), tail_(run.log_path) {}

  bool wanted() const { return line_.on_terminal() || run_.verbose; }

  void update() {
    if (!wanted()) return;
    tail_.poll([this](const std::string& line) {
      std::string text = plugin_text(line);
      if (text.empty()) return;
      phase_ = text.substr(strlen("phos:"));
      if (run_.verbose) {
        line_.clear();
        fprintf(stderr, "%s\n", text.c_str());
      }
    });
    line_.draw(run_.title + (phase_.empty() ? "" : ":" + phase_));
  }

 private:
  const CriuRun& run_;
  ProgressLine line_;
  LogTail tail_;
  std::string phase_;
};

Result<pid_t> spawn(const criu::Invocation& start, int output, const sigset_t& mask) {
  std::vector<char*> argv;
  for (const std::string& arg : start.args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attr;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attr);
  posix_spawn_file_actions_adddup2(&actions, output, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, output, STDERR_FILENO);
  posix_spawnattr_setsigmask(&attr, &mask);
  posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK);
  pid_t pid = -1;
  int error = posix_spawn(&pid, start.path.c_str(), &actions, &attr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attr);
  if (error) return Error::from_errno(error, "starting " + start.path);
  return pid;
}

void forward_signals(int fd, pid_t child, CriuExit& exit) {
  signalfd_siginfo info;
  while (read(fd, &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
    exit.interrupted = static_cast<int>(info.ssi_signo);
    // The terminal's own signal went to the whole process group, criu included.
    if (info.ssi_code != SI_KERNEL) kill(child, exit.interrupted);
  }
}

std::string read_all(int fd) {
  std::string text;
  char buf[4096];
  for (off_t at = 0;;) {
    ssize_t n = pread(fd, buf, sizeof buf, at);
    if (n <= 0) return text;
    text.append(buf, static_cast<size_t>(n));
    at += n;
  }
}

}  // namespace

Result<criu::Invocation> prepare_criu(const CriuRun& run) {
  std::vector<std::string> argv = {"criu"};
  argv.insert(argv.end(), run.args.begin(), run.args.end());
  return criu::prepare(argv, criu::self_dir());
}

Result<CriuExit> run_criu(const CriuRun& run, const criu::Invocation& start) {
  // A file, not a pipe: nobody has to read it, and no restored process can hold it open.
  UniqueFd output(memfd_create("criu-output", MFD_CLOEXEC));
  if (!output) return Error::from_errno(errno, "memfd_create");

  SignalGuard signals;
  CriuExit exit;
  auto begin = Clock::now();
  auto child = spawn(start, output.get(), signals.old_mask());
  if (!child) return child.error();
  UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, *child, 0)));
  {
    Progress progress(run);
    pollfd fds[] = {{pidfd.get(), POLLIN, 0}, {signals.fd(), POLLIN, 0}};
    while (pidfd && !(fds[0].revents & POLLIN)) {
      poll(fds, 2, progress.wanted() ? kTickMs : -1);
      if (fds[1].revents & POLLIN) forward_signals(signals.fd(), *child, exit);
      progress.update();
    }
  }
  int status = 0;
  while (waitpid(*child, &status, 0) < 0 && errno == EINTR) {
  }
  exit.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  exit.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  exit.output = read_all(output.get());
  return exit;
}

std::vector<std::string> log_errors(const std::string& log_path, size_t max) {
  std::vector<std::string> errors;
  LogTail(log_path).poll([&](const std::string& line) {
    std::string text = error_text(line);
    if (!text.empty() && errors.size() < max) errors.push_back(text);
  });
  return errors;
}

void report_failure(const std::string& command, const std::string& what, const CriuRun& run,
                    const CriuExit& exit) {
  static constexpr size_t kMaxLines = 5;
  std::string how = exit.code < 0 ? std::string("criu was ended by ") + strsignal(-exit.code)
                                  : "criu failed with exit code " + std::to_string(exit.code);
  if (exit.interrupted) how = std::string("interrupted by ") + strsignal(exit.interrupted);
  bool logged = access(run.log_path.c_str(), R_OK) == 0;
  fprintf(stderr, "phos %s: %s: %s%s%s\n", command.c_str(), what.c_str(), how.c_str(),
          logged ? "; its log is " : "", logged ? run.log_path.c_str() : "");
  std::vector<std::string> lines = log_errors(run.log_path, kMaxLines);
  if (lines.empty()) {  // it failed before it had a log
    for (size_t at = 0; at < exit.output.size() && lines.size() < kMaxLines;) {
      size_t end = std::min(exit.output.find('\n', at), exit.output.size());
      if (end > at) lines.push_back(exit.output.substr(at, end - at));
      at = end + 1;
    }
  }
  for (const std::string& line : lines) fprintf(stderr, "  %s\n", line.c_str());
}

}  // namespace phos::cli
