// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/daemonise.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "gpu-tracker/base/log.h"

namespace phos {
namespace {

constexpr char kReady = '+';

// CUDA's own that change what phosd would see or load: the GPUs are the machine's, whatever the
// starter restricts itself to, and a profiler of its is not phosd's.
constexpr const char* kForeignVariables[] = {
    "CUDA_VISIBLE_DEVICES",    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",    "CUDA_INJECTION64_PATH",
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY",
    "NVIDIA_VISIBLE_DEVICES",  "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"};

// Waits for the daemon's word; the exit status.
int report(int fd) {
  std::string said;
  char chunk[512];
  ssize_t n;
  while ((n = read(fd, chunk, sizeof chunk)) != 0) {
    if (n > 0) said.append(chunk, static_cast<size_t>(n));
    if (n < 0 && errno != EINTR) break;
  }
  if (said == std::string(1, kReady)) return EXIT_SUCCESS;
  if (said.empty()) said = "phosd: died while it started; the system log may say why\n";
  fputs(said.c_str(), stderr);
  return EXIT_FAILURE;
}

// The driver's checkpoint fills host memory with what was on the GPU; phosd must outlive that.
// Needs CAP_SYS_RESOURCE; without it phosd is as likely to be chosen as any other process.
void survive_memory_shortage() {
  UniqueFd fd(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
  if (fd && write(fd.get(), "-900", 4) < 0 && errno != EACCES) {
    log(LogLevel::kDebug, "daemon", "oom_score_adj: %s", strerror(errno));
  }
}

}  // namespace

void Readiness::ready() {
  if (fd_ && write(fd_.get(), &kReady, 1) < 0) {
    log(LogLevel::kDebug, "daemon", "nobody waited for it to be ready: %s", strerror(errno));
  }
  fd_.reset();
}

void Readiness::failed(const std::string& why) {
  dprintf(fd_ ? fd_.get() : STDERR_FILENO, "phosd: %s\n", why.c_str());
  fd_.reset();
}

Result<Readiness> daemonise() {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) < 0) return Error::from_errno(errno, "pipe");
  UniqueFd from(ends[0]), to(ends[1]);
  pid_t child = fork();
  if (child < 0) return Error::from_errno(errno, "fork");
  if (child > 0) {
    to.reset();
    _exit(report(from.get()));
  }
  setsid();
  child = fork();  // no leader of a session: it never gets a terminal
  if (child != 0) _exit(child < 0 ? EXIT_FAILURE : EXIT_SUCCESS);

  umask(077);
  const int null = open("/dev/null", O_RDWR);
  // Not below 3, where /dev/null goes: the starter may have had its standard files closed.
  const int answer = fcntl(to.get(), F_DUPFD_CLOEXEC, 3);
  if (null < 0 || answer < 0 || chdir("/") < 0) _exit(EXIT_FAILURE);
  for (int fd = 0; fd < 3; fd++) {
    if (dup2(null, fd) < 0) _exit(EXIT_FAILURE);
  }
  (void)to.release();
  (void)from.release();
  // Nothing of the starter's stays open: criu's image files, the pipes of its service.
  if (answer != 3 && dup3(answer, 3, O_CLOEXEC) < 0) _exit(EXIT_FAILURE);
  closefrom(4);
  return Readiness(UniqueFd(3));
}

std::vector<std::string> cgroup_roots(std::istream& mountinfo) {
  std::vector<std::string> roots;
  for (std::string line; std::getline(mountinfo, line);) {
    // "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - cgroup2 ...", any number of words before "-".
    std::istringstream words(line);
    std::string id, parent, device, root, mount_point, word, type;
    words >> id >> parent >> device >> root >> mount_point;
    while (words >> word && word != "-") {
    }
    words >> type;
    if ((type == "cgroup" || type == "cgroup2") && root == "/") roots.push_back(mount_point);
  }
  return roots;
}

void leave_cgroups(const std::vector<std::string>& roots) {
  for (const std::string& root : roots) {
    UniqueFd fd(open((root + "/cgroup.procs").c_str(), O_WRONLY | O_CLOEXEC));
    // Not everywhere: the mount may be read-only, or the root of a container's own namespace.
    if (!fd || write(fd.get(), "0", 1) < 0) {
      log(LogLevel::kDebug, "daemon", "stays in its control group of %s: %s", root.c_str(),
          strerror(errno));
    }
  }
}

void prepare_process(bool foreground) {
  for (const char* name : kForeignVariables) unsetenv(name);
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGTERM);
  if (foreground) sigaddset(&blocked, SIGINT);
  // It ends with its work, not with criu's terminal: a process may wait for its GPU.
  for (int sig : {SIGPIPE, SIGHUP}) signal(sig, SIG_IGN);
  signal(SIGINT, foreground ? SIG_DFL : SIG_IGN);
  for (int sig : {SIGTERM, SIGCHLD}) signal(sig, SIG_DFL);
  sigprocmask(SIG_SETMASK, &blocked, nullptr);
  rlimit files = {};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
  }
  survive_memory_shortage();
}

}  // namespace phos
