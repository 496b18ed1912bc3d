// SPDX-License-Identifier: GPL-2.0-only
// cuCheckpointProcess*: states, codes, what blocks and what survives.
#include <dirent.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <future>
#include <sstream>

#include "test/contract/fixture.h"

namespace contract {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// Long enough for anything that is going to happen at once.
constexpr int kSoonMs = 300;

class Checkpoint : public WorkerTest {};

std::string task_file(pid_t pid, int tid, const char* name) {
  std::ifstream f("/proc/" + std::to_string(pid) + "/task/" + std::to_string(tid) + "/" + name);
  std::string line;
  std::getline(f, line);
  return line;
}

// Everything that ties the process to a device: names of open files and mappings.
std::vector<std::string> device_traces(pid_t pid) {
  std::vector<std::string> traces;
  auto judge = [&](const std::string& name) {
    for (const char* sign : {"/dev/nvidia", "userfaultfd", "phos-sim-vram"}) {
      if (name.find(sign) != std::string::npos) traces.push_back(name);
    }
  };
  std::string dir = "/proc/" + std::to_string(pid);
  DIR* fds = opendir((dir + "/fd").c_str());
  while (dirent* entry = fds ? readdir(fds) : nullptr) {
    char target[256];
    ssize_t n = readlink((dir + "/fd/" + entry->d_name).c_str(), target, sizeof target);
    if (n > 0) judge(std::string(target, static_cast<size_t>(n)));
  }
  if (fds) closedir(fds);
  std::ifstream maps(dir + "/maps");
  for (std::string line; std::getline(maps, line);) judge(line);
  return traces;
}

// The permissions of the mapping at `address`; empty if there is none.
std::string permissions_at(pid_t pid, unsigned long address) {
  std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long start = 0, end = 0;
    char perms[5] = "";
    sscanf(line.c_str(), "%lx-%lx %4s", &start, &end, perms);
    if (address >= start && address < end) return perms;
  }
  return "";
}

std::vector<int> all_six(pid_t pid) {
  CUprocessState state;
  int tid;
  return {cuCheckpointProcessGetRestoreThreadId(pid, &tid),
          cuCheckpointProcessGetState(pid, &state),
          lock(pid),
          checkpoint(pid),
          restore(pid),
          unlock(pid)};
}

TEST_F(Checkpoint, RestoreThreadIsNamedAfterItsPipesAndSleepsInPoll) {
  Worker worker;
  int tid = 0;
  ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(worker.pid(), &tid), CUDA_SUCCESS);
  std::string comm = task_file(worker.pid(), tid, "comm");
  ASSERT_EQ(comm.size(), 15u) << comm;
  EXPECT_EQ(comm.substr(0, 4), "cuda");
  unsigned long long fds = std::stoull(comm.substr(4), nullptr, 16);
  for (unsigned long long fd : {fds >> 22, fds & 0x3fffff}) {
    char target[64] = "";
    std::string link = "/proc/" + std::to_string(worker.pid()) + "/fd/" + std::to_string(fd);
    ASSERT_GT(readlink(link.c_str(), target, sizeof target - 1), 0) << link;
    EXPECT_EQ(std::string(target).substr(0, 5), "pipe:");
  }
  constexpr char kPollNumber[] = "7 ";  // x86-64
  std::string call;
  for (int i = 0; i < 5000 && call != kPollNumber; i++) {  // it may still be on its way there
    if (i) usleep(1000);
    call = task_file(worker.pid(), tid, "syscall").substr(0, 2);
  }
  EXPECT_EQ(call, kPollNumber);
}

TEST_F(Checkpoint, ProcessWithoutCudaIsNotInitialized) {
  Worker worker("plain");
  EXPECT_EQ(all_six(worker.pid()), std::vector<int>(6, CUDA_ERROR_NOT_INITIALIZED));
}

TEST_F(Checkpoint, NoSuchProcessIsAnOperatingSystemError) {
  pid_t gone;
  {
    Worker worker("plain");
    gone = worker.pid();
  }
  EXPECT_EQ(all_six(gone), std::vector<int>(6, CUDA_ERROR_OPERATING_SYSTEM));
}

