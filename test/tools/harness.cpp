// SPDX-License-Identifier: GPL-2.0-only
#include "test/tools/harness.h"

#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>

namespace phos::test {

namespace fs = std::filesystem;

namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

std::string drain(int fd) {
  std::string text;
  char buf[4096];
  lseek(fd, 0, SEEK_SET);
  for (ssize_t n; (n = read(fd, buf, sizeof buf)) > 0;) text.append(buf, static_cast<size_t>(n));
  close(fd);
  return text;
}

std::vector<char*> pointers(const std::vector<std::string>& words) {
  std::vector<char*> p;
  for (const std::string& word : words) p.push_back(const_cast<char*>(word.c_str()));
  p.push_back(nullptr);
  return p;
}

std::string build_dir() {
  char path[PATH_MAX] = "";
  ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
  return fs::path(std::string(path, n > 0 ? static_cast<size_t>(n) : 0))
      .parent_path()
      .parent_path();
}

}  // namespace

std::vector<std::string> Outcome::out_lines() const {
  return lines_of(out);
}
std::vector<std::string> Outcome::err_lines() const {
  return lines_of(err);
}

Running start(const Launch& launch) {
  Running running;
  running.out = memfd_create("out", MFD_CLOEXEC);
  running.err = memfd_create("err", MFD_CLOEXEC);
  int in = memfd_create("in", MFD_CLOEXEC);
  if (write(in, launch.input.data(), launch.input.size()) < 0) abort();
  lseek(in, 0, SEEK_SET);
  std::vector<std::string> env;
  for (const auto& [name, value] : launch.env) env.push_back(name + "=" + value);
  auto argv = pointers(launch.argv), envp = pointers(env);
  const std::string& program = launch.program.empty() ? launch.argv[0] : launch.program;
  running.pid = fork();
  if (running.pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(in, 0);
    dup2(running.out, 1);
    dup2(running.err, 2);
    if (launch.uid != 0 &&
        (setgroups(0, nullptr) != 0 || setgid(launch.uid) != 0 || setuid(launch.uid) != 0)) {
      _exit(96);
    }
    execve(program.c_str(), argv.data(), envp.data());
    _exit(97);
  }
  close(in);
  return running;
}

Outcome finish(Running running) {
  Outcome outcome;
  int status = 0;
  struct rusage used = {};
  wait4(running.pid, &status, 0, &used);
  outcome.pid = running.pid;
  outcome.peak_bytes = static_cast<uint64_t>(used.ru_maxrss) << 10;
  if (WIFEXITED(status)) outcome.code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  outcome.out = drain(running.out);
  outcome.err = drain(running.err);
  return outcome;
}

void Installation::SetUp() {
  char path[] = "/tmp/phos-tools-test-XXXXXX";
  ASSERT_NE(mkdtemp(path), nullptr);
  root_ = path;
  chmod(path, 0755);
  std::string build = build_dir();
  for (const char* dir : {"bin", "path", "plugins"}) fs::create_directory(root(dir));
  fs::copy_file(build + "/bin/criu", root("bin/criu"));
  fs::copy_file(build + "/bin/phos", root("bin/phos"));
  fs::copy_file(build + "/test/fake_criu", root("path/criu"));
  touch("plugins/phos_plugin.so");
}

void Installation::TearDown() {
  std::error_code ec;
  fs::remove_all(root_, ec);
}

std::string Installation::root(const std::string& path) const {
  return path.empty() ? root_ : root_ + "/" + path;
}

Launch Installation::tool(const std::string& name, const std::vector<std::string>& args) const {
  Launch launch;
  launch.argv = {root("bin/" + name)};
  launch.argv.insert(launch.argv.end(), args.begin(), args.end());
  launch.env = {{"PATH", root("path")}, {"PHOS_PLUGIN_PATH", root("plugins")}, {"HOME", root()}};
  // Where the C++ runtime of a bundle is.
  if (const char* libs = getenv("LD_LIBRARY_PATH")) launch.env["LD_LIBRARY_PATH"] = libs;
  launch.env["PHOS_RUN_DIR"] = root("run");  // no phosd of the machine's
  return launch;
}

void Installation::touch(const std::string& path) const {
  fs::create_directories(fs::path(root(path)).parent_path());
  std::ofstream(root(path), std::ios::app);
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

bool exists(const std::string& path) {
  return access(path.c_str(), F_OK) == 0;
}

std::vector<std::string> list_dir(const std::string& path) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

Sleeper::Sleeper(const std::string& thread_name) {
  int ready[2];
  if (pipe2(ready, O_CLOEXEC) != 0) abort();
  pid_ = fork();
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    static int ready_fd = ready[1];
    static std::string name = thread_name;
    auto body = [](void*) -> void* {
      if (!name.empty()) prctl(PR_SET_NAME, name.c_str());
      pid_t tid = static_cast<pid_t>(syscall(SYS_gettid));
      if (write(ready_fd, &tid, sizeof tid) < 0) _exit(1);
      for (;;) pause();
    };
    pthread_t thread;
    if (!name.empty()) pthread_create(&thread, nullptr, body, nullptr);
    if (name.empty()) body(nullptr);
    for (;;) pause();
  }
  close(ready[1]);
  if (read(ready[0], &thread_, sizeof thread_) != static_cast<ssize_t>(sizeof thread_)) abort();
  close(ready[0]);
}

Sleeper::~Sleeper() {
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

}  // namespace phos::test
