// SPDX-License-Identifier: GPL-2.0-only
// Where the threads of a process are, as the kernel tells it: parked, outside of libcuda, or not.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/inject/agent.h"
#include "gpu-tracker/track/library_text.h"

namespace phos {

struct ThreadInfo {
  int tid = 0;
  uint64_t start_time = 0;  // with the tid it names a thread for good
  char state = '?';         // as in /proc/PID/status
  std::string comm;
  uint64_t blocked = 0;  // signals; bit: number - 1
};

// The threads that live now; those that end meanwhile may be missing. ESRCH: the process is gone.
Result<std::vector<ThreadInfo>> list_threads(int pid);

// Does the thread belong to NVIDIA's driver? By name, exactly: "cuda" and 11 hex digits is the
// restore thread, "cuda-EvtHandlr" waits for the GPU's events.
bool is_driver_thread(const ThreadInfo& thread);

// A thread of io_uring or vhost, which never runs the process's code?
bool is_kernel_worker(int pid, int tid);

// The upper end of the stack in `mapping` on which thread `tid` is at `sp`. glibc and musl have a
// thread's descriptor there. What lies above may be anything: the kernel merges mappings, and a
// program's tables of functions may follow.
uint64_t find_stack_end(int tid, uint64_t sp, const ProcMapping& mapping);

// Is what ends there the thread's own stack? On another one, of a signal handler or a coroutine, it
// may have left calls on its own.
bool is_own_stack(int pid, int tid, uint64_t end, const ProcMapping& mapping);

// Where a thread sleeps, in the kernel, and what tells whether it has slept on.
struct Asleep {
  long number = -1;  // of the system call; -1: none, a page fault for instance
  uint64_t first_argument = 0, second_argument = 0, fifth_argument = 0, sp = 0, pc = 0;
  std::string line;  // of /proc/PID/task/TID/syscall
  uint64_t switches = 0;
};
// Nothing: it runs, or is about to, or has ended.
std::optional<Asleep> find_asleep(int pid, int tid);
// Has it not run since?
bool sleeps_on(int pid, int tid, const Asleep& since);

// Of a thread that has been stopped by ptrace, in whatever call: a stop is no reason for it to
// fail. The kernel begins most calls anew that a stop has interrupted, as if nothing had been; but
// some end with EINTR also where no signal is to be handled (signal(7), "Interruption of system
// calls and library functions by stop signals"), which programs do not expect. Has them begin anew,
// too; a timeout of theirs runs from then on. If there is a signal to be handled after all, they
// end with EINTR as they should.
void let_call_begin_anew(int tid);
// Who has not stopped in time is waited for so long, to let it go so: it takes no more than a
// processor.
inline constexpr std::chrono::milliseconds kStraggling{500};

// Stops each of these threads for a moment, unless somebody else traces it (ptrace), and calls
// `look` with its index, on a thread of its own, which traces it. Who has not stopped kStraggling
// after the deadline is left out. Should this process die meanwhile, the kernel lets them go.
void stop_each(std::span<const ThreadInfo> threads, std::chrono::steady_clock::time_point deadline,
               const std::function<void(size_t)>& look);

// Code that a call into libcuda may be in: the library's, and the agent's, which goes on from an
// entry point that it has hooked without passing the gate (Agent::call_code).
struct CallCode {
  const LibraryText& library;
  std::span<const AddressRange> agent;
  // Where the gate's probes are, ascending offsets in the library's file: who comes there parks.
  std::span<const uint64_t> gated;

  bool contains(uint64_t address) const;
  // The address of a probe's place is no sign of a call in progress: function pointers have it,
  // and a thread that goes on there is parked.
  bool betrays(uint64_t word) const;
};

// The process's memory for one pass over its threads: to read the mappings anew for each would take
// milliseconds a thread. A stack that is not in it yet is not shown.
struct AddressSpaceView {
  static Result<AddressSpaceView> open(int pid);

  int pid;
  std::vector<ProcMapping> maps;
  UniqueFd memory;
};

enum class ThreadPlace {
  kParked,    // waits at the gate
  kOutside,   // provably outside of libcuda
  kInside,    // has an address of such code in its program counter or on its stack
  kNotShown,  // it runs, or its stack cannot be read to the end
};

// Looks once. The argument:
//  - kParked: the kernel says that the thread waits in futex(2) at the gate's address, which only
//    the gate's handler does. The handler runs where a thread has executed nothing of libcuda but
//    the first instruction of an entry point (gate.h).
//  - kOutside: the thread sleeps, so that its stack does not change while it is read: before
//    and after it is in the same system call, and has not been switched to in between. Code of
//    libcuda that has called something to which it will come back has left a return address in its
//    own text on the stack, above the stack pointer; a signal handler keeps the interrupted program
//    counter in its frame. The stack is searched, from the stack pointer to where the C library
//    keeps what it knows of the thread (which the kernel has the address of: the list of robust
//    futexes is there), the main thread's to the end of its mapping; for any word that points into
//    such code, but not at a probe; and the program counter must not point there. A tail call
//    leaves no address, but then nothing of libcuda is left to be executed. A thread that is
//    stopped (stop_each) counts as one that sleeps.
//  - kNotShown also of a thread that sleeps on a stack which is not its own: that of a signal
//    handler or a coroutine. What it has left on its own is not known.
// Stale words in unused parts of live frames make kInside of what is outside: that costs the fast
// path, never correctness.
ThreadPlace locate_thread(const AddressSpaceView& view, const ThreadInfo& thread,
                          const CallCode& code, uint64_t gate_word);

// Does the thread wait in futex(2) at the gate's address?
bool waits_at(int pid, int tid, uint64_t gate_word);

}  // namespace phos
