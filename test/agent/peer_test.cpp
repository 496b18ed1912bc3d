// SPDX-License-Identifier: GPL-2.0-only
// Memory of one GPU that another one works on, and that the agent releases and brings back.
#include <cstdlib>
#include <fstream>

#include "test/agent/release_fixture.h"
#include "test/agent/target_text.h"

namespace agent_test {
namespace {

constexpr uint64_t kSize = 6 * kMiB;

// A target on a machine with two GPUs; its first context is device 0's primary one.
class PeerTest : public AgentTest {
 protected:
  void SetUp() override {
    std::vector<std::string> environment;
    if (contract::on_simulation()) {
      char pattern[] = "/tmp/phos-peer-XXXXXX";
      ASSERT_NE(mkdtemp(pattern), nullptr);
      dir_ = pattern;
      std::ofstream(dir_ + "/machine")
          << "gpu 000102030405060708090a0b0c0d0e0f 1073741824 Simulated GPU\n"
          << "gpu f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff 1073741824 Simulated GPU\n";
      environment = {"PHOS_SIM_MACHINE=" + dir_ + "/machine"};
    } else {
      AgentTest::SetUp();
      if (IsSkipped() || HasFatalFailure()) return;
    }
    pair_ = std::make_unique<Worker>("cuda", environment);
    loader_ = std::make_unique<Worker>("cuda", environment);
    if (pair_->ask("peer-devices") != "ok 1") {
      GTEST_SKIP() << "no two GPUs here of which one reaches the other's memory";
    }
    block_ = {value_of(ask("alloc " + std::to_string(kSize))), kSize};
    ASSERT_EQ(ask(fill_command(block_.address, kSize, 1)), "ok");
  }
  void TearDown() override {
    pair_.reset();
    loader_.reset();
    if (dir_.empty()) return;
    unlink((dir_ + "/machine").c_str());
    rmdir(dir_.c_str());
  }

  std::string ask(const std::string& command) { return pair_->ask(command); }
  // Away and back as adopted memory, with contents as filled with `seed`.
  void release_and_adopt(int seed) {
    auto agent = Agent::attach(pair_->pid(), restore_tid(pair_->pid()), {});
    ASSERT_TRUE(agent) << agent.error().message();
    auto all = agent->enumerate();
    ASSERT_TRUE(all) << all.error().message();
    auto results = agent->release(of_kind(*all, AllocationKind::kDevice));
    ASSERT_TRUE(results) << results.error().message();
    auto released = agent->map_back(kAdoptAll);
    ASSERT_TRUE(released) << released.error().message();
    EXPECT_EQ(agent->missing_hook(), 0);
    ASSERT_EQ(in_state(*released, ReleasedState::kAdopted).size(), released->size());
    ASSERT_EQ(released->size(), 1u);
    const std::vector<AgentAllocation> memory = {(*released)[0].memory};
    auto exports = agent->export_memory(memory, phos::AgentGuard::kCaller);
    ASSERT_TRUE(exports) << exports.error().message();
    const std::string there = value_of(loader_->ask("vmm-import " + std::to_string(getpid()) + " " +
                                                    std::to_string((*exports)[0].fd.get()) + " " +
                                                    std::to_string(memory[0].mapping_size)));
    ASSERT_EQ(loader_->ask(fill_command(there, kSize, seed)), "ok");
    ASSERT_TRUE(agent->contents_loaded());
  }
  // A kernel of the current context adds one to each element; the host finds what it wrote.
  void expect_reached(int seed, int added) {
    const std::string n = std::to_string(kSize / 4);
    ASSERT_EQ(ask("increment " + block_.address + " " + n), "ok");
    EXPECT_EQ(ask("check " + block_.address + " " + n + " " + std::to_string(seed) + " " +
                  std::to_string(added)),
              "ok 0");
  }
  std::string increment() {
    return ask("increment " + block_.address + " " + std::to_string(kSize / 4));
  }

