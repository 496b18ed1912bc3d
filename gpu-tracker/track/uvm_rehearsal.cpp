// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_rehearsal.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace phos {
namespace {

constexpr char kDevice[] = "/dev/nvidia-uvm";
constexpr int kPatienceMs = 20000;  // an emulated processor needs a part of it
constexpr size_t kPage = 4096;

// nvidia-uvm's uvm_ioctl.h and uvm_linux_ioctl.h, of drivers 535 to 595.
constexpr unsigned long kInitialize = 0x30000001, kMmInitialize = 75, kValidateRange = 72,
                        kEnableReadDuplication = 44, kDisableReadDuplication = 45, kToolsWrite = 63;

struct Initialize {
  uint64_t flags;
  int32_t status;
};
struct MmInitialize {
  int32_t uvm_fd;
  int32_t status;
};
struct Range {
  uint64_t base, length;
  int32_t status;
};
struct ToolsWrite {
  uint64_t buffer, size, target, written;
  int32_t status;
};

// What the forked process answers: 0, an errno value, or an NV_STATUS with this.
constexpr uint32_t kRefused = 0x80000000;

// From here on: in the forked process of one that may have had many threads. Nothing but system
// calls.
struct Rehearsing {
  int uvm = -1, mm = -1;
  uint8_t* memory = nullptr;

  template <typename Parameters>
  uint32_t command(int fd, unsigned long command, Parameters* p) const {
    if (ioctl(fd, command, p) != 0) return static_cast<uint32_t>(errno);
    return p->status == 0 ? 0 : kRefused | static_cast<uint32_t>(p->status);
  }

  uint32_t open_space() {
    uvm = open(kDevice, O_RDWR | O_CLOEXEC);
    mm = open(kDevice, O_RDWR | O_CLOEXEC);
    if (uvm < 0 || mm < 0) return static_cast<uint32_t>(errno);
    Initialize initialize = {};
    if (const uint32_t r = command(uvm, kInitialize, &initialize)) return r;
    MmInitialize mm_initialize = {uvm, 0};
    return command(mm, kMmInitialize, &mm_initialize);
  }

  uint32_t map(uint64_t address, size_t pages) const {
    void* p = mmap(reinterpret_cast<void*>(address), pages * kPage, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED_NOREPLACE, uvm, static_cast<off_t>(address));
    if (p == MAP_FAILED) return static_cast<uint32_t>(errno);
    Range range = {address, pages * kPage, 0};
    return command(uvm, kValidateRange, &range);
  }

  uint32_t map_all() {
    memory = reinterpret_cast<uint8_t*>(UvmRehearsal::kAddress);
    uint32_t r = map(UvmRehearsal::kAddress, UvmRehearsal::kPages);
    for (const uint64_t other : UvmRehearsal::kOthers) {
      if (r == 0) r = map(other, 1);
    }
    return r;
  }

  uint32_t unmap_all() const {
    int r = munmap(memory, UvmRehearsal::kPages * kPage);
    for (const uint64_t other : UvmRehearsal::kOthers) {
      if (r == 0) r = munmap(reinterpret_cast<void*>(other), kPage);
    }
    return r == 0 ? 0 : static_cast<uint32_t>(errno);
  }

  static Range whole() { return {UvmRehearsal::kAddress, UvmRehearsal::kPages * kPage, 0}; }

  uint32_t revoke() const {
    Range range = whole();
    if (const uint32_t r = command(uvm, kEnableReadDuplication, &range)) return r;
    range = whole();
    return command(uvm, kDisableReadDuplication, &range);
  }

  void touch(size_t page) const { *const_cast<volatile uint8_t*>(memory + page * kPage) = 1; }

  uint32_t write_as_debugger() const {
    const uint8_t data[kPage] = {};
    const uint64_t at = UvmRehearsal::kAddress + UvmRehearsal::kDebugged[0] * kPage + kPage / 2;
    ToolsWrite write = {reinterpret_cast<uintptr_t>(data), sizeof data, at, 0, 0};
    return command(uvm, kToolsWrite, &write);
  }

  uint32_t take(UvmRehearsal::Step step) {
    using Step = UvmRehearsal::Step;
    uint32_t r = 0;
    switch (step) {
      case Step::kOpen:
        return open_space();
      case Step::kMap:
        return map_all();
      case Step::kFill:
        for (size_t i = 0; i < UvmRehearsal::kPages; i++) touch(i);
        return 0;
      case Step::kWrite:
        if (r = revoke(); r != 0) return r;
        for (const size_t page : UvmRehearsal::kWritten) touch(page);
        return 0;
      case Step::kDebug:
        if (r = revoke(); r != 0) return r;
        return write_as_debugger();
      case Step::kUnmap:
        return unmap_all();
    }
    return EINVAL;
  }

  [[noreturn]] void serve(int socket) {
    UvmRehearsal::Step step;
    while (read(socket, &step, sizeof step) == sizeof step) {
      const uint32_t answer = take(step);
      if (write(socket, &answer, sizeof answer) != sizeof answer) break;
    }
    _exit(0);
  }
};

[[noreturn]] void serve_alone(int socket) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // Its number is 0 from now on, and no other file is open: not phosd's own spaces of nvidia-uvm.
  if (dup2(socket, 0) != 0 || syscall(SYS_close_range, 1, ~0U, 0) != 0) _exit(1);
  Rehearsing().serve(0);
}

}  // namespace

Result<UvmRehearsal> UvmRehearsal::begin() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return Error::from_errno(errno, "socketpair");
  }
  UniqueFd mine(ends[0]), its(ends[1]);
  const pid_t pid = fork();
  if (pid < 0) return Error::from_errno(errno, "fork");
  if (pid == 0) serve_alone(its.get());
  return UvmRehearsal(pid, std::move(mine));
}

UvmRehearsal::UvmRehearsal(UvmRehearsal&& other) noexcept
    : pid_(std::exchange(other.pid_, -1)), socket_(std::move(other.socket_)) {}

UvmRehearsal::~UvmRehearsal() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  while (waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

Result<void> UvmRehearsal::take(Step step) {
  uint32_t answer = 0;
  pollfd ready = {socket_.get(), POLLIN, 0};
  if (send(socket_.get(), &step, sizeof step, MSG_NOSIGNAL) != sizeof step) {
    return Error::from_errno(errno, "a process of its own");
  }
  if (poll(&ready, 1, kPatienceMs) != 1 ||
      read(socket_.get(), &answer, sizeof answer) != sizeof answer) {
    return Error(Domain::kErrno, ENOTSUP, "a process of its own gives no answer");
  }
  if (answer == 0) return {};
  if (answer & kRefused) {
    return Error(Domain::kErrno, ENOTSUP,
                 "nvidia-uvm refuses, with status " + std::to_string(answer & ~kRefused));
  }
  return Error(Domain::kErrno, ENOTSUP, std::string(kDevice) + ": " + strerror(int(answer)));
}

}  // namespace phos
