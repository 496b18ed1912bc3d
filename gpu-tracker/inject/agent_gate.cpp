// SPDX-License-Identifier: GPL-2.0-only
// What the gate wants of the agent.
#include <dirent.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <string>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/agent.h"

namespace phos {

Result<int> Agent::install_gate(uint64_t blocked_signals) {
  if (auto r = settle(); !r) return r.error();
  gate().avoid = blocked_signals;
  if (auto r = run(PHOS_COMMAND_GATE_INSTALL, 0); !r) {
    return r.error().wrap("installing the gate's signal handler");
  }
  const auto signal = static_cast<int>(gate().signal);
  if (signal < 1 || signal > 64) {
    return process_error(pid_, EPROTO, "phos's agent in it names a signal that does not exist");
  }
  return signal;
}

Result<void> Agent::remove_gate() {
  if (auto r = run(PHOS_COMMAND_GATE_REMOVE, 0); !r) {
    return r.error().wrap("removing the gate's signal handler");
  }
  return {};
}

Result<void> Agent::forget_gate() {
  return run(PHOS_COMMAND_GATE_FORGET, 0);
}

bool Agent::gate_was_used() {
  return mailbox_ && mailbox_->shared().gate_used;
}

Result<void> Agent::claim_gate() {
  if (!mailbox_) return process_error(pid_, EINVAL, "phos has let go of its agent");
  if (gate_claimed_) return process_error(pid_, EBUSY, "its gate is in use");
  gate_claimed_ = true;
  return {};
}

phos_gate& Agent::gate() {
  return mailbox_->payload().gate;
}

uint64_t Agent::gate_address() const {
  return mailbox_->address() + offsetof(phos_mailbox, gate);
}

Result<std::vector<AddressRange>> Agent::call_code() {
  auto maps = read_proc_maps(pid_);
  if (!maps) return maps.error();
  const uint64_t hooks = mailbox_->shared().hooks_page;
  std::vector<AddressRange> code;
  for (const ProcMapping& m : *maps) {
    if (m.path.rfind("/memfd:" PHOS_AGENT_MEMFD_PREFIX, 0) == 0 && m.perms[2] == 'x') {
      code.push_back({m.start, m.end});
    }
  }
  if (hooks) code.push_back({hooks, hooks + PHOS_HOOKS_PAGE_SIZE});
  return code;
}

Result<int> Agent::thread_id() const {
  const std::string tasks = "/proc/" + std::to_string(pid_) + "/task";
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(tasks.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    const int tid = atoi(entry->d_name);
    auto status = tid ? read_proc_status(tid) : Error(Domain::kErrno, ESRCH, "");
    if (status && status->comm == PHOS_AGENT_THREAD_NAME) return tid;
  }
  return process_error(pid_, ESRCH, "the thread of phos's agent in it is gone");
}

}  // namespace phos
