// SPDX-License-Identifier: GPL-2.0-only
#include "test/gate/target.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>
#include <vector>

#include "gpu-tracker/gate/threads.h"
#include "test/contract/cuda_helpers.h"
#include "test/gate/registers.h"

namespace gate_test {
namespace {

constexpr size_t kBytes = 4 << 20;

CUcontext g_context;
CUdeviceptr g_memory;
contract::Kernels g_kernels;

std::atomic<bool> g_stop{false};
std::atomic<uint64_t> g_calls{0}, g_failures{0};
std::atomic<uint64_t> g_foreign{0};
std::atomic<bool> g_dozing{false};
std::atomic<uint64_t> g_slowest_us{0};  // call that frees
std::deque<std::thread> g_threads;
std::mutex g_never;
std::condition_variable g_nothing;
std::atomic<pid_t> g_freeing{0};  // the thread of "free"
std::atomic<bool> g_handling{false};
uint64_t g_handler_ms;

using Arguments = std::istringstream;
using Reply = std::ostream;

// A call that frees memory.
template <typename Call>
CUresult timed(Call call) {
  using std::chrono::steady_clock;
  const auto start = steady_clock::now();
  const CUresult r = call();
  const auto us = static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(steady_clock::now() - start).count());
  for (uint64_t seen = g_slowest_us; seen < us && !g_slowest_us.compare_exchange_weak(seen, us);) {
  }
  return r;
}

CUresult churn() {
  CUdeviceptr p;
  if (CUresult r = cuMemAlloc(&p, kBytes)) return r;
  return timed([&] { return cuMemFree(p); });
}

CUresult churn_mappings() {
  const CUmemAllocationProp prop = contract::device_memory_prop(0, true);
  const CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUmemGenericAllocationHandle handle;
  CUdeviceptr p;
  if (CUresult r = cuMemCreate(&handle, kBytes, &prop, 0)) return r;
  if (CUresult r = cuMemAddressReserve(&p, kBytes, 0, 0, 0)) return r;
  if (CUresult r = cuMemMap(p, kBytes, 0, handle, 0)) return r;
  if (CUresult r = cuMemSetAccess(p, kBytes, &access, 1)) return r;
  if (CUresult r = timed([&] { return cuMemRelease(handle); })) return r;
  if (CUresult r = timed([&] { return cuMemUnmap(p, kBytes); })) return r;
  return timed([&] { return cuMemAddressFree(p, kBytes); });
}

// Functions as programs have them that are built for a default stream in each thread, and as
// libcudart does: from cuGetProcAddress. Each thread calls but one.
CUresult call_variants(unsigned number) {
  using Set = CUresult (*)(CUdeviceptr, unsigned char, size_t, CUstream);
  using Query = CUresult (*)(CUstream);
  static const auto look_up = [](const char* name, cuuint64_t flags) {
    void* f = nullptr;
    cuGetProcAddress(name, &f, 13000, flags, nullptr);
    return f;
  };
  thread_local unsigned turn = 0;
  constexpr auto kPerThread = CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM;
  const CUdeviceptr at = g_memory + number * 4096;
  CUresult r = CUDA_SUCCESS;
  switch (number % 4) {
    case 0: {
      static const auto f = reinterpret_cast<Query>(dlsym(RTLD_DEFAULT, "cuStreamQuery_ptsz"));
      r = f(nullptr);
      break;
    }
    case 1: {
      static const auto f = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "cuMemsetD8Async_ptsz"));
      r = f(at, static_cast<unsigned char>(++turn), 64, nullptr);
      break;
    }
    case 2: {
      static const auto f = reinterpret_cast<Set>(look_up("cuMemsetD8Async", kPerThread));
      r = f(at, static_cast<unsigned char>(++turn), 64, nullptr);
      break;
    }
    default: {
      static const auto f =
          reinterpret_cast<Query>(look_up("cuStreamQuery", CU_GET_PROC_ADDRESS_LEGACY_STREAM));
      r = f(nullptr);
      break;
    }
  }
  return r == CUDA_ERROR_NOT_READY ? CUDA_SUCCESS : r;
}

