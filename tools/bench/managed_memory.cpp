// SPDX-License-Identifier: GPL-2.0-only
// usage: managed_bench [--mib N] [--allocations N]
//
// What can be done with managed memory on the first GPU, and how fast: prints one JSON object a
// line. phos has to read it, to load it, and to have it again at the same address; how that is done
// best depends on what this says.
//   copy        GB/s of each way to read or write it, and how much of it the CPU maps before and
//               after (/proc/PID/pagemap): did it migrate?
//   addresses   of allocations freed one by one, how many are had again
//   checkpoint  what the driver says to a process that has managed memory, or has had it
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <functional>
#include <vector>

#include "gpu-tracker/track/uvm_files.h"
#include "tools/bench/bench.h"

namespace {

using namespace bench;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kPage = 4096;

void* find(const char* name) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) die(std::string("no libcuda.so.1: ") + dlerror());
  void* f = dlsym(library, name);
  if (!f) die(std::string("libcuda has no ") + name);
  return f;
}

// Calls a function of libcuda; the result is the caller's to judge.
template <typename... A>
CUresult ask(const char* name, A... a) {
  return reinterpret_cast<CUresult (*)(A...)>(find(name))(a...);
}
template <typename... A>
void call(const char* name, A... a) {
  const CUresult r = ask(name, a...);
  if (r) die(std::string(name) + " answers " + std::to_string(r));
}

CUdeviceptr allocate_managed(uint64_t size) {
  CUdeviceptr p = 0;
  call("cuMemAllocManaged", &p, static_cast<size_t>(size),
       static_cast<unsigned>(CU_MEM_ATTACH_GLOBAL));
  return p;
}
CUdeviceptr allocate_device(uint64_t size) {
  CUdeviceptr p = 0;
  call("cuMemAlloc_v2", &p, static_cast<size_t>(size));
  return p;
}
void release(CUdeviceptr p) {
  call("cuMemFree_v2", p);
}
void synchronize() {
  call("cuCtxSynchronize");
}
void make_context() {
  call("cuInit", 0U);
  CUcontext context = nullptr;
  call("cuDevicePrimaryCtxRetain", &context, CUdevice{0});
  call("cuCtxSetCurrent", context);
}

// The share of its pages that the CPU maps.
double mapped_share(CUdeviceptr p, uint64_t size) {
  const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  std::vector<uint64_t> entries(size / kPage);
  const auto bytes = static_cast<ssize_t>(entries.size() * 8);
  if (fd < 0 ||
      pread(fd, entries.data(), entries.size() * 8, static_cast<off_t>(p / kPage * 8)) != bytes)
    die("/proc/self/pagemap cannot be read");
  close(fd);
  const auto n = std::count_if(entries.begin(), entries.end(), [](uint64_t e) { return e >> 63; });
  return static_cast<double>(n) / static_cast<double>(entries.size());
}

// nvidia-uvm's UVM_TOOLS_READ/WRITE_PROCESS_MEMORY (uvm_ioctl.h).
struct ToolsAccess {
  uint64_t buffer, size, target, bytes;
  uint32_t status;
};
uint64_t tools_access(unsigned long request, void* buffer, CUdeviceptr p, uint64_t size) {
  static const phos::UvmFiles files = need(phos::UvmFiles::of(getpid()));
  for (const phos::UniqueFd& fd : files.copies) {
    ToolsAccess a{reinterpret_cast<uint64_t>(buffer), size, p, 0, 0};
    if (ioctl(fd.get(), request, &a) == 0 && !a.status) return a.bytes;
  }
  return 0;
}
constexpr unsigned long kToolsRead = 62, kToolsWrite = 63;

