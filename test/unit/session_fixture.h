// SPDX-License-Identifier: GPL-2.0-only
// phosd's session over a driver that keeps its state in this process and fails on request. The
// "target" is a real process, because the session looks at /proc.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <string>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/session.h"

namespace phos {

using State = CudaState;

// One CUDA process, by the driver's rules (test/contract holds the real one against them).
class FakeDriver final : public GpuDriver {
 public:
  int cuda_pid = -1;
  State now = State::kRunning;
  uint64_t imported = 0;
  bool knows_memory = true;
  bool managed = false;
  int lock_error = 0;
  std::atomic<int> restore_error{0};
  std::atomic<uint64_t> free{uint64_t{1} << 30};
  // A restore that finds less free than is needed loses the process (test/contract, FullGpu).
  std::atomic<bool> too_little{false};
  bool lost = false;
  std::atomic<int> restores{0};  // tried
  std::vector<GpuPair> pairs_used;
  GpuUuid uuid{1, 2, 3};

  Result<int> api_version() override { return 13000; }
  Result<std::string> release() override { return std::string("580.0"); }
  Result<std::vector<GpuInfo>> gpus() override {
    return std::vector<GpuInfo>{{uuid, "Fake GPU", 1 << 30}};
  }
  Result<ProcessMemory> process_memory(int) override {
    if (!knows_memory) return Error(Domain::kErrno, ENOENT, "no such driver");
    ProcessMemory memory;
    memory.own = 100;
    memory.imported = imported;
    memory.own_on[uuid] = memory.own;
    return memory;
  }
  Result<uint64_t> free_memory(const GpuUuid&) override { return free.load(); }
  Result<int> restore_thread_id(int pid) override {
    if (pid != cuda_pid) return cuda(kCudaErrorNotInitialized);
    return pid;
  }
  Result<State> state(int pid) override {
    if (pid != cuda_pid) return cuda(kCudaErrorNotInitialized);
    return now;
  }
  Result<void> lock(int pid, unsigned) override {
    if (lock_error) return cuda(lock_error);
    return step(pid, State::kRunning, State::kLocked);
  }
  Result<void> checkpoint(int pid) override {
    if (managed) return cuda(kCudaErrorNotSupported);
    return step(pid, State::kLocked, State::kCheckpointed);
  }
  Result<void> restore(int pid, const std::vector<GpuPair>& pairs) override {
    restores++;
    if (restore_error) return cuda(restore_error);
    if (lost) return cuda(kCudaErrorOperatingSystem);
    lost = too_little;
    if (lost) return cuda(kCudaErrorOutOfMemory);
    pairs_used = pairs;
    return step(pid, State::kCheckpointed, State::kLocked);
  }
  Result<void> unlock(int pid) override { return step(pid, State::kLocked, State::kRunning); }

 private:
  static Error cuda(int code) { return Error(Domain::kCuda, code, "fake " + std::to_string(code)); }
  Result<void> step(int pid, State from, State to) {
    if (pid != cuda_pid) return cuda(kCudaErrorNotInitialized);
    if (now != from) return cuda(kCudaErrorIllegalState);
    now = to;
    return {};
  }
};

class SessionTest : public testing::Test {
 protected:
  SessionTest() {
    set_log_sink([](LogLevel, const std::string&) {});
    char path[] = "/tmp/phos-session-XXXXXX";
    dir_ = mkdtemp(path);
    std::filesystem::create_directory(dir_ + "/images");
    std::filesystem::create_directory(dir_ + "/lock");
    pid_ = fork();
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that is killed leaves nothing behind
      for (;;) ::pause();
    }
    driver_.cuda_pid = pid_;
  }
  ~SessionTest() override {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    std::filesystem::remove_all(dir_);
  }

  UniqueFd images() const { return UniqueFd(open((dir_ + "/images").c_str(), O_RDONLY)); }
  size_t image_count() const {
    size_t n = 0;
    for (const auto& entry : std::filesystem::directory_iterator(dir_ + "/images")) {
      n += entry.path().filename().string().rfind("phos-", 0) == 0;
    }
    return n;
  }
  std::string lock_dir() const { return dir_ + "/lock"; }

  // What a dump does, up to the first failure. True if all went well.
  bool dump(Session& session) {
    return session.begin_dump(images()) && pause(session) && session.checkpoint(pid_);
  }
  // Finds and locks the one process.
  bool pause(Session& session) {
    auto found = session.inspect(pid_);
    return found && found->size() == 1 && session.lock(1000);
  }

  FakeDriver driver_;
  std::string dir_;
  pid_t pid_ = -1;
};

}  // namespace phos