void run_thread(const std::string& what, unsigned number) {
  cuCtxSetCurrent(g_context);
  const int epoll = what == "epoll" ? epoll_create1(EPOLL_CLOEXEC) : -1;
  for (unsigned i = 0; !g_stop; i++) {
    CUresult r = CUDA_SUCCESS;
    if (what == "memset") {
      r = cuMemsetD8(g_memory + number * 4096, static_cast<unsigned char>(i), 4096);
    } else if (what == "query") {
      r = cuStreamQuery(nullptr);
      if (r == CUDA_ERROR_NOT_READY) r = CUDA_SUCCESS;
    } else if (what == "variants") {
      r = call_variants(number);
    } else if (what == "churn") {
      r = churn();
    } else if (what == "mappings") {
      r = churn_mappings();
    } else if (what == "spin") {  // outside of libcuda, and never asleep
      for (unsigned n = 0; n < 100000; n++) asm volatile("");
    } else if (what == "range") {
      CUdeviceptr base;
      size_t size = 0;
      r = cuMemGetAddressRange(&base, &size, g_memory + number);
      if (!r && (base != g_memory || size != kBytes)) r = CUDA_ERROR_UNKNOWN;
    } else if (what == "registers") {
      if (!registers_survive_call()) g_failures++;
    } else if (what == "seldom") {  // waits for a condition that nobody makes true
      std::unique_lock<std::mutex> lock(g_never);
      g_nothing.wait_for(lock, std::chrono::milliseconds(1));
      lock.unlock();
      r = churn();
    } else if (what ==
               "epoll") {  // waits for an event that does not come, and fails if interrupted
      epoll_event event;
      if (epoll_wait(epoll, &event, 1, 1000)) g_failures++;
    } else if (what == "name") {  // takes no lock of the driver's, before its checkpoint or after
      const char* name;
      r = cuGetErrorName(CUDA_SUCCESS, &name);
    }
    if (r) g_failures++;
    g_calls++;
  }
}

// start WHAT N: that many more threads
CUresult start_threads(Arguments& in, Reply&) {
  std::string what;
  unsigned n = 0;
  in >> what >> n;
  const auto first = static_cast<unsigned>(g_threads.size());
  for (unsigned t = first; t < first + n; t++) g_threads.emplace_back(run_thread, what, t);
  return CUDA_SUCCESS;
}

// start-blocked WHAT: a thread that has every signal blocked
CUresult start_blocked(Arguments& in, Reply&) {
  std::string what;
  in >> what;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  g_threads.emplace_back(run_thread, what, static_cast<unsigned>(g_threads.size()));
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return CUDA_SUCCESS;
}

// stop: all threads end; replies how many calls failed
CUresult stop(Arguments&, Reply& out) {
  g_stop = true;
  for (auto& t : g_threads) t.join();
  g_threads.clear();
  g_stop = false;
  out << g_failures;
  return CUDA_SUCCESS;
}

// count: calls that have returned
CUresult count(Arguments&, Reply& out) {
  out << g_calls;
  return CUDA_SUCCESS;
}

// registers: does a call leave alone, without any gate, what the test looks at?
CUresult registers(Arguments&, Reply& out) {
  out << registers_survive_call();
  return CUDA_SUCCESS;
}

