// SPDX-License-Identifier: GPL-2.0-only
#include "test/live/application.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <mutex>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "test/contract/cuda_helpers.h"

namespace live_test {
namespace {

using contract::kMiB;

constexpr size_t kPieces = 4;         // a thread
constexpr unsigned kUnfinished = 12;  // calls between two waits for the stream
constexpr uint64_t kPage = 65536;

enum class Kind { kAlloc, kSmall, kVmm, kPrivateVmm };

struct Piece {
  Kind kind = Kind::kAlloc;
  CUdeviceptr address = 0;
  uint64_t size = 0;
  uint32_t seed_a = 0, seed_b = 0;  // its two favourite contents
};

// Where the threads stop when they are told to.
class Gate {
 public:
  explicit Gate(int threads) : threads_(threads) {}

  void pass() {
    if (!closed_) return;
    std::unique_lock<std::mutex> hold(mutex_);
    waiting_++;
    changed_.notify_all();
    changed_.wait(hold, [&] { return !closed_; });
    waiting_--;
  }
  void close() {
    std::unique_lock<std::mutex> hold(mutex_);
    closed_ = true;
    changed_.wait(hold, [&] { return waiting_ == threads_; });
  }
  void open() {
    std::lock_guard<std::mutex> hold(mutex_);
    closed_ = false;
    changed_.notify_all();
  }