class CopyRuns {
 public:
  explicit CopyRuns(uint64_t size) : size_(size), managed_(allocate_managed(size)) {
    call("cuMemHostAlloc", &pinned_, static_cast<size_t>(kRing), 0U);
    device_ = allocate_device(kRing);
    pageable_ = static_cast<char*>(mmap(nullptr, kRing, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
  }

  void run() {
    const char* const gpu = "on the GPU";
    const char* const cpu = "on the CPU";
    const char* const fresh = "never touched";
    pieces("DtoH", fresh, [&](auto p, auto n) { to_host(p, n); });
    time("memset", gpu, [&] { call("cuMemsetD32_v2", managed_, 0x5a5a5a5aU, size_t{size_ / 4}); });
    for (int i = 0; i < 3; i++) {
      to_gpu();
      pieces("DtoH", gpu, [&](auto p, auto n) { to_host(p, n); });
      pieces("DtoD, from it", gpu, [&](auto p, auto n) {
        call("cuMemcpyDtoDAsync_v2", device_, p, size_t{n}, CUstream{});
      });
      pieces("DtoD, to it", gpu, [&](auto p, auto n) {
        call("cuMemcpyDtoDAsync_v2", p, device_, size_t{n}, CUstream{});
      });
      pieces("HtoD", gpu, [&](auto p, auto n) {
        call("cuMemcpyHtoDAsync_v2", p, pinned_, size_t{n}, CUstream{});
      });
      pieces(
          "tools read", gpu, [&](auto p, auto n) { tools(kToolsRead, p, n); }, size_ / 8);
      pieces(
          "tools write", gpu, [&](auto p, auto n) { tools(kToolsWrite, p, n); }, size_ / 8);
      pieces("process_vm_readv", gpu, [&](auto p, auto n) { peek(p, n); });
      pieces("process_vm_readv", cpu, [&](auto p, auto n) { peek(p, n); });
      pieces(
          "tools read", cpu, [&](auto p, auto n) { tools(kToolsRead, p, n); }, size_ / 8);
      pieces("DtoH", cpu, [&](auto p, auto n) { to_host(p, n); });
      peek_all();
      pieces("HtoD", cpu, [&](auto p, auto n) {
        call("cuMemcpyHtoDAsync_v2", p, pinned_, size_t{n}, CUstream{});
      });
      peek_all();
      time("prefetch to the GPU", cpu, [&] { prefetch(CU_MEM_LOCATION_TYPE_DEVICE); });
      time("prefetch to the CPU", gpu, [&] { prefetch(CU_MEM_LOCATION_TYPE_HOST); });
    }
  }

 private:
  using Piece = std::function<void(CUdeviceptr, uint64_t)>;

  void time(const char* how, const char* where, const std::function<void()>& work,
            uint64_t bytes = 0) {
    if (!bytes) bytes = size_;
    const double before = mapped_share(managed_, size_);
    const Clock::time_point begin = Clock::now();
    work();
    synchronize();
    const double s = seconds_since(begin);
    printf(
        "{\"part\": \"copy\", \"how\": \"%s\", \"memory\": \"%s\", \"gb_s\": %.3f, "
        "\"cpu_maps_before\": %.3f, \"cpu_maps_after\": %.3f}\n",
        how, where, static_cast<double>(bytes) / s / 1e9, before, mapped_share(managed_, size_));
    fflush(stdout);
  }
  void pieces(const char* how, const char* where, const Piece& piece, uint64_t bytes = 0) {
    if (!bytes) bytes = size_;
    time(
        how, where,
        [&] {
          for (uint64_t at = 0; at < bytes; at += kRing)
            piece(managed_ + at, std::min(kRing, bytes - at));
        },
        bytes);
  }

  void to_host(CUdeviceptr p, uint64_t n) {
    call("cuMemcpyDtoHAsync_v2", pinned_, p, size_t{n}, CUstream{});
  }
  void tools(unsigned long request, CUdeviceptr p, uint64_t n) {
    if (tools_access(request, pageable_, p, n) != n) failed_ = true;
    if (failed_ && !said_)
      printf("{\"part\": \"copy\", \"how\": \"tools\", \"error\": \"fails\"}\n");
    said_ = failed_;
  }
  void peek(CUdeviceptr p, uint64_t n) {
    const iovec to{pageable_, n}, from{reinterpret_cast<void*>(p), n};
    if (process_vm_readv(getpid(), &to, 1, &from, 1, 0) != static_cast<ssize_t>(n))
      printf("{\"part\": \"copy\", \"how\": \"process_vm_readv\", \"error\": \"%s\"}\n",
             strerror(errno));
  }
  void peek_all() {
    synchronize();
    for (uint64_t at = 0; at < size_; at += kRing) peek(managed_ + at, std::min(kRing, size_ - at));
  }
  void prefetch(CUmemLocationType where) {
    call("cuMemPrefetchAsync_v2", managed_, size_t{size_}, CUmemLocation{where, {0}}, 0U,
         CUstream{});
  }
  void to_gpu() {
    prefetch(CU_MEM_LOCATION_TYPE_DEVICE);
    synchronize();
  }

  static constexpr uint64_t kRing = 64 * kMiB;
  const uint64_t size_;
  const CUdeviceptr managed_;
  CUdeviceptr device_ = 0;
  void* pinned_ = nullptr;
  char* pageable_ = nullptr;
  bool failed_ = false, said_ = false;
};

// The lines of /proc/self/maps that nvidia-uvm has in [p, p + size).
std::string mappings(CUdeviceptr p, uint64_t size) {
  std::ifstream maps("/proc/self/maps");
  std::string all;
  for (std::string line; std::getline(maps, line);) {
    unsigned long start = 0, end = 0;
    if (sscanf(line.c_str(), "%lx-%lx", &start, &end) != 2 || end <= p || start >= p + size)
      continue;
    all += (all.empty() ? "" : "; ") + line;
  }
  return all;
}

struct Allocation {
  CUdeviceptr address;
  uint64_t size;
};

// Frees each in turn; reserves it at once (or not), and allocates it again.
void addresses(int count, bool reserve_first, bool all_first) {
  std::vector<Allocation> all;
  std::vector<CUdeviceptr> others;
  const uint64_t sizes[] = {4096, 100'000, 2 * kMiB, 3 * kMiB, 20 * kMiB, 40 * kMiB, 65 * kMiB};
  for (int i = 0; i < count; i++) {
    const uint64_t size = sizes[static_cast<size_t>(i) % std::size(sizes)];
    all.push_back({allocate_managed(size), size});
    others.push_back(allocate_device(size));
  }
  const std::string maps = mappings(all[2].address, all[2].size);
  int reserved = 0, again = 0;
  const auto round_up = [](uint64_t n) { return (n + 2 * kMiB - 1) / (2 * kMiB) * 2 * kMiB; };
  const auto give_up = [&](Allocation& a) {
    release(a.address);
    CUdeviceptr r = 0;
    if (!reserve_first || a.address % (2 * kMiB)) return;
    if (ask("cuMemAddressReserve", &r, size_t{round_up(a.size)}, size_t{0}, a.address, 0ULL) == 0) {
      reserved += r == a.address;
      if (r != a.address) call("cuMemAddressFree", r, size_t{round_up(a.size)});
    }
  };
  const auto have_again = [&](Allocation& a) {
    if (reserve_first && a.address % (2 * kMiB) == 0)
      ask("cuMemAddressFree", a.address, size_t{round_up(a.size)});
    const CUdeviceptr p = allocate_managed(a.size);
    again += p == a.address;
    a.address = p;
  };
  if (all_first) std::for_each(all.begin(), all.end(), give_up);
  for (Allocation& a : all) {
    if (!all_first) give_up(a);
    have_again(a);
  }
  printf(
      "{\"part\": \"addresses\", \"reserve\": %s, \"all_freed_first\": %s, \"allocations\": %d, "
      "\"reserved\": %d, \"again\": %d, \"mapping\": \"%s\"}\n",
      reserve_first ? "true" : "false", all_first ? "true" : "false", count, reserved, again,
      maps.c_str());
  fflush(stdout);
  for (const Allocation& a : all) release(a.address);
  for (CUdeviceptr p : others) release(p);
}

// A process that does as `how` says, tells that it is done, waits, and has its memory again.
int child(const std::string& how, int done, int go) {
  make_context();
  const uint64_t size = 64 * kMiB;
  const CUdeviceptr device = allocate_device(size);
  Allocation a{allocate_managed(size), size};
  call("cuMemsetD8_v2", a.address, static_cast<unsigned char>(7), size_t{size});
  synchronize();
  CUdeviceptr r = 0;
  if (how != "kept") release(a.address);
  if (how == "reserved") ask("cuMemAddressReserve", &r, size_t{size}, size_t{0}, a.address, 0ULL);
  char c = 0;
  if (write(done, &c, 1) != 1 || read(go, &c, 1) != 1) return 1;
  if (r) ask("cuMemAddressFree", r, size_t{size});
  const CUdeviceptr again = how == "kept" ? a.address : allocate_managed(size);
  call("cuMemsetD8_v2", again, static_cast<unsigned char>(9), size_t{size});
  synchronize();
  printf(
      "{\"part\": \"checkpoint\", \"process\": \"%s\", \"reserved\": %s, \"again\": %s, \"runs\": "
      "true}\n",
      how.c_str(), r == a.address ? "true" : "false", again == a.address ? "true" : "false");
  release(device);
  return 0;
}

void checkpoint(const char* self, const char* how) {
  int done[2], go[2];
  if (pipe(done) || pipe(go)) die("pipe");
  const pid_t pid = fork();
  if (pid == 0) {
    execl(self, self, "--child", how, std::to_string(done[1]).c_str(),
          std::to_string(go[0]).c_str(), nullptr);
    _exit(127);
  }
  char c = 0;
  close(done[1]);
  if (read(done[0], &c, 1) != 1) die(std::string("the process with memory ") + how + " has ended");
  CUcheckpointLockArgs lock{};
  const Clock::time_point begin = Clock::now();
  const int locked = ask("cuCheckpointProcessLock", int{pid}, &lock);
  const int saved = ask("cuCheckpointProcessCheckpoint", int{pid},
                        static_cast<CUcheckpointCheckpointArgs*>(nullptr));
  const double saved_s = seconds_since(begin);
  CUcheckpointRestoreArgs args{};
  const int restored = saved ? -1 : ask("cuCheckpointProcessRestore", int{pid}, &args);
  const int unlocked =
      ask("cuCheckpointProcessUnlock", int{pid}, static_cast<CUcheckpointUnlockArgs*>(nullptr));
  printf(
      "{\"part\": \"checkpoint\", \"process\": \"%s\", \"lock\": %d, \"checkpoint\": %d, "
      "\"restore\": %d, \"unlock\": %d, \"seconds\": %.3f}\n",
      how, locked, saved, restored, unlocked, saved_s);
  fflush(stdout);
  if (write(go[1], &c, 1) != 1) die("pipe");
  int status = 0;
  waitpid(pid, &status, 0);
  if (status)
    printf("{\"part\": \"checkpoint\", \"process\": \"%s\", \"ended\": %d}\n", how, status);
  for (int fd : {done[0], go[0], go[1]}) close(fd);
}

uint64_t number(const char* text) {
  char* end = nullptr;
  const uint64_t n = strtoull(text, &end, 10);
  if (!*text || *end || !n) die(std::string("not a number: ") + text);
  return n;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t mib = 2048, allocations = 70;
  for (int i = 1; i < argc; i++) {
    const std::string option = argv[i];
    if (option == "--child" && i + 3 < argc)
      return child(argv[i + 1], atoi(argv[i + 2]), atoi(argv[i + 3]));
    if (option == "--mib" && i + 1 < argc)
      mib = number(argv[++i]);
    else if (option == "--allocations" && i + 1 < argc)
      allocations = number(argv[++i]);
    else
      die("usage: managed_bench [--mib N] [--allocations N]");
  }
  for (const char* how : {"kept", "freed", "reserved"}) checkpoint("/proc/self/exe", how);
  make_context();
  for (bool reserve : {false, true})
    for (bool all : {false, true}) addresses(static_cast<int>(allocations), reserve, all);
  CopyRuns(mib * kMiB).run();
}