// start-asleep: a thread that sleeps outside of libcuda, with pointers to its functions on its
// stack, and above that, in the same mapping, what looks like a stack in the middle of calls
CUresult start_asleep(Arguments&, Reply&) {
  constexpr size_t kStack = 1 << 20, kTable = 12 << 20;
  void* region = mmap(nullptr, kStack + kTable, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  auto* table = reinterpret_cast<const char**>(static_cast<char*>(region) + kStack);
  for (size_t i = 0; i < kTable / sizeof *table; i++) {
    table[i] = reinterpret_cast<const char*>(cuMemAlloc) + i % 64;
  }
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, region, kStack);
  pthread_t thread;
  pthread_create(
      &thread, &attributes,
      [](void*) -> void* {
        const void* volatile functions[] = {reinterpret_cast<const void*>(cuMemAlloc),
                                            reinterpret_cast<const void*>(cuMemFree)};
        for (;;) pause();
        return const_cast<void*>(functions[0]);
      },
      nullptr);
  pthread_attr_destroy(&attributes);
  return CUDA_SUCCESS;
}

// sync MS: a thread that waits inside the driver for a kernel that takes so long
CUresult sync(Arguments& in, Reply&) {
  uint64_t ms = 0;
  in >> ms;
  if (CUresult r = g_kernels.spin(ms)) return r;
  g_threads.emplace_back([] {
    cuCtxSetCurrent(g_context);
    if (cuCtxSynchronize()) g_failures++;
  });
  return CUDA_SUCCESS;
}

// free MS: a thread that waits inside cuMemFree for a kernel that takes so long
CUresult free_behind_kernel(Arguments& in, Reply&) {
  uint64_t ms = 0;
  in >> ms;
  CUdeviceptr p;
  if (CUresult r = cuMemAlloc(&p, kBytes)) return r;
  if (CUresult r = g_kernels.spin(ms)) return r;
  g_freeing = 0;
  g_threads.emplace_back([p] {
    std::vector<char> stack(64 << 10);
    const stack_t own = {stack.data(), 0, stack.size()};
    sigaltstack(&own, nullptr);
    cuCtxSetCurrent(g_context);
    g_freeing = gettid();
    if (cuMemFree(p)) g_failures++;
    const stack_t none = {nullptr, SS_DISABLE, 0};
    sigaltstack(&none, nullptr);
    g_calls++;
  });
  while (!g_freeing) usleep(100);
  // Inside: nothing sleeps on its way there. A driver that waits may spin.
  for (int i = 0; i < 200 && !phos::find_asleep(getpid(), g_freeing); i++) usleep(1000);
  return CUDA_SUCCESS;
}

// interrupt own|same MS: the thread of "free" gets a signal, whose handler never sleeps for so
// long, on a stack of its own or on the same
CUresult interrupt(Arguments& in, Reply&) {
  std::string where;
  in >> where >> g_handler_ms;
  struct sigaction a = {};
  a.sa_flags = SA_RESTART | (where == "own" ? SA_ONSTACK : 0);
  a.sa_handler = [](int) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(g_handler_ms);
    g_handling = true;
    while (std::chrono::steady_clock::now() < end) {
    }
  };
  g_handling = false;
  sigaction(SIGUSR2, &a, nullptr);
  tgkill(getpid(), g_freeing, SIGUSR2);
  while (!g_handling) usleep(100);
  return CUDA_SUCCESS;
}

// coroutine: a thread that sleeps on a stack to which it has changed by hand
CUresult start_coroutine(Arguments&, Reply&) {
  g_threads.emplace_back([] {
    static ucontext_t own, other;
    static std::vector<char> stack(64 << 10);
    getcontext(&other);
    other.uc_stack = {stack.data(), 0, stack.size()};
    other.uc_link = &own;
    makecontext(
        &other,
        [] {
          while (!g_stop) usleep(20000);
        },
        0);
    swapcontext(&own, &other);
  });
  return CUDA_SUCCESS;
}

// slowest: microseconds of the slowest call that freed memory since it was asked for
CUresult slowest(Arguments&, Reply& out) {
  out << g_slowest_us.exchange(0);
  return CUDA_SUCCESS;
}

// sleeper: a thread that sleeps outside of libcuda; it has never been inside
CUresult sleeper(Arguments&, Reply&) {
  g_threads.emplace_back([] {
    while (!g_stop) usleep(1000000);
  });
  return CUDA_SUCCESS;
}