  std::string dir_;
  std::unique_ptr<Worker> pair_, loader_;
  Block block_;
};

// What the tests below rely on.
TEST_F(PeerTest, WithoutAccessAKernelFails) {
  ASSERT_EQ(ask("use-device 1"), "ok");
  EXPECT_EQ(increment(), "error " + std::to_string(CUDA_ERROR_ILLEGAL_ADDRESS));
}

TEST_F(PeerTest, AccessIsEnabledOnceAndDisabledOnce) {
  ASSERT_EQ(ask("use-device 1"), "ok");
  EXPECT_EQ(ask("peer-access 1"), "ok");
  EXPECT_EQ(ask("peer-access 1"),
            "error " + std::to_string(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED));
  ASSERT_NO_FATAL_FAILURE(expect_reached(1, 1));
  EXPECT_EQ(ask("peer-access 0"), "ok");
  EXPECT_EQ(ask("peer-access 0"), "error " + std::to_string(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED));
  EXPECT_EQ(increment(), "error " + std::to_string(CUDA_ERROR_ILLEGAL_ADDRESS));
}

TEST_F(PeerTest, EnabledBefore) {
  ASSERT_EQ(ask("use-device 1"), "ok");
  ASSERT_EQ(ask("peer-access 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(2));
  ASSERT_NO_FATAL_FAILURE(expect_reached(2, 1));
  // Nothing else has changed for it.
  EXPECT_EQ(ask("peer-access 1"),
            "error " + std::to_string(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED));
  ASSERT_EQ(ask("use-device 0"), "ok");
  EXPECT_EQ(ask("range " + block_.address),
            "ok " + block_.address + " " + std::to_string(kSize) + " 1");
  EXPECT_EQ(ask("free " + block_.address), "ok");
}

// A context that there was not when the memory came back.
TEST_F(PeerTest, EnabledAfterwards) {
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(3));
  ASSERT_EQ(ask("use-device 1"), "ok");
  ASSERT_EQ(ask("peer-access 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(expect_reached(3, 1));
  EXPECT_EQ(ask("peer-access 1"),
            "error " + std::to_string(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED));
  ASSERT_EQ(ask("use-device 0"), "ok");
  EXPECT_EQ(ask("range " + block_.address),
            "ok " + block_.address + " " + std::to_string(kSize) + " 1");
}

// Where the driver's function does not allow for a hook, all GPUs are given access beforehand.
TEST_F(PeerTest, EnabledAfterwardsWithoutAHook) {
  const int pid = pair_->pid();
  const uint64_t entry = in_target(pid, place_of(dlsym(RTLD_DEFAULT, "cuCtxEnablePeerAccess")));
  ASSERT_NE(entry, 0u);
  const uint8_t before = poke(pid, entry, 0x90);  // not a push: nobody knows what could be moved
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(3));
  poke(pid, entry, before);
  ASSERT_EQ(ask("use-device 1"), "ok");
  ASSERT_EQ(ask("peer-access 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(expect_reached(3, 1));
}

// A second dump of the process finds a context that is nobody's primary one, by what it has enabled
// since the first.
TEST_F(PeerTest, EnabledAfterwardsHoldsForTheNextTime) {
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(4));
  ASSERT_EQ(ask("create-context 1"), "ok");
  ASSERT_EQ(ask("peer-access 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(expect_reached(4, 1));
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(5));
  ASSERT_NO_FATAL_FAILURE(expect_reached(5, 1));
}

// No primary context on its GPU, but memory: a variable of its kernels.
TEST_F(PeerTest, EnabledBeforeByACreatedContext) {
  ASSERT_EQ(ask("create-context 1"), "ok");
  ASSERT_EQ(ask("peer-access 1"), "ok");
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(6));
  ASSERT_NO_FATAL_FAILURE(expect_reached(6, 1));
}

// Nobody has asked for the access.
TEST_F(PeerTest, NotEnabledFailsAsBefore) {
  if (!contract::on_simulation())
    GTEST_SKIP() << "whether this driver gives more than was asked for is its own affair";
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(7));
  ASSERT_EQ(ask("use-device 1"), "ok");
  EXPECT_EQ(increment(), "error " + std::to_string(CUDA_ERROR_ILLEGAL_ADDRESS));
}

// Enabling finds nothing that stands in any more.
TEST_F(PeerTest, FreedMemoryIsPassedBy) {
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(8));
  ASSERT_EQ(ask("free " + block_.address), "ok");
  ASSERT_EQ(ask("use-device 1"), "ok");
  EXPECT_EQ(ask("peer-access 1"), "ok");
}

}  // namespace
}  // namespace agent_test
