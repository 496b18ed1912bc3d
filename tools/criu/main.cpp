// SPDX-License-Identifier: GPL-2.0-only
// criu with --enable-plugin NAME: takes that option out of the command line, tells stock criu where
// the plugins are, and becomes stock criu. See criu-phos(1).

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "tools/criu/front_end.h"
#include "tools/criu/locate.h"

namespace phos::criu {
namespace {

constexpr int kExitUsage = 1;       // criu's own code for a wrong command line
constexpr int kExitNotFound = 127;  // the shell's code for a command that is not there

int fail(const std::string& message, int code) {
  fprintf(stderr, "criu: %s\n", message.c_str());
  return code;
}

int become(const std::string& path, const std::vector<std::string>& args) {
  std::vector<char*> argv;
  argv.reserve(args.size() + 1);
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  execv(path.c_str(), argv.data());
  int code = errno == ENOENT ? kExitNotFound : 126;
  return fail("starting " + path + ": " + strerror(errno), code);
}

// Only for --help: runs criu to its end and adds to what it printed.
int help(const std::string& path, const std::vector<std::string>& args) {
  fflush(nullptr);
  pid_t child = fork();
  if (child < 0) return fail(std::string("fork: ") + strerror(errno), kExitUsage);
  if (child == 0) _exit(become(path, args));
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFSIGNALED(status)) {
    signal(WTERMSIG(status), SIG_DFL);
    raise(WTERMSIG(status));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
    printf(
        "\nAdded by phos, see criu-phos(1):\n"
        "  --enable-plugin NAME  load the plugin NAME and no other; may be repeated\n");
  }
  return WEXITSTATUS(status);
}

int run(int argc, char** argv) {
  auto start = prepare({argv, argv + argc}, self_dir());
  if (!start) {
    bool absent = start.error().domain() == Domain::kCriu;
    return fail(start.error().message(), absent ? kExitNotFound : kExitUsage);
  }
  if (!start->libs_dir.empty() && setenv("CRIU_LIBS_DIR", start->libs_dir.c_str(), 1) != 0) {
    return fail(std::string("setting CRIU_LIBS_DIR: ") + strerror(errno), kExitUsage);
  }
  if (start->prints_help) return help(start->path, start->args);
  return become(start->path, start->args);
}

}  // namespace
}  // namespace phos::criu

int main(int argc, char** argv) {
  try {
    return phos::criu::run(argc, argv);
  } catch (const std::exception& e) {  // out of memory
    return phos::criu::fail(e.what(), phos::criu::kExitUsage);
  }
}
