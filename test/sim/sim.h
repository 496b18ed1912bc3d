// SPDX-License-Identifier: GPL-2.0-only
// What the files of the simulated CUDA driver share. One idea a file; see README.md for the map.
#pragma once

// Makes cuda.h declare its functions with default visibility, so that the definitions are exported
// and the compiler checks each one against NVIDIA's prototype.
#define __CUDA_API_PUSH_VISIBILITY_DEFAULT
#include <cuda.h>

#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>

#define PHOS_SIM_EXPORT extern "C" __attribute__((visibility("default")))
// A second name for an exported function, as the real library has for old programs: a function of
// its own, which begins as they all do and jumps on. cuda.h turns the plain name into the versioned
// one by macro, hence the detour over the assembler.
#define PHOS_SIM_ALIAS(plain, target)                           \
  asm(".pushsection .text\n"                                    \
      ".globl " #plain "\n.type " #plain ", @function\n" #plain \
      ":\n"                                                     \
      "push %rbp\nmov %rsp, %rbp\npop %rbp\n"                   \
      "jmp " #target                                            \
      "@PLT\n"                                                  \
      ".size " #plain ", . - " #plain                           \
      "\n"                                                      \
      ".popsection")

// In an entry point that calls nothing: makes it begin with `push %rbp` like the others, which the
// compiler's options do not.
#define PHOS_SIM_FRAME() asm volatile("" ::"r"(__builtin_frame_address(0)))

namespace phos_sim {

// ---- machine.cpp: the GPUs of the simulated machine.
struct Gpu {
  CUuuid uuid;
  uint64_t bytes;
  char name[96];
};
inline constexpr int kMaxGpus = 16;
struct Machine {
  Gpu gpus[kMaxGpus];
  int count;
  uint32_t id;  // of the file that describes it; 0: there is none
};
// No file: one 8 GiB GPU. Allocates nothing: also called on the restore thread, with others frozen.
void read_machine(const char* path, Machine* machine);
// The whole file (cut at size-1 bytes) with a final 0; -1 when it cannot be opened. No malloc.
long read_small_file(const char* path, char* buffer, size_t size);

// ---- faults.cpp: failures on request.
// Counts a call of `function` and acts out its fault, if any. CUDA_SUCCESS: go on and work.
CUresult act_out_fault(const char* function);
// After that: the call is to pay no heed to a hint ("elsewhere"). Once for each such fault.
unsigned wants_elsewhere();

// ---- accounting.cpp: device memory in use, from /proc; allocates nothing.
// What processes of this machine have on that GPU, `except` one of them. Without a machine file,
// what this process has.
uint64_t bytes_of_all(const Machine& machine, const CUuuid& gpu, int except);

// ---- process.cpp: what there is once in a process.
struct Process {
  std::atomic<bool> initialized{false};
  std::atomic<bool> forked{false};  // this is a forked child of a CUDA process
  std::atomic<int> state{CU_PROCESS_STATE_RUNNING};
  char machine_path[PATH_MAX] = "";
  char faults_path[PATH_MAX] = "";
  Machine machine = {};  // as of cuInit or the last restore
  // A restore found too little device memory: the driver has lost the process.
  std::atomic<bool> lost{false};
};
Process& process();
void copy_machine_path(char* out);  // which the environment names; PATH_MAX bytes

// What makes a process "on the device" for CRIU: a userfaultfd, and /dev/nvidia* where present.
void open_device_files();
void close_device_files();

// A call into the driver: waits while the process is locked, counts as "in progress" until it ends.
// kInitOnly: answers in a locked process too, as driver 580 was seen to do.
enum class Needs { kNothing, kInit, kInitOnly, kContext };
class ApiCall {
 public:
  ApiCall(const char* function, Needs needs);
  ~ApiCall();
  ApiCall(const ApiCall&) = delete;
  ApiCall& operator=(const ApiCall&) = delete;
  CUresult status() const { return status_; }

 private:
  bool inside_ = false;
  CUresult status_ = CUDA_SUCCESS;
};
#define PHOS_SIM_API(needs)                 \
  ApiCall api_call(__func__, Needs::needs); \
  if (api_call.status() != CUDA_SUCCESS) return api_call.status()

// The gate that cuCheckpointProcessLock closes. Futexes only: never held by a frozen thread.
void gate_enter();
void gate_leave();
void gate_close();
bool gate_wait_empty(int64_t deadline_ns);  // false: deadline passed. 0: no deadline
void gate_open();
int64_t monotonic_ns();

// ---- context.cpp
CUcontext current_context();
CUdevice device_of(CUcontext context);
bool device_exists(CUdevice device);
// Has `context` enabled access to the memory of `owner`?
bool has_peer_access(CUcontext context, CUcontext owner);

// ---- checkpoint_server.cpp
bool start_restore_thread();
void close_restore_pipes();  // in a forked child

// ---- checkpoint.cpp: called on the restore thread only.
CUresult do_lock(unsigned timeout_ms);
CUresult do_checkpoint();
CUresult do_restore(const CUcheckpointGpuPair* pairs, unsigned count);
CUresult do_unlock();
// A restore has found too little memory.
void lose_process();

}  // namespace phos_sim
