// SPDX-License-Identifier: GPL-2.0-only
// The BPF side of the gate: loads bpf/gate.bpf.c and gives access to its state.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/abi/gate.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

struct bpf_object;

namespace phos {

// Not thread-safe.
class GateProgram {
 public:
  // Open: sends nothing until set_closed(). ENOTSUP: the kernel has no BTF, or this process is not
  // in the initial pid namespace, by which BPF numbers threads; EPERM: not root, or lockdown.
  static Result<std::unique_ptr<GateProgram>> load(pid_t pid, int signal);
  // The program behind a link that another process has attached and pinned. EPROTO: not one of
  // ours, of this process.
  static Result<std::unique_ptr<GateProgram>> adopt(pid_t pid, int link_fd);
  ~GateProgram();
  GateProgram(const GateProgram&) = delete;
  GateProgram& operator=(const GateProgram&) = delete;

  // This thread may pass.
  Result<void> exempt(int tid);

  // attach_uprobe_multi() at these places in the file.
  Result<UniqueFd> attach(const std::string& path, const std::vector<uint64_t>& offsets) const;

  // From here on threads are sent the signal, or no more.
  void set_closed(bool closed);

  uint64_t sent() const { return __atomic_load_n(&state_->sent, __ATOMIC_ACQUIRE); }
  uint64_t passed() const { return __atomic_load_n(&state_->passed, __ATOMIC_ACQUIRE); }
  // Of the gate's `arrived`, when nothing had been sent.
  uint64_t arrived_before() const { return state_->arrived_before; }
  void set_arrived_before(uint64_t count) { state_->arrived_before = count; }
  // Runs that the kernel had to leave out since load(): threads that passed.
  Result<uint64_t> missed_runs() const;

 private:
  GateProgram() = default;

  Result<void> map_state(int map_fd);

  bpf_object* object_ = nullptr;
  pid_t pid_ = 0;
  int program_fd_ = -1, exempt_fd_ = -1;  // object_'s, or one of these
  std::vector<UniqueFd> adopted_;
  phos_gate_state* state_ = nullptr;
};

}  // namespace phos
