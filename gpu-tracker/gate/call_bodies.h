// SPDX-License-Identifier: GPL-2.0-only
// Is a thread inside one of certain functions of libcuda? threads.h asks about all of the library,
// which the threads of a program that uses the GPU hardly ever leave; here what a thread does in
// other functions does not matter, and one that never sleeps is stopped for a moment.
#pragma once

#include <chrono>
#include <cstdint>
#include <span>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/gate/threads.h"
#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/track/library_exports.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {

// The functions, by where they are, and who calls past their entries.
class CallBodies {
 public:
  // Of `functions`, at whose emulated_entry() there is a probe, in process `pid`, where the agent
  // is. ENOTSUP: of one the symbol table does not tell where it ends, or it begins with no push.
  static Result<CallBodies> find(int pid, const LibraryText& text,
                                 std::span<const ExportedFunction> functions);

  // Code that goes on into them past the probes: a thread in it is not outside (the agent's).
  void set_detours(std::vector<AddressRange> code) { detours_ = std::move(code); }

  // In one of them, from its first byte to its last?
  bool contains(uint64_t address) const;
  // Not past the probe yet: function pointers, and what will park.
  bool is_entry(uint64_t address) const;
  // Right behind the probe: what a parked thread goes on with, which has done nothing yet. No call
  // returns to it.
  bool is_start(uint64_t address) const;
  bool in_detour(uint64_t address) const;
  // What handlers of signals return to (rt_sigreturn), in the C library and the agent?
  bool is_sigreturn(uint64_t address) const;

 private:
  Result<void> find_sigreturns(int pid);

  std::vector<AddressRange> bodies_;   // ascending, apart
  std::vector<AddressRange> entries_;  // of them, up to the probe; ascending
  std::vector<uint64_t> starts_;       // ascending
  std::vector<AddressRange> detours_;
  std::vector<uint64_t> sigreturns_;
};

// Looks at threads of one process. The argument:
//  - The stack of a thread that does not run does not change. It sleeps, the same way before and
//    after, without having been switched to in between; or it is stopped.
//  - A call in progress has left a return address in the body of the function it entered by, above
//    the stack pointer, or the program counter is there. (The exported functions are stubs around
//    the work; in driver 580 they stay on the stack until it is done. One that jumped to the work
//    instead would not be seen.) A handler keeps the interrupted program counter in its frame, and
//    the stack pointer, which is followed where the handler has a stack of its own. All words up to
//    the end of the stack are looked at, whatever they are, but for the functions' addresses
//    themselves: pointers to them are no calls, and who goes on there parks.
//  - A parked thread (threads.h) has entered the function that it calls, and no more; it may have
//    come from inside of another. It says where its handler has interrupted it (abi/gate.h), and
//    what is below that on its stack does not matter.
// Stale words make kInside of what is outside: a thread that then stays where it is makes phos give
// up. So does a thread on a stack that is neither its own nor a handler's (a coroutine): what it
// has left on its own is not known.
class StackReader {
 public:
  // Of process `pid` as it is mapped now: for a moment's work. The bodies must outlive it.
  static Result<StackReader> open(int pid, const CallBodies& bodies, uint64_t gate_word);

  // Looks once, and leaves the thread alone.
  ThreadPlace look(const ThreadInfo& thread) const;
  // Stops each of these threads for a moment, unless somebody else traces it (ptrace), and looks.
  // One place each, in order; who has not stopped at the
  // deadline is not shown. Should this process die meanwhile, the kernel lets them go.
  std::vector<ThreadPlace> stop_and_look(std::span<const ThreadInfo> threads,
                                         std::chrono::steady_clock::time_point deadline) const;

 private:
  struct Frame {
    uint64_t pc = 0, sp = 0;
    int tid = 0;  // whose stack it is
    bool parked = false;
  };

  StackReader(int pid, const CallBodies& bodies, uint64_t gate_word)
      : pid_(pid), bodies_(bodies), gate_word_(gate_word) {}

  bool is_forbidden(uint64_t address, bool parked) const;
  const ProcMapping* find_mapping(uint64_t address) const;
  ThreadPlace judge(const Frame& frame) const;
  ThreadPlace judge_parked(int tid, uint64_t context) const;
  ThreadPlace search(const Frame& frame, unsigned depth) const;
  ThreadPlace judge_stopped(int tid) const;

  int pid_;
  const CallBodies& bodies_;
  uint64_t gate_word_;
  std::vector<ProcMapping> maps_;
  UniqueFd memory_;
};

}  // namespace phos
