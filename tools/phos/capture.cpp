// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/capture.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "gpu-tracker/base/unique_fd.h"

extern char** environ;

namespace phos::cli {

Result<Captured> capture(const std::vector<std::string>& argv) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return Error::from_errno(errno, "pipe");
  UniqueFd in(ends[0]), out(ends[1]);
  std::vector<char*> words;
  words.reserve(argv.size() + 1);
  for (const std::string& word : argv) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, out.get(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out.get(), STDERR_FILENO);
  pid_t pid = -1;
  int error = posix_spawn(&pid, words[0], &actions, nullptr, words.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error) return Error::from_errno(error, "starting " + argv[0]);
  out.reset();
  Captured captured;
  char buf[4096];
  for (ssize_t n; (n = read(in.get(), buf, sizeof buf)) != 0;) {
    if (n > 0) captured.output.append(buf, static_cast<size_t>(n));
    if (n < 0 && errno != EINTR) break;
  }
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  captured.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return captured;
}

}  // namespace phos::cli