// The thread's name is for everyone to read; talking to it is not.
TEST_F(Checkpoint, NoPermissionIsAnOperatingSystemErrorButForTheThreadId) {
  if (geteuid()) GTEST_SKIP() << "needs root, to become another user";
  Worker target, asker("plain");
  EXPECT_EQ(asker.ask("ask-as-nobody " + std::to_string(target.pid())), "ok 304 0 304");
}

TEST_F(Checkpoint, IllegalStatesAreRefusedAndChangeNothing) {
  Worker worker;
  pid_t pid = worker.pid();
  EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_RUNNING);
  EXPECT_EQ(checkpoint(pid), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(restore(pid), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(unlock(pid), CUDA_ERROR_ILLEGAL_STATE);
  ASSERT_EQ(lock(pid), CUDA_SUCCESS);
  EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_LOCKED);
  EXPECT_EQ(lock(pid), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(restore(pid), CUDA_ERROR_ILLEGAL_STATE);
  ASSERT_EQ(checkpoint(pid), CUDA_SUCCESS);
  EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_CHECKPOINTED);
  EXPECT_EQ(lock(pid), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(checkpoint(pid), CUDA_ERROR_ILLEGAL_STATE);
  EXPECT_EQ(unlock(pid), CUDA_ERROR_ILLEGAL_STATE);
  ASSERT_EQ(restore(pid), CUDA_SUCCESS);
  EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_LOCKED);
  ASSERT_EQ(unlock(pid), CUDA_SUCCESS);
  EXPECT_EQ(state_of(pid), CU_PROCESS_STATE_RUNNING);
}

TEST_F(Checkpoint, LockWaitsForSubmittedWork) {
  constexpr int kSpinMs = 600;
  Worker worker;
  auto begin = steady_clock::now();
  ASSERT_EQ(worker.ask("spin " + std::to_string(kSpinMs)), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_GE(steady_clock::now() - begin, milliseconds(kSpinMs));
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Checkpoint, LockThatTimesOutLeavesTheProcessRunning) {
  Worker worker;
  ASSERT_EQ(worker.ask("spin 3000"), "ok");
  EXPECT_EQ(lock(worker.pid(), 100), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_RUNNING);
  EXPECT_EQ(worker.ask("sync"), "ok");
  EXPECT_EQ(lock(worker.pid(), 30000), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Checkpoint, LockedProcessBlocksInCudaAndRunsOutsideOfIt) {
  Worker worker;
  ASSERT_EQ(worker.ask("pin 4096"), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("ping"), "ok");
  EXPECT_EQ(worker.ask("touch-pinned"), "ok 8");
  worker.send("alloc 4194304");
  EXPECT_EQ(worker.reply(kSoonMs), std::nullopt);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.reply().value_or("").substr(0, 3), "ok ");
}

// So that memory can be listed as it is at the lock.
TEST_F(Checkpoint, LockedProcessCanBeAskedAboutItsMemory) {
  Worker worker;
  const std::string p = value_of(worker.ask("alloc 4194304"));
  const std::string before = worker.ask("attributes " + p);
  EXPECT_EQ(before.substr(0, 11), "ok 4194304 ");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("attributes " + p), before);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Checkpoint, CallBlockedByTheLockFinishesAfterRestore) {
  Worker worker;
  std::string p = value_of(worker.ask("alloc 4194304"));
  ASSERT_EQ(worker.ask("fill " + p + " 1048576 5"), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  worker.send("check " + p + " 1048576 5 0");
  EXPECT_EQ(worker.reply(kSoonMs), std::nullopt);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.reply(), "ok 0");
}

