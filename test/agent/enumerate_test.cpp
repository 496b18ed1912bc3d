// SPDX-License-Identifier: GPL-2.0-only
// What the agent finds. Expected values come from the process itself: the addresses and sizes that
// it was given by the driver.
#include <sys/resource.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <optional>

#include "test/agent/fixture.h"

namespace agent_test {
namespace {

// A process on a simulated GPU that has room for them.
class ManyAllocations : public contract::WorkerTest {
 protected:
  void SetUp() override {
    contract::WorkerTest::SetUp();
    if (IsSkipped()) return;
    std::ofstream(machine_) << "gpu " << std::string(32, '1') << " " << (uint64_t{64} << 30)
                            << " Big GPU\n";
    target_.emplace("cuda", std::vector<std::string>{"PHOS_SIM_MACHINE=" + machine_});
  }
  void TearDown() override { unlink(machine_.c_str()); }
  Worker& target() { return *target_; }

 private:
  const std::string machine_ = testing::TempDir() + "machine-" + std::to_string(getpid());
  std::optional<Worker> target_;
};

TEST_F(AgentTest, FindsEachKindWithItsSize) {
  const uint64_t device = address_of(value_of(target_.ask("alloc 6291456")));
  const uint64_t odd = address_of(value_of(target_.ask("alloc 5000001")));
  const uint64_t small = address_of(value_of(target_.ask("alloc 1000")));
  const uint64_t plain = address_of(value_of(target_.ask("map 4194304 0 1")));
  const uint64_t exportable = address_of(value_of(target_.ask("map 4194304 1 1")));
  const uint64_t pool = address_of(value_of(target_.ask("alloc-async 4194304")));
  const uint64_t managed = address_of(value_of(target_.ask("managed 4194304")));
  const auto all = enumerate();

  const struct {
    uint64_t address, size;
    AllocationKind kind;
    ExportType type;
  } expected[] = {
      {device, 6 * kMiB, AllocationKind::kDevice, ExportType::kIpc},
      {odd, 5000001, AllocationKind::kDevice, ExportType::kIpc},
      {small & ~(2 * kMiB - 1), 2 * kMiB, AllocationKind::kSmall, ExportType::kNone},
      {plain, 4 * kMiB, AllocationKind::kVmm, ExportType::kNone},
      {exportable, 4 * kMiB, AllocationKind::kVmm, ExportType::kFd},
      {managed, 4 * kMiB, AllocationKind::kManaged, ExportType::kNone},
  };
  CUuuid uuid;
  ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
  ASSERT_EQ(cuDeviceGetUuid_v2(&uuid, 0), CUDA_SUCCESS);
  for (auto& e : expected) {
    const AgentAllocation* a = at(all, e.address);
    ASSERT_NE(a, nullptr) << std::hex << e.address << " " << to_string(e.kind);
    EXPECT_EQ(a->size, e.size) << to_string(e.kind);
    EXPECT_EQ(to_string(a->kind), to_string(e.kind));
    EXPECT_EQ(a->export_type, e.type) << to_string(e.kind);
    EXPECT_EQ(a->device, 0);
    EXPECT_EQ(memcmp(a->device_uuid.data(), uuid.bytes, sizeof uuid.bytes), 0);
  }
  const auto pools = of_kind(all, AllocationKind::kPool);
  ASSERT_EQ(pools.size(), 1u);
  EXPECT_LE(pools[0].address, pool);
  EXPECT_GE(pools[0].address + pools[0].size, pool + 4 * kMiB);
  EXPECT_EQ(pools[0].export_type, ExportType::kNone);
  for (size_t i = 1; i < all.size(); i++) {
    EXPECT_GE(all[i].address, all[i - 1].address + all[i - 1].size);
  }
}

TEST_F(AgentTest, PiecesOfOneReservationAreSeparate) {
  // Three pieces of 4 MiB; the middle one is unmapped again.
  const uint64_t base = address_of(value_of(target_.ask("map 4194304 1 3")));
  char unmap[64];
  snprintf(unmap, sizeof unmap, "unmap %llx 4194304",
           static_cast<unsigned long long>(base + 4 * kMiB));
  ASSERT_EQ(target_.ask(unmap), "ok");
  const auto vmm = of_kind(enumerate(), AllocationKind::kVmm);
  ASSERT_EQ(vmm.size(), 2u);
  EXPECT_EQ(vmm[0].address, base);
  EXPECT_EQ(vmm[0].size, 4 * kMiB);
  EXPECT_EQ(vmm[1].address, base + 8 * kMiB);
  EXPECT_EQ(vmm[1].size, 4 * kMiB);
}

TEST_F(AgentTest, NewMemoryAtAnOldAddressHasAnotherId) {
  const std::string address = value_of(target_.ask("map 4194304 1 1"));
  const auto before = enumerate();
  ASSERT_EQ(target_.ask("remap " + address + " 4194304"), "ok");
  const auto after = enumerate();
  const AgentAllocation* a = at(before, address_of(address));
  const AgentAllocation* b = at(after, address_of(address));
  ASSERT_TRUE(a && b);
  EXPECT_NE(a->buffer_id, b->buffer_id);
}

TEST_F(AgentTest, ImportedMemoryIsNotTakenForOwn) {
  Worker exporter;
  const std::string address = value_of(exporter.ask("alloc 4194304"));
  const std::string handle = value_of(exporter.ask("ipc-export " + address));
  const uint64_t imported = address_of(value_of(target_.ask("ipc-import " + handle)));
  const auto all = enumerate();
  const AgentAllocation* a = at(all, imported);
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(to_string(a->kind), to_string(AllocationKind::kImported));
  EXPECT_EQ(a->export_type, ExportType::kNone);
}

// Of the agent's thread, on a processor: what else the machine does is not counted.
std::chrono::nanoseconds time_of(pid_t tid) {
  uint64_t ns = 0;
  std::ifstream("/proc/" + std::to_string(tid) + "/schedstat") >> ns;
  return std::chrono::nanoseconds(ns);
}

// The second scan looks at ten times as many; in proportion to their square it would take a
// hundred times as long.
TEST_F(ManyAllocations, TakeTimeInProportion) {
  std::chrono::nanoseconds time[2];
  rlimit files;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &files), 0);
  // On the simulation each takes a descriptor.
  const size_t many = std::min<size_t>(20000, files.rlim_max - 200);
  size_t expected = 0;
  for (int i = 0; i < 2; i++) {
    const size_t more = i ? many - many / 10 : many / 10;
    ASSERT_EQ(target().ask("alloc-many " + std::to_string(more) + " 2097152"), "ok");
    expected += more;
    auto agent = Agent::attach(target().pid(), restore_tid(target().pid()));
    ASSERT_TRUE(agent) << agent.error().message();
    const pid_t thread = find_thread(target().pid(), PHOS_AGENT_THREAD_NAME);
    time[i] = std::chrono::hours(1);
    for (int run = 0; run < 3; run++) {
      const auto before = time_of(thread);
      auto all = agent->enumerate();
      const auto after = time_of(thread);
      ASSERT_TRUE(all) << all.error().message();
      EXPECT_EQ(of_kind(*all, AllocationKind::kDevice).size(), expected);
      if (after == before) GTEST_SKIP() << "this kernel does not tell how long a thread has run";
      time[i] = std::min(time[i], after - before);
    }
  }
  EXPECT_LT(time[1].count(), time[0].count() * 40) << time[0].count() << " ns for a tenth";
}

}  // namespace
}  // namespace agent_test
