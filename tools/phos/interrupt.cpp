// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/interrupt.h"

#include <signal.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>

namespace phos::cli {
namespace {

std::atomic<int> interrupted{0};
static_assert(std::atomic<int>::is_always_lock_free);

}  // namespace

void catch_interrupts() {
  struct sigaction action = {};
  action.sa_handler = [](int signal) { interrupted = signal; };
  for (int signal : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction old;
    if (sigaction(signal, nullptr, &old) == 0 && old.sa_handler == SIG_IGN) continue;
    sigaction(signal, &action, nullptr);
  }
}

Result<void> check_interrupted() {
  const int signal = interrupted;
  if (signal == 0) return {};
  // Not strsignal, which is for one thread.
  const char* const name = sigdescr_np(signal);
  return Error(Domain::kErrno, EINTR, std::string("interrupted by ") + (name ? name : "a signal"));
}

}  // namespace phos::cli