TEST_F(Checkpoint, MemoryComesBackAtTheSameAddressWithTheSameContents) {
  Worker worker;
  std::string big = value_of(worker.ask("alloc 33554432"));
  std::string small = value_of(worker.ask("alloc 4096"));
  std::string vmm = value_of(worker.ask("vmm 4194304"));
  vmm = vmm.substr(0, vmm.find(' '));
  ASSERT_EQ(worker.ask("fill " + big + " 8388608 11"), "ok");
  ASSERT_EQ(worker.ask("fill " + small + " 1024 12"), "ok");
  ASSERT_EQ(worker.ask("fill " + vmm + " 1048576 13"), "ok");
  ASSERT_EQ(worker.ask("pin 4096"), "ok");
  for (int round = 1; round <= 2; round++) {
    ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
    EXPECT_EQ(worker.ask("touch-pinned"), "ok " + std::to_string(7 + round));
    ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(worker.ask("increment " + big + " 8388608"), "ok");
    std::string added = " " + std::to_string(round);
    EXPECT_EQ(worker.ask("check " + big + " 8388608 11" + added), "ok 0");
    EXPECT_EQ(worker.ask("check " + small + " 1024 12 0"), "ok 0");
    EXPECT_EQ(worker.ask("check " + vmm + " 1048576 13 0"), "ok 0");
  }
}

TEST_F(Checkpoint, CheckpointedProcessHoldsNoDeviceButItsAddresses) {
  Worker worker;
  unsigned long p = std::stoul(value_of(worker.ask("alloc 8388608")), nullptr, 16);
  EXPECT_EQ(permissions_at(worker.pid(), p), "---p");
  EXPECT_FALSE(device_traces(worker.pid()).empty());
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_FALSE(device_traces(worker.pid()).empty());
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(device_traces(worker.pid()), std::vector<std::string>{});
  EXPECT_EQ(permissions_at(worker.pid(), p), "---p");
  ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  EXPECT_FALSE(device_traces(worker.pid()).empty());
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Checkpoint, FreedRangeIsReallyUnmapped) {
  Worker worker;
  unsigned long p = std::stoul(value_of(worker.ask("alloc 33554432")), nullptr, 16);
  ASSERT_EQ(permissions_at(worker.pid(), p + (16 << 20)), "---p");
  char text[32];
  snprintf(text, sizeof text, "free %lx", p);
  ASSERT_EQ(worker.ask(text), "ok");
  EXPECT_EQ(permissions_at(worker.pid(), p + (16 << 20)), "");
}

TEST_F(Checkpoint, ManagedMemoryIsNotSupportedAndDoesNoHarm) {
  Worker worker;
  std::string p = value_of(worker.ask("managed 2097152"));
  ASSERT_EQ(worker.ask("fill " + p + " 1024 3"), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(checkpoint(worker.pid()), CUDA_ERROR_NOT_SUPPORTED);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_LOCKED);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("check " + p + " 1024 3 0"), "ok 0");
}

