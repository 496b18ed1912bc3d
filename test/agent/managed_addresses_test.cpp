// SPDX-License-Identifier: GPL-2.0-only
// Managed memory comes back to its addresses, wherever those are (gpu-tracker/agent/refill.c).
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <random>
#include <set>

#include "test/agent/managed_fixture.h"

namespace agent_test {
namespace {

constexpr uint64_t kRegion = 32 * kMiB;

TEST_F(ManagedAddresses, SmallOnes) {
  for (const uint64_t size : {4, 4096, 65536, 700, 1048576, 512}) add(size);
  EXPECT_EQ(at(5) / (2 * kMiB), at(0) / (2 * kMiB));
  expect_back();
}

// Of which the first ones in their chunk are free, or all but the last.
TEST_F(ManagedAddresses, SmallOnesWithGaps) {
  for (int i = 0; i < 24; i++) add(200000);
  for (const size_t i : {18, 17, 9, 5, 4, 2, 0}) remove(i);
  expect_back();
}

TEST_F(ManagedAddresses, SmallOnesAmongLargeOnes) {
  for (int i = 0; i < 8; i++) {
    add(4);
    add(3 * kMiB);
    add(1500000);
    add(2 * kMiB + 4);
  }
  for (const size_t i : {20, 13, 6, 3, 0}) remove(i);
  expect_back();
}

TEST_F(ManagedAddresses, GapAtTheBeginning) {
  add(6 * kMiB);
  add(4 * kMiB);
  remove(0);
  EXPECT_EQ(at(0) % kRegion, 6 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, GapInTheMiddle) {
  for (int i = 0; i < 3; i++) add(6 * kMiB);
  remove(1);
  expect_back();
}

TEST_F(ManagedAddresses, AllButTheEndIsFree) {
  add(30 * kMiB);
  add(100);
  remove(0);
  EXPECT_EQ(at(0) % kRegion, 30 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, EndsWithItsRegion) {
  add(6 * kMiB);
  add(26 * kMiB);
  EXPECT_EQ((at(1) + 26 * kMiB) % kRegion, 0u);
  expect_back();
}

TEST_F(ManagedAddresses, FillsARegion) {
  add(64 * kMiB);
  expect_back();
}

// What has made it has gone since.
TEST_F(ManagedAddresses, RegionIsLargerThanWhatIsInIt) {
  add(100 * kMiB);
  add(8 * kMiB);
  add(4);
  remove(0);
  add(5 * kMiB);
  EXPECT_EQ(at(2), at(0) + 10 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, RegionIsLargerAndItsBeginningIsInUse) {
  add(100 * kMiB);
  add(28 * kMiB);
  const uint64_t begin = at(0);
  remove(0);
  add(4);
  EXPECT_EQ(at(1), begin);
  add(28 * kMiB);
  expect_back();
}

TEST_F(ManagedAddresses, SeveralRegions) {
  for (int i = 0; i < 5; i++) add(20 * kMiB);
  for (int i = 0; i < 3; i++) add(40 * kMiB);
  add(4);
  for (int i = 0; i < 4; i++) add(9 * kMiB);
  remove(6);
  remove(2);
  expect_back();
}

TEST_F(ManagedAddresses, ThousandsOfSmallOnes) {
  std::minstd_rand random(4712);
  for (int i = 0; i < 3000; i++) blocks_.push_back(allocate_managed(4 + random() % 8000));
  for (size_t i = blocks_.size(); i-- > 0;) {
    if (random() % 3 == 0) {
      ASSERT_EQ(target_.ask("free " + blocks_[i].address), "ok");
      blocks_.erase(blocks_.begin() + static_cast<long>(i));
    }
  }
  seeds_.assign(blocks_.size(), 1);
  for (const Block& b : blocks_) ASSERT_EQ(target_.ask(fill_command(b.address, b.size, 1)), "ok");
  auto agent = attach();
  ASSERT_NO_FATAL_FAILURE(go_and_come_back(*agent, true, 1));
}

TEST_F(ManagedAddresses, RandomMix) {
  std::minstd_rand random(4713);
  std::vector<Block> device;
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 40; i++) {
      const uint64_t kind = random() % 8;
      const uint64_t size = kind == 0   ? 1 + random() % 5000
                            : kind == 1 ? 1 + random() % (2 * kMiB)
                            : kind == 2 ? kRegion * (1 + random() % 2)
                                        : kMiB + random() % (18 * kMiB);
      if (random() % 4) {
        add(size & ~3ull ? size & ~3ull : 4);
      } else {
        device.push_back(allocate(size));
      }
      if (random() % 2 == 0 && !blocks_.empty()) remove(random() % blocks_.size());
      if (random() % 6 == 0 && !device.empty()) {
        const size_t gone = random() % device.size();
        ASSERT_EQ(target_.ask("free " + device[gone].address), "ok");
        device.erase(device.begin() + static_cast<long>(gone));
      }
    }
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_TRUE(agent->release(large(*agent)));
    ASSERT_NO_FATAL_FAILURE(go_and_come_back(*agent, round % 2, round / 2));
    EXPECT_TRUE(agent->unload());
  }
}

class ManagedOnTwoDevices : public ManagedAddresses {
 protected:
  static void SetUpTestSuite() {
    machine() = testing::TempDir() + "managed-machine-" + std::to_string(getpid());
    std::ofstream out(machine());
    for (const char digit : {'1', '2'}) {
      out << "gpu " << std::string(32, digit) << " " << (uint64_t{4} << 30) << " GPU\n";
    }
    setenv("PHOS_SIM_MACHINE", machine().c_str(), 1);
  }
  static void TearDownTestSuite() {
    unsetenv("PHOS_SIM_MACHINE");
    unlink(machine().c_str());
  }
  static std::string& machine() {
    static std::string path;
    return path;
  }
};

TEST_F(ManagedOnTwoDevices, ComesBackToItsOwn) {
  if (target_.ask("use-device 1") != "ok") GTEST_SKIP() << "one device only";
  std::minstd_rand random(4714);
  for (int i = 0; i < 60; i++) {
    ASSERT_EQ(target_.ask("use-device " + std::to_string(random() % 2)), "ok");
    add(random() % 2 ? 4 + random() % 500000 : kMiB + random() % (12 * kMiB));
    if (random() % 3 == 0) remove(random() % blocks_.size());
  }
  std::set<int> devices;
  auto agent = attach();
  for (const AgentAllocation& a : managed(*agent)) devices.insert(a.device);
  EXPECT_EQ(devices.size(), 2u);
  EXPECT_TRUE(agent->unload());
  expect_back();
}

// Something fails, once: nothing is lost.
class FaultyManaged : public ManagedAddresses, public testing::WithParamInterface<int> {
 protected:
  static void SetUpTestSuite() {
    faults() = testing::TempDir() + "managed-faults-" + std::to_string(getpid());
    setenv("PHOS_SIM_FAULTS", faults().c_str(), 1);
  }
  static void TearDownTestSuite() { unsetenv("PHOS_SIM_FAULTS"); }

  void SetUp() override {
    ManagedAddresses::SetUp();
    if (IsSkipped()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "a real driver does not fail on request";
    for (const uint64_t size : {4 * kMiB, uint64_t{4}, uint64_t{70000}, 3 * kMiB, uint64_t{700},
                                60 * kMiB, uint64_t{1500000}, 3 * kMiB, uint64_t{1000000}}) {
      add(size);
    }
    for (const size_t i : {3, 1}) remove(i);
  }
  void TearDown() override { unlink(faults().c_str()); }

  static std::string& faults() {
    static std::string path;
    return path;
  }
  static void fail(const std::string& function, int nth, int result) {
    std::ofstream(faults()) << function << " " << nth << " " << result << "\n";
  }

  void expect_back(Agent& agent, const std::vector<Bytes>& contents) {
    unlink(faults().c_str());
    const auto back = map_back(agent);
    ASSERT_LE(back.size(), contents.size());
    ASSERT_NO_FATAL_FAILURE(load(agent, back, contents));
    ASSERT_TRUE(agent.contents_loaded());
    expect_all();
    ASSERT_NO_FATAL_FAILURE(go_and_come_back(agent, true, 0));
  }

  static constexpr int kFrees = 2, kAllocations = 9;  // calls before
};

TEST_P(FaultyManaged, OneCannotBeFreed) {
  auto agent = attach();
  const auto memory = managed(*agent);
  const auto contents = read(*agent, memory, true);
  fail("cuMemFree", kFrees + 1 + GetParam(), 999);
  auto results = agent->release(memory);
  ASSERT_TRUE(results);
  const auto n = static_cast<size_t>(GetParam());
  for (size_t i = 0; i < memory.size(); i++) {
    const ReleaseStatus status = (*results)[i].status;
    if (i < n) {
      EXPECT_TRUE(status == ReleaseStatus::kReleased || status == ReleaseStatus::kReallocated)
          << i << " " << static_cast<int>(status);
    } else {
      EXPECT_EQ(status, i == n ? ReleaseStatus::kFailed : ReleaseStatus::kNotReached) << i;
    }
  }
  expect_back(*agent, contents);
}

TEST_P(FaultyManaged, OneCannotBeAllocated) {
  auto agent = attach();
  const auto memory = managed(*agent);
  const auto contents = read(*agent, memory, true);
  ASSERT_NO_FATAL_FAILURE(release(*agent, memory));
  fail("cuMemAllocManaged", kAllocations + 1 + GetParam(), 2);
  auto back = agent->map_back();
  ASSERT_TRUE(back) << back.error().message();
  for (const ReleasedMemory& m : *back) {
    EXPECT_TRUE(m.state == ReleasedState::kNative || m.state == ReleasedState::kReserved);
  }
  expect_back(*agent, contents);
}

TEST_P(FaultyManaged, OneOfManyCannotBeFreed) {
  std::minstd_rand random(static_cast<unsigned>(GetParam()) + 1);
  int frees = kFrees;
  for (int i = 0; i < 60; i++) {
    add(random() % 2 ? 4 + random() % 300000 : kMiB + random() % (8 * kMiB));
    if (random() % 5 < 2) {
      remove(random() % blocks_.size());
      frees++;
    }
  }
  auto agent = attach();
  const auto memory = managed(*agent);
  const auto contents = read(*agent, memory, true);
  fail("cuMemFree", frees + 1 + static_cast<int>(random() % memory.size()), 999);
  ASSERT_TRUE(agent->release(memory));
  expect_back(*agent, contents);
}

INSTANTIATE_TEST_SUITE_P(Each, FaultyManaged, testing::Range(0, 7));

}  // namespace
}  // namespace agent_test
