// SPDX-License-Identifier: GPL-2.0-only
// A process with several contexts on one device. Which context memory is of, the process itself
// knows: it has made them.
#include "test/agent/release_fixture.h"

namespace agent_test {
namespace {

constexpr int kContexts = 3;  // the primary one first

class ContextsTest : public ReleaseTest {
 protected:
  uint64_t use(int context) {
    return address_of(value_of(target_.ask("context " + std::to_string(context))));
  }
  uint64_t free_memory() { return std::stoull(value_of(target_.ask("memory-info"))); }
};

TEST_F(ContextsTest, MemoryIsListedWithItsContext) {
  const Footprint before = footprint(target_.pid());
  struct Memory {
    uint64_t context, device, small, vmm;
  } made[kContexts];
  for (int i = 0; i < kContexts; i++) {
    made[i].context = use(i);
    made[i].device = address_of(allocate((4 + i) * kMiB).address);
    made[i].small = address_of(allocate(1000).address);
    made[i].vmm = address_of(value_of(target_.ask("map 2097152 1 1")));
    for (int j = 0; j < i; j++) ASSERT_NE(made[i].context, made[j].context);
  }
  const Footprint now = footprint(target_.pid());
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  auto all = agent->enumerate();
  ASSERT_TRUE(all) << all.error().message();
  EXPECT_EQ(of_kind(*all, AllocationKind::kDevice).size(), size_t{kContexts});
  for (int i = 0; i < kContexts; i++) {
    const AgentAllocation* device = at(*all, made[i].device);
    ASSERT_NE(device, nullptr) << i;
    EXPECT_EQ(device->size, (4 + i) * kMiB);
    EXPECT_EQ(device->context, made[i].context) << i;
    EXPECT_EQ(device->device, 0);
    EXPECT_EQ(device->export_type, ExportType::kIpc);
    const AgentAllocation* vmm = at(*all, made[i].vmm);
    ASSERT_NE(vmm, nullptr) << i;
    EXPECT_EQ(vmm->export_type, ExportType::kFd);
    // Small ones lie in blocks of 2 MiB, of one context each.
    int blocks = 0;
    for (const AgentAllocation& a : of_kind(*all, AllocationKind::kSmall)) {
      if (a.address > made[i].small || made[i].small >= a.address + a.size) continue;
      blocks++;
      EXPECT_EQ(a.context, made[i].context) << i;
    }
    EXPECT_EQ(blocks, 1) << i;
  }
  ASSERT_TRUE(agent->unload());
  EXPECT_EQ(footprint(target_.pid()), now);
  for (int i = 1; i < kContexts; i++) {
    ASSERT_EQ(target_.ask("end-context " + std::to_string(i)), "ok");
  }
  EXPECT_EQ(footprint(target_.pid()).threads, before.threads);
}

TEST_F(ContextsTest, ImporterSeesTheBytesOfEach) {
  Block blocks[kContexts];
  for (int i = 0; i < kContexts; i++) {
    use(i);
    blocks[i] = allocate(4 * kMiB);
    ASSERT_EQ(target_.ask(fill_command(blocks[i].address, blocks[i].size, 50 + i)), "ok");
  }
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  const auto memory = large(*agent);
  ASSERT_EQ(memory.size(), size_t{kContexts});
  auto exports = agent->export_memory(memory, phos::AgentGuard::kCaller);
  ASSERT_TRUE(exports) << exports.error().message();
  for (int i = 0; i < kContexts; i++) {
    const auto index =
        static_cast<size_t>(at(memory, address_of(blocks[i].address)) - memory.data());
    ASSERT_LT(index, memory.size());
    const auto& e = (*exports)[index];
    ASSERT_EQ(e.status, ExportStatus::kExported) << e.driver_result;
    const std::string there = value_of(loader_.ask("ipc-import " + hex(e.ipc_handle)));
    EXPECT_EQ(loader_.ask(check_command({there, 4 * kMiB}, 50 + i)), "ok 0") << i;
  }
  // The context that was current still is.
  EXPECT_EQ(target_.ask("range " + blocks[kContexts - 1].address),
            "ok " + blocks[kContexts - 1].address + " 4194304 1");
  EXPECT_EQ(target_.ask("range " + blocks[0].address), "ok " + blocks[0].address + " 4194304 0");
}

TEST_F(ContextsTest, MemoryOfADestroyedContextIsStale) {
  use(1);
  const Block gone = allocate(4 * kMiB);
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  const auto memory = large(*agent);
  ASSERT_EQ(memory.size(), 1u);
  ASSERT_EQ(target_.ask("end-context 1"), "ok");
  auto exports = agent->export_memory(memory, phos::AgentGuard::kCaller);
  ASSERT_TRUE(exports) << exports.error().message();
  EXPECT_EQ((*exports)[0].status, ExportStatus::kStale);
  EXPECT_TRUE(large(*agent).empty());
  EXPECT_TRUE(agent->unload());
  expect_works();
}

TEST_F(ContextsTest, ReleasedMemoryComesBackInItsContext) {
  for (const MapBackOptions& options : {MapBackOptions{}, kAdoptAll}) {
    Block blocks[kContexts];
    for (int i = 0; i < kContexts; i++) {
      use(i);
      blocks[i] = allocate((4 + i) * kMiB);
    }
    use(1);
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    auto released = agent->map_back(options);
    ASSERT_TRUE(released) << released.error().message();
    ASSERT_EQ(released->size(), size_t{kContexts});
    ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 61));
    ASSERT_TRUE(agent->contents_loaded());
    for (int i = 0; i < kContexts; i++) {
      use(i);
      expect_ordinary(target_, blocks[i], 61);
    }
    // Its hooks stay until then.
    auto left = agent->contents_loaded();
    ASSERT_TRUE(left);
    EXPECT_TRUE(left->empty());
    auto gone = agent->unload();
    EXPECT_TRUE(gone) << gone.error().message();
  }
}

// As the driver has it: a context takes its memory with it.
TEST_F(ContextsTest, NativeMemoryGoesWithItsContext) {
  const uint64_t before = free_memory();
  use(1);
  allocate(64 * kMiB);
  {
    auto agent = attach();
    ASSERT_TRUE(agent) << agent.error().message();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    auto released = agent->map_back();
    ASSERT_TRUE(released) << released.error().message();
    ASSERT_EQ(in_state(*released, ReleasedState::kNative).size(), 1u);
    ASSERT_TRUE(agent->contents_loaded());
    ASSERT_TRUE(agent->unload());
  }
  ASSERT_EQ(target_.ask("end-context 1"), "ok");
  EXPECT_EQ(free_memory(), before);
}

}  // namespace
}  // namespace agent_test