TEST_F(Checkpoint, StoppedProcessAnswersOnceItRuns) {
  Worker worker;
  ASSERT_EQ(kill(worker.pid(), SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(waitpid(worker.pid(), &status, WUNTRACED), worker.pid());
  auto answer = std::async(std::launch::async, [&] { return state_of(worker.pid()); });
  EXPECT_EQ(answer.wait_for(milliseconds(kSoonMs)), std::future_status::timeout);
  ASSERT_EQ(kill(worker.pid(), SIGCONT), 0);
  EXPECT_EQ(answer.get(), CU_PROCESS_STATE_RUNNING);
}

TEST_F(Checkpoint, ForkedChildHasNoCuda) {
  Worker worker;
  std::istringstream reply(value_of(worker.ask("fork")));
  pid_t child = 0;
  int code = 0;
  reply >> child >> code;
  EXPECT_EQ(code, CUDA_ERROR_NOT_INITIALIZED);
  EXPECT_EQ(all_six(child), std::vector<int>(6, CUDA_ERROR_NOT_INITIALIZED));
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_RUNNING);
}

TEST_F(Checkpoint, ManyCallersAreServedOneByOne) {
  Worker worker;
  std::vector<std::future<CUresult>> locks;
  for (int i = 0; i < 8; i++) {
    locks.push_back(std::async(std::launch::async, [&] { return lock(worker.pid()); }));
  }
  int granted = 0, refused = 0;
  for (auto& l : locks) {
    CUresult r = l.get();
    granted += r == CUDA_SUCCESS;
    refused += r == CUDA_ERROR_ILLEGAL_STATE;
  }
  EXPECT_EQ(granted, 1);
  EXPECT_EQ(refused, 7);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

// A process that is checkpointed, and another that has taken nearly all of the GPU since.
class FullGpu : public Checkpoint {
 protected:
  void SetUp() override {
    Checkpoint::SetUp();
    if (IsSkipped()) return;
    // A simulated GPU is shared by processes that name the same machine.
    if (on_simulation()) {
      std::ofstream(machine_) << "gpu " << std::string(32, '1') << " " << kMiB * 1024
                              << " Small GPU\n";
    }
    const std::vector<std::string> environment = {"PHOS_SIM_MACHINE=" + machine_};
    worker_.emplace("cuda", environment);
    other_.emplace("cuda", environment);
    memory_ = value_of(worker_->ask("alloc " + std::to_string(kBytes)));
    ASSERT_EQ(worker_->ask("fill " + memory_ + " " + kNumbers + " 21"), "ok");
    ASSERT_EQ(lock(worker_->pid()), CUDA_SUCCESS);
    ASSERT_EQ(checkpoint(worker_->pid()), CUDA_SUCCESS);
    const uint64_t left = std::stoull(value_of(other_->ask("memory-info")));
    ASSERT_GT(left, kBytes);
    taken_ = value_of(other_->ask("alloc " + std::to_string(left - kBytes / 2)));
  }
  void TearDown() override { unlink(machine_.c_str()); }
  void expect_it_runs_on() {
    EXPECT_EQ(restore(worker_->pid()), CUDA_SUCCESS);
    EXPECT_EQ(unlock(worker_->pid()), CUDA_SUCCESS);
    EXPECT_EQ(worker_->ask("check " + memory_ + " " + kNumbers + " 21 0"), "ok 0");
  }

  static constexpr uint64_t kBytes = 128 * kMiB;
  const std::string kNumbers = std::to_string(kBytes / 4);
  std::optional<Worker> worker_, other_;
  std::string memory_, taken_;

 private:
  const std::string machine_ = testing::TempDir() + "machine-" + std::to_string(getpid());
};

// Measured on 580.159.04: whatever is free by then, it does not come back.
TEST_F(FullGpu, RestoreThatFindsItLosesTheProcess) {
  EXPECT_EQ(restore(worker_->pid()), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(state_of(worker_->pid()), CU_PROCESS_STATE_CHECKPOINTED);
  ASSERT_EQ(other_->ask("free " + taken_), "ok");
  for (int i = 0; i < 2; i++) {
    EXPECT_EQ(restore(worker_->pid()), CUDA_ERROR_OPERATING_SYSTEM);
    EXPECT_EQ(state_of(worker_->pid()), CU_PROCESS_STATE_CHECKPOINTED);
    EXPECT_EQ(unlock(worker_->pid()), CUDA_ERROR_ILLEGAL_STATE);
  }
}

TEST_F(FullGpu, RestoreOnceThereIsRoomIsAsEver) {
  ASSERT_EQ(other_->ask("free " + taken_), "ok");
  expect_it_runs_on();
}

TEST_F(FullGpu, MemoryOfAProcessThatHasEndedIsFree) {
  other_.reset();
  expect_it_runs_on();
}

TEST_F(Checkpoint, RestoreAcceptsAPairForEveryGpu) {
  if (cuInit(0)) GTEST_SKIP() << "cuInit fails in the test process";
  std::vector<CUcheckpointGpuPair> pairs;
  int count = 0;
  ASSERT_EQ(cuDeviceGetCount(&count), CUDA_SUCCESS);
  for (int i = 0; i < count; i++) {
    CUuuid uuid;
    ASSERT_EQ(cuDeviceGetUuid_v2(&uuid, i), CUDA_SUCCESS);
    pairs.push_back({uuid, uuid});
  }
  CUcheckpointRestoreArgs args = {};
  args.gpuPairs = pairs.data();
  args.gpuPairsCount = static_cast<unsigned>(pairs.size());
  Worker worker;
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(cuCheckpointProcessRestore(worker.pid(), &args), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

}  // namespace
}  // namespace contract