// handlers: one for every real-time signal
CUresult handlers(Arguments&, Reply&) {
  struct sigaction a = {};
  a.sa_flags = SA_SIGINFO | SA_RESTART;
  a.sa_sigaction = [](int, siginfo_t* info, void*) { g_foreign += info->si_value.sival_int; };
  for (int s = SIGRTMIN; s <= SIGRTMAX; s++) sigaction(s, &a, nullptr);
  return CUDA_SUCCESS;
}

// dozing: a handler for SIGUSR2 that sleeps until `awake`, which can interrupt a thread anywhere
CUresult dozing(Arguments&, Reply&) {
  g_dozing = true;
  signal(SIGUSR2, [](int) {
    while (g_dozing) usleep(1000);
  });
  return CUDA_SUCCESS;
}

CUresult awake(Arguments&, Reply&) {
  g_dozing = false;
  return CUDA_SUCCESS;
}

// signal N VALUE: sends itself one, with a value; replies the sum of the values that handlers got
CUresult send_signal(Arguments& in, Reply& out) {
  int number = 0, value = 0;
  in >> number >> value;
  sigval v = {};
  v.sival_int = value;
  const uint64_t before = g_foreign;
  sigqueue(getpid(), number, v);
  for (int i = 0; i < 1000 && g_foreign == before; i++) usleep(1000);
  out << g_foreign;
  return CUDA_SUCCESS;
}

// fork: a child that sends itself the signal N, which nobody handles, and replies its wait status
CUresult fork_child(Arguments& in, Reply& out) {
  int number = 0;
  in >> number;
  pid_t child = fork();
  if (child == 0) {
    raise(number);
    _exit(7);
  }
  int status = 0;
  waitpid(child, &status, 0);
  out << (WIFSIGNALED(status) ? WTERMSIG(status) : 0);
  return CUDA_SUCCESS;
}

// setuid: to the user that it is; waits until every thread has handled a signal of the C library's
CUresult set_user(Arguments&, Reply&) {
  return setuid(getuid()) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
}

// memory: the address of what the memset threads write
CUresult memory(Arguments&, Reply& out) {
  out << g_memory;
  return CUDA_SUCCESS;
}

const std::map<std::string, CUresult (*)(Arguments&, Reply&)> kCommands = {
    {"start", start_threads},
    {"start-blocked", start_blocked},
    {"stop", stop},
    {"count", count},
    {"registers", registers},
    {"sync", sync},
    {"start-asleep", start_asleep},
    {"sleeper", sleeper},
    {"handlers", handlers},
    {"signal", send_signal},
    {"fork", fork_child},
    {"memory", memory},
    {"setuid", set_user},
    {"dozing", dozing},
    {"awake", awake},
    {"free", free_behind_kernel},
    {"interrupt", interrupt},
    {"slowest", slowest},
    {"coroutine", start_coroutine},
};

CUresult start() {
  CUdevice device;
  if (CUresult r = cuInit(0)) return r;
  if (CUresult r = cuDeviceGet(&device, 0)) return r;
  if (CUresult r = cuDevicePrimaryCtxRetain(&g_context, device)) return r;
  if (CUresult r = cuCtxSetCurrent(g_context)) return r;
  if (CUresult r = cuMemAlloc(&g_memory, kBytes)) return r;
  return g_kernels.load();
}

void answer(CUresult r, const std::string& value) {
  std::cout << (r ? "error " + std::to_string(r) : "ok" + (value.empty() ? "" : " " + value))
            << std::endl;
}

}  // namespace

int run_target() {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  answer(start(), "");
  for (std::string line; std::getline(std::cin, line);) {
    Arguments in(line);
    std::ostringstream out;
    std::string command;
    in >> command;
    auto found = kCommands.find(command);
    const CUresult r = found == kCommands.end() ? CUDA_ERROR_UNKNOWN : found->second(in, out);
    answer(r, out.str());
  }
  _exit(0);
}

}  // namespace gate_test