 private:
  const int threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<bool> closed_{false};
  int waiting_ = 0;
};

std::mutex g_error_mutex;
std::string g_error;
std::atomic<uint64_t> g_calls{0};

bool done(CUresult result, const char* call) {
  g_calls++;
  if (result == CUDA_SUCCESS) return true;
  std::lock_guard<std::mutex> hold(g_error_mutex);
  if (g_error.empty()) g_error = std::string(call) + " says " + std::to_string(result);
  return false;
}
#define DO(call) \
  if (!done(call, #call)) return false

// One thread with a stream and memory of its own.
class Writer {
 public:
  Writer(uint32_t seed, CUdevice device) : random_(seed), device_(device) {}

  void run(Gate& gate) {
    if (!start()) {
      for (;;) gate.pass();
    }
    for (bool well = true;;) {
      gate.pass();
      well = well && act();
      if (!well) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  uint64_t below(uint64_t n) { return random_() % n; }

  bool start() {
    DO(cuDevicePrimaryCtxRetain(&context_, device_));
    DO(cuCtxSetCurrent(context_));
    DO(kernels_.load());
    DO(cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING));
    for (size_t i = 0; i < kPieces; i++) {
      Piece p;
      p.kind = static_cast<Kind>(i % 4);
      p.seed_a = static_cast<uint32_t>(random_());
      p.seed_b = static_cast<uint32_t>(random_());
      pieces_.push_back(p);
      if (!make(pieces_.back())) return false;
    }
    return true;
  }

  bool make(Piece& p) {
    if (p.kind == Kind::kAlloc || p.kind == Kind::kSmall) {
      DO(cuMemAlloc(&p.address, p.size ? p.size : p.size = new_size(p.kind)));
      return true;
    }
    p.size = 2 * kMiB;
    const CUmemAllocationProp prop = contract::device_memory_prop(device_, p.kind == Kind::kVmm);
    CUmemAccessDesc access = {prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle = 0;
    DO(cuMemCreate(&handle, p.size, &prop, 0));
    DO(cuMemAddressReserve(&p.address, p.size, 0, 0, 0));
    DO(cuMemMap(p.address, p.size, 0, handle, 0));
    DO(cuMemSetAccess(p.address, p.size, &access, 1));
    DO(cuMemRelease(handle));
    return true;
  }

  // Odd ones most of all, whose last page is short.
  uint64_t new_size(Kind kind) {
    if (kind == Kind::kSmall) return 1 + below(kMiB);
    return below(2) ? kMiB + 1 + below(kMiB) : kMiB + kPage * (1 + below(8)) + below(3);
  }

  bool unmake(Piece& p) {
    // Not only its own stream: a small cuMemcpyHtoD may return before the bytes have arrived, and
    // cuMemUnmap does not wait for them.
    DO(cuCtxSynchronize());
    if (p.kind == Kind::kAlloc || p.kind == Kind::kSmall) {
      DO(cuMemFree(p.address));
      return true;
    }
    DO(cuMemUnmap(p.address, p.size));
    DO(cuMemAddressFree(p.address, p.size));
    return true;
  }

  bool fill(const Piece& p, uint32_t seed) {
    DO(kernels_.fill(p.address, static_cast<uint32_t>(p.size / 4), seed, stream_));
    return true;
  }

  // Some pages, or a piece of one.
  void choose_part(const Piece& p, uint64_t* at, uint64_t* bytes) {
    const uint64_t pages = (p.size + kPage - 1) / kPage;
    *at = below(pages) * kPage;
    *bytes = std::min(p.size - *at, kPage * (1 + below(4)));
    if (below(3)) return;
    const uint64_t skip = below(*bytes);
    *at += skip;
    *bytes = 1 + below(*bytes - skip);
  }

  bool act() {
    if (++unfinished_ >= kUnfinished) {
      unfinished_ = 0;
      DO(cuStreamSynchronize(stream_));
      // Busy and quiet in turns: some pages must stay as they are for a while.
      if (below(2)) std::this_thread::sleep_for(std::chrono::microseconds(below(20000)));
    }
    Piece& p = pieces_[below(pieces_.size())];
    uint64_t at = 0, bytes = 0;
    choose_part(p, &at, &bytes);
    const auto part_elements = static_cast<uint32_t>(bytes / 4);
    const CUdeviceptr part = p.address + at / 4 * 4;
    switch (below(16)) {
      case 0:
        return fill(p, p.seed_a) && fill(p, p.seed_b) && fill(p, p.seed_a);
      case 1:
        return fill(p, below(2) ? p.seed_a : p.seed_b);
      case 2:
      case 3:
        if (!part_elements) return true;
        DO(kernels_.fill(part, part_elements, below(2) ? p.seed_a : p.seed_b, stream_));
        return true;
      case 4:
        if (!part_elements) return true;
        DO(kernels_.increment(part, part_elements, stream_));
        return true;
      case 5:
      case 6:
        DO(cuMemsetD8Async(p.address + at, static_cast<unsigned char>(random_()), bytes, stream_));
        return true;
      case 7:
        DO(cuMemsetD8Async(p.address + at, 0, bytes, stream_));
        return true;
      case 8:
        DO(cuMemsetD8Async(p.address, 0, p.size, stream_));
        return true;
      case 9:
        host_.assign(bytes, static_cast<uint8_t>(random_()));
        DO(cuMemcpyHtoD(p.address + at, host_.data(), bytes));
        return true;
      case 10: {
        const Piece& from = pieces_[below(pieces_.size())];
        if (from.address == p.address) return true;
        DO(cuMemcpyDtoDAsync(p.address, from.address, std::min(p.size, from.size), stream_));
        return true;
      }
      case 11: {  // other memory, most likely at the same address
        if (below(4)) return true;
        const bool same_size = below(2);
        if (!unmake(p)) return false;
        if (!same_size) p.size = 0;
        return make(p) && (below(2) ? fill(p, p.seed_a) : true);
      }
      case 12:
        DO(cuStreamSynchronize(stream_));
        return true;
      default:
        std::this_thread::sleep_for(std::chrono::microseconds(below(800)));
        return true;
    }
  }

  std::minstd_rand random_;
  const CUdevice device_;
  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr;
  contract::Kernels kernels_;
  std::vector<Piece> pieces_;
  std::vector<uint8_t> host_;
  unsigned unfinished_ = 0;
};

bool save(const std::string& path, const std::vector<uint8_t>& bytes) {
  FILE* f = fopen(path.c_str(), "w");
  const bool written = f && fwrite(bytes.data(), 1, bytes.size(), f) == bytes.size();
  return f && fclose(f) == 0 && written;
}

// The buffer id, or 0.
uint64_t read_by_driver(CUdeviceptr address, std::vector<uint8_t>* bytes) {
  unsigned long long id = 0;
  CUdeviceptr base = 0;
  size_t size = 0;
  if (cuMemGetAddressRange(&base, &size, address) || base != address || size < bytes->size() ||
      cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, address) ||
      cuMemcpyDtoH(bytes->data(), address, bytes->size())) {
    return 0;
  }
  return id;
}

uint64_t read_past_the_lock(CUdeviceptr address, std::vector<uint8_t>* bytes) {
  using Peek = uint64_t (*)(uint64_t address, uint64_t size, void* to);
  static const auto peek = reinterpret_cast<Peek>(dlsym(RTLD_DEFAULT, "phos_sim_peek"));
  return peek ? peek(address, bytes->size(), bytes->data()) : 0;
}

std::string obey(const std::string& line, Gate& gate) {
  std::istringstream in(line);
  std::string command, path;
  uint64_t address = 0, size = 0;
  in >> command >> std::hex >> address >> std::dec >> size >> path;
  if (command == "pause") gate.close();
  if (command == "resume") gate.open();
  if (command == "count") return std::to_string(g_calls);
  if (command == "read" || command == "peek") {
    std::vector<uint8_t> bytes(size);
    const uint64_t id =
        command == "read" ? read_by_driver(address, &bytes) : read_past_the_lock(address, &bytes);
    if (id && !save(path, bytes)) return "";
    return std::to_string(id);
  }
  return "";
}

// Where it crashed, for whoever looks at a test's output.
void report_crash(int number, siginfo_t* info, void* context) {
  const auto* u = static_cast<const ucontext_t*>(context);
  const auto ip = static_cast<unsigned long long>(u->uc_mcontext.gregs[REG_RIP]);
  fprintf(stderr, "application: signal %d (code %d) at %p, thread %d, ip %#llx, sp %#llx\n", number,
          info->si_code, info->si_addr, gettid(), ip,
          static_cast<unsigned long long>(u->uc_mcontext.gregs[REG_RSP]));
  const auto* stack = reinterpret_cast<const unsigned long long*>(u->uc_mcontext.gregs[REG_RSP]);
  for (int i = 0; i < 256; i++) fprintf(stderr, "%016llx%c", stack[i], i % 8 == 7 ? '\n' : ' ');
  if (FILE* maps = fopen("/proc/self/maps", "r")) {
    char line[512];
    while (fgets(line, sizeof line, maps)) {
      if (strstr(line, " r-xp ") || strstr(line, "stack") || strstr(line, "phos")) {
        fputs(line, stderr);
      }
    }
  }
  signal(number, SIG_DFL);
}

void report_crashes() {
  struct sigaction action = {};
  action.sa_sigaction = report_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGABRT}) {
    sigaction(number, &action, nullptr);
  }
}

}  // namespace

int run_application(const std::string& arguments) {
  uint32_t seed = 0;
  int threads = 0, devices = 0;
  CUcontext context = nullptr;
  if (sscanf(arguments.c_str(), "%u,%d", &seed, &threads) != 2 || cuInit(0) ||
      cuDeviceGetCount(&devices) || devices < 1 || cuDevicePrimaryCtxRetain(&context, 0) ||
      cuCtxSetCurrent(context)) {
    std::cout << "error no CUDA" << std::endl;
    return 1;
  }
  report_crashes();
  Gate gate(threads);
  for (int i = 0; i < threads; i++) {
    std::thread([seed, i, devices, &gate] {
      Writer(seed + static_cast<uint32_t>(i) * 1000003, i % devices).run(gate);
    }).detach();
  }
  std::cout << "ok" << std::endl;
  std::string line;
  while (std::getline(std::cin, line)) {
    const std::string value = obey(line, gate);
    std::lock_guard<std::mutex> hold(g_error_mutex);
    if (g_error.empty()) {
      std::cout << "ok" << (value.empty() ? "" : " ") << value << std::endl;
    } else {
      std::cout << "error " << g_error << std::endl;
    }
  }
  _exit(0);  // its threads use what a return would destroy
}

}  // namespace live_test
