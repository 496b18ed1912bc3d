// SPDX-License-Identifier: GPL-2.0-only
// phosd: talks to NVIDIA's driver on behalf of every criu of this machine.
//
// It is a process of its own because the target must be brought back even when criu is killed, and
// because libcuda has no business in criu's address space, which criu forks the restored tasks
// from. The first client starts it; it leaves when there is nothing to do.
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/abi/version.h"
#include "gpu-tracker/daemon/config.h"
#include "gpu-tracker/daemon/daemonise.h"
#include "gpu-tracker/daemon/gate_pins.h"
#include "gpu-tracker/daemon/listen.h"
#include "gpu-tracker/daemon/node.h"
#include "gpu-tracker/daemon/server.h"
#include "gpu-tracker/daemon/session_log.h"
#include "gpu-tracker/driver/cuda_driver.h"

namespace phos {
namespace {

Result<UniqueFd> make_signal_fd() {
  sigset_t blocked;  // by prepare_process()
  sigprocmask(SIG_SETMASK, nullptr, &blocked);
  UniqueFd fd(signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd) return Error::from_errno(errno, "signalfd");
  return fd;
}

Result<void> serve(const DaemonCommandLine& options, Readiness& readiness) {
  DaemonConfig config = options.config;
  // libcufile's log would lie in the root directory. Before there are threads.
  if (config.direct_storage) setenv("CUFILE_LOGFILE_PATH", "/dev/null", 0);
  if (auto r = make_run_dir(config.run_dir); !r) return r;
  auto signals = make_signal_fd();
  if (!signals) return signals.error();
  auto listener = Listener::open(config);
  if (!listener) return listener.error();
  config.socket = listener->socket();
  auto node = Node::make(config, [] { return open_cuda_driver(); });
  if (!node) return node.error();
  log(LogLevel::kInfo, "daemon", "phosd " PHOS_VERSION " listens on %s", config.socket.c_str());
  readiness.ready();
  auto served = Server(**node, *listener, signals->get()).run();
  GatePins(config.run_dir).leave();
  return served;
}

int run(int argc, char** argv) {
  const char* run_dir = secure_getenv(PHOS_RUN_DIR_ENV);
  auto options = parse_daemon_command_line({argv + 1, argv + argc}, run_dir ? run_dir : "");
  if (!options) {
    fprintf(stderr, "phosd: %s\n", options.error().message().c_str());
    return EXIT_FAILURE;
  }
  if (options->help || options->version) {
    fputs(options->help ? daemon_usage().c_str() : "phosd " PHOS_VERSION "\n", stdout);
    return EXIT_SUCCESS;
  }
  install_daemon_log(options->config.log_level, options->foreground);
  Readiness readiness;
  if (!options->foreground) {
    auto r = daemonise();
    if (!r) {
      fprintf(stderr, "phosd: %s\n", r.error().message().c_str());
      return EXIT_FAILURE;
    }
    readiness = std::move(*r);
    // Tests stay within the limits of whoever runs them.
    if (!run_dir) {
      std::ifstream mounts("/proc/self/mountinfo");
      leave_cgroups(cgroup_roots(mounts));
    }
  }
  prepare_process(options->foreground);
  auto served = serve(*options, readiness);
  if (served) return EXIT_SUCCESS;
  // Of two that start at once one wins; whoever started the other wants a phosd, not this one.
  if (!options->foreground && served.error().code() == EADDRINUSE) {
    readiness.ready();
    return EXIT_SUCCESS;
  }
  log(LogLevel::kError, "daemon", "%s", served.error().message().c_str());
  if (!options->foreground) readiness.failed(served.error().message());
  return EXIT_FAILURE;
}

}  // namespace
}  // namespace phos

int main(int argc, char** argv) {
  try {
    return phos::run(argc, argv);
  } catch (const std::exception& e) {  // out of memory
    fprintf(stderr, "phosd: %s\n", e.what());
    return EXIT_FAILURE;
  }
}
