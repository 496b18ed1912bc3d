// SPDX-License-Identifier: GPL-2.0-only
// What only the simulation has: a machine description and failures on request.
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <future>
#include <sstream>

#include "test/contract/fixture.h"

namespace contract {
namespace {

constexpr char kUuidA[] = "000102030405060708090a0b0c0d0e0f";
constexpr char kUuidB[] = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";

CUuuid uuid_of(const std::string& hex) {
  CUuuid uuid;
  for (int i = 0; i < 16; i++) {
    uuid.bytes[i] = static_cast<char>(std::stoi(hex.substr(i * 2, 2), nullptr, 16));
  }
  return uuid;
}

// Workers that read their own machine and fault files.
class Simulation : public testing::Test {
 protected:
  void SetUp() override {
    if (!on_simulation()) GTEST_SKIP() << "the real driver takes no orders from a file";
    char pattern[] = "/tmp/phos-contract-XXXXXX";
    ASSERT_NE(mkdtemp(pattern), nullptr);
    dir_ = pattern;
  }
  void TearDown() override {
    if (dir_.empty()) return;
    unlink((dir_ + "/machine").c_str());
    unlink((dir_ + "/faults").c_str());
    unlink((dir_ + "/faults.held").c_str());
    rmdir(dir_.c_str());
  }
  std::vector<std::string> environment() const {
    return {"PHOS_SIM_MACHINE=" + dir_ + "/machine", "PHOS_SIM_FAULTS=" + dir_ + "/faults"};
  }
  void write_file(const char* name, const std::string& text) {
    std::ofstream(dir_ + "/" + name) << text;
  }
  std::string read_file(const char* name) {
    std::stringstream text;
    text << std::ifstream(dir_ + "/" + name).rdbuf();
    return text.str();
  }
  void machine_has(const char* uuid) {
    write_file("machine", std::string("gpu ") + uuid + " 1073741824 Simulated GPU for tests\n");
  }
  std::string dir_;
};

TEST_F(Simulation, RestoreNeedsTheRecordedGpu) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  std::string p = value_of(worker.ask("alloc 4194304"));
  ASSERT_EQ(worker.ask("fill " + p + " 1024 1"), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  machine_has(kUuidB);
  EXPECT_EQ(restore(worker.pid()), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_CHECKPOINTED);
  machine_has(kUuidA);
  ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(worker.ask("check " + p + " 1024 1 0"), "ok 0");
}

TEST_F(Simulation, PairsMoveTheProcessToAnotherGpu) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  machine_has(kUuidB);
  CUcheckpointGpuPair pair = {uuid_of(kUuidA), uuid_of(kUuidB)};
  CUcheckpointRestoreArgs args = {};
  args.gpuPairs = &pair;
  args.gpuPairsCount = 1;
  EXPECT_EQ(cuCheckpointProcessRestore(worker.pid(), &args), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  // B is what it is on now.
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Simulation, FaultComesAtItsCallAndOnlyThere) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  write_file("faults", "cuCheckpointProcessCheckpoint 1 999\ncuMemAlloc 2 2\n");
  EXPECT_EQ(worker.ask("alloc 4096").substr(0, 2), "ok");
  EXPECT_EQ(worker.ask("alloc 4096"), "error 2");
  EXPECT_EQ(worker.ask("alloc 4096").substr(0, 2), "ok");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(checkpoint(worker.pid()), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_LOCKED);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  write_file("faults", "cuCheckpointProcessRestore * 999\n");
  EXPECT_EQ(restore(worker.pid()), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(restore(worker.pid()), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_CHECKPOINTED);
  write_file("faults", "");
  EXPECT_EQ(restore(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

// As one that finds too little by itself (FullGpu).
TEST_F(Simulation, RestoreToldToFindTooLittleMemoryLosesTheProcess) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
  write_file("faults", "cuCheckpointProcessRestore 1 2\n");
  EXPECT_EQ(restore(worker.pid()), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(restore(worker.pid()), CUDA_ERROR_OPERATING_SYSTEM);
  EXPECT_EQ(state_of(worker.pid()), CU_PROCESS_STATE_CHECKPOINTED);
}

TEST_F(Simulation, SlowCallWorksInTheEnd) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  write_file("faults", "cuCheckpointProcessLock 1 slow:400\n");
  auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(400));
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
}

TEST_F(Simulation, HeldCallSaysSoAndWorksOnceItIsLetGo) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  write_file("faults", "cuCheckpointProcessLock 1 hold\ncuCheckpointProcessLock 2 999\n");
  auto answer = std::async(std::launch::async, [&] { return lock(worker.pid()); });
  const std::string expected = std::to_string(worker.pid()) + " cuCheckpointProcessLock 1\n";
  while (read_file("faults.held") != expected) usleep(1000);
  EXPECT_EQ(answer.wait_for(std::chrono::milliseconds(100)), std::future_status::timeout);
  write_file("faults", "cuCheckpointProcessLock 2 999\n");
  EXPECT_EQ(answer.get(), CUDA_SUCCESS);
  EXPECT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(lock(worker.pid()), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(read_file("faults.held"), expected);
}

TEST_F(Simulation, HangEndsWithTheTarget) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  write_file("faults", "cuCheckpointProcessLock 1 hang\n");
  auto answer = std::async(std::launch::async, [&] { return lock(worker.pid()); });
  EXPECT_EQ(answer.wait_for(std::chrono::milliseconds(300)), std::future_status::timeout);
  kill(worker.pid(), SIGKILL);
  EXPECT_EQ(answer.get(), CUDA_ERROR_OPERATING_SYSTEM);
}

TEST_F(Simulation, ExitKillsTheTargetAndTheCallerLearnsIt) {
  machine_has(kUuidA);
  Worker worker("cuda", environment());
  write_file("faults", "cuCheckpointProcessCheckpoint 1 exit\n");
  ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
  EXPECT_EQ(checkpoint(worker.pid()), CUDA_ERROR_OPERATING_SYSTEM);
  std::optional<int> status = worker.wait_death();
  ASSERT_TRUE(status.has_value());
  EXPECT_TRUE(WIFSIGNALED(*status));
}

TEST_F(Simulation, AccountingTellsOwnFromImportedMemory) {
  using Accounting = int (*)(int pid, uint64_t* own, uint64_t* imported);
  auto memory_of = reinterpret_cast<Accounting>(dlsym(RTLD_DEFAULT, "phos_sim_memory"));
  ASSERT_NE(memory_of, nullptr);
  Worker exporter, importer;
  uint64_t before = 0, own = 0, imported = 0;
  ASSERT_EQ(memory_of(importer.pid(), &before, &imported), 0);
  EXPECT_EQ(imported, 0u);
  std::string p = value_of(exporter.ask("alloc 4194304"));
  ASSERT_EQ(importer.ask("ipc-import " + value_of(exporter.ask("ipc-export " + p))).substr(0, 2),
            "ok");
  ASSERT_EQ(memory_of(importer.pid(), &own, &imported), 0);
  EXPECT_EQ(own, before);
  EXPECT_EQ(imported, 4 * kMiB);
  ASSERT_EQ(memory_of(exporter.pid(), &own, &imported), 0);
  EXPECT_EQ(own, before + 4 * kMiB);
  EXPECT_EQ(imported, 0u);
}

TEST_F(Simulation, GpuIsSharedByProcessesOfOneMachine) {
  machine_has(kUuidA);
  Worker one("cuda", environment()), other("cuda", environment()), elsewhere;
  const auto free_to = [](Worker& w) { return std::stoull(value_of(w.ask("memory-info"))); };
  const uint64_t before = free_to(one), apart = free_to(elsewhere);
  const std::string p = value_of(other.ask("alloc " + std::to_string(before - 4 * kMiB)));
  EXPECT_EQ(free_to(one), 4 * kMiB);
  EXPECT_EQ(one.ask("alloc " + std::to_string(6 * kMiB)), "error 2");
  EXPECT_EQ(free_to(elsewhere), apart);
  ASSERT_EQ(lock(other.pid()), CUDA_SUCCESS);
  EXPECT_EQ(free_to(one), 4 * kMiB);
  ASSERT_EQ(checkpoint(other.pid()), CUDA_SUCCESS);
  EXPECT_GE(free_to(one), before);
  ASSERT_EQ(restore(other.pid()), CUDA_SUCCESS);
  EXPECT_EQ(free_to(one), 4 * kMiB);
  ASSERT_EQ(unlock(other.pid()), CUDA_SUCCESS);
  ASSERT_EQ(other.ask("free " + p), "ok");
  EXPECT_EQ(free_to(one), before);
}

}  // namespace
}  // namespace contract
