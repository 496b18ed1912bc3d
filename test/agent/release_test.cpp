// SPDX-License-Identifier: GPL-2.0-only
// Memory that the agent releases and brings back, and that the application does not notice.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

#include "gpu-tracker/inject/mailbox.h"
#include "test/agent/release_fixture.h"

namespace agent_test {
namespace {

TEST_F(ReleaseTest, AdoptedMemoryIsAsItWas) {
  const Block blocks[] = {allocate(6 * kMiB), allocate(5000001), allocate(2 * kMiB + 1)};
  auto agent = attach();
  ASSERT_TRUE(agent) << agent.error().message();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
  auto released = agent->map_back(kAdoptAll);
  ASSERT_TRUE(released) << released.error().message();
  EXPECT_EQ(agent->missing_hook(), 0);
  ASSERT_EQ(in_state(*released, ReleasedState::kAdopted).size(), 3u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 41));
  auto in_use = agent->contents_loaded();
  ASSERT_TRUE(in_use);
  EXPECT_EQ(in_state(*in_use, ReleasedState::kInUse).size(), 3u);
  for (const Block& b : blocks) {
    const AgentAllocation* a = at(large(*agent), address_of(b.address));
    ASSERT_NE(a, nullptr);
    EXPECT_EQ(a->size, b.size);
    EXPECT_EQ(a->export_type, ExportType::kFd);
  }
  for (const Block& b : blocks) expect_ordinary(target_, b, 41);
  // Its addresses are the driver's again.
  EXPECT_EQ(allocate(6 * kMiB).address, blocks[0].address);
  EXPECT_EQ(target_.ask("free " + blocks[0].address), "ok");
}

TEST_F(ReleaseTest, FreeingAdoptedMemoryInStreamOrder) {
  for (const char* stream : {"", " 1"}) {
    const Block b = allocate(6 * kMiB);
    auto agent = attach();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    ASSERT_TRUE(agent->map_back(kAdoptAll));
    ASSERT_TRUE(agent->contents_loaded());
    EXPECT_EQ(target_.ask("free-async " + b.address + stream), "ok");
    EXPECT_TRUE(agent->released()->empty());
    EXPECT_EQ(target_.ask("free-async " + b.address + stream), "error 1");
  }
}

TEST_F(ReleaseTest, NativeMemoryLeavesNoTrace) {
  std::vector<Block> blocks;
  for (uint64_t i = 0; i < 4; i++) blocks.push_back(allocate((3 + i) * kMiB));
  const Footprint before = footprint(target_.pid());
  auto agent = attach();
  ASSERT_TRUE(agent);
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
  auto released = agent->map_back();
  ASSERT_TRUE(released);
  ASSERT_EQ(in_state(*released, ReleasedState::kNative).size(), 4u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 42));
  auto left = agent->contents_loaded();
  ASSERT_TRUE(left);
  EXPECT_TRUE(left->empty());
  ASSERT_TRUE(agent->unload());
  Footprint after = footprint(target_.pid());
  EXPECT_EQ(after.mappings, before.mappings);
  for (const Block& b : blocks) expect_ordinary(target_, b, 42);
}

// Addresses that come from the kernel, and would go back to it.
TEST_F(ReleaseTest, LargeMemoryIsNativeAgain) {
  std::vector<Block> blocks, gaps;
  for (uint64_t mib : {32, 34, 64, 100, 20, 256}) {
    blocks.push_back(allocate(mib * kMiB));
    gaps.push_back(allocate(mib * kMiB));
  }
  for (const Block& b : gaps) ASSERT_EQ(target_.ask("free " + b.address), "ok");
  auto agent = attach();
  ASSERT_TRUE(agent);
  for (int seed = 60; seed < 63; seed++) {
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    auto released = agent->map_back();
    ASSERT_TRUE(released);
    EXPECT_EQ(in_state(*released, ReleasedState::kNative).size(), blocks.size());
    ASSERT_NO_FATAL_FAILURE(load(*agent, *released, seed));
    ASSERT_TRUE(agent->contents_loaded());
    for (const Block& b : blocks) EXPECT_EQ(target_.ask(check_command(b, seed)), "ok 0");
  }
  ASSERT_TRUE(agent->unload());
  for (const Block& b : blocks) expect_ordinary(target_, b, 62);
  expect_works();
}

// A process with many allocations and gaps between them.
TEST_F(ReleaseTest, MissesAreBoundedAndTheRestAdopted) {
  std::vector<Block> blocks, gaps;
  for (uint64_t i = 0; i < 40; i++) {
    (i % 4 ? blocks : gaps).push_back(allocate((3 + i % 3) * kMiB));
  }
  for (const Block& b : gaps) ASSERT_EQ(target_.ask("free " + b.address), "ok");
  auto agent = attach();
  for (unsigned misses : {0u, 3u, 64u}) {
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    auto released = agent->map_back({misses});
    ASSERT_TRUE(released);
    const size_t native = in_state(*released, ReleasedState::kNative).size();
    EXPECT_EQ(in_state(*released, ReleasedState::kAdopted).size() + native, blocks.size());
    if (misses == 64) {
      EXPECT_EQ(native, blocks.size());
    }
    if (misses == 0) {
      EXPECT_EQ(native, 0u);
    }
    ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 43));
    ASSERT_TRUE(agent->contents_loaded());
    for (const Block& b : blocks) EXPECT_EQ(target_.ask(check_command(b, 43)), "ok 0");
  }
  for (const Block& b : blocks) expect_ordinary(target_, b, 43);
}

TEST_F(ReleaseTest, AdoptedMemoryCanBeReleasedAgain) {
  const Block b = allocate(5000001);
  auto agent = attach();
  for (int round = 0; round < 3; round++) {
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    ASSERT_NO_FATAL_FAILURE(driver_checkpoint(target_.pid()));
    auto released = agent->map_back(kAdoptAll);
    ASSERT_TRUE(released);
    ASSERT_EQ(released->size(), 1u);
    ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 50 + round));
    ASSERT_TRUE(agent->contents_loaded());
    EXPECT_EQ(target_.ask(check_command(b, 50 + round)), "ok 0");
  }
  expect_ordinary(target_, b, 52);
}

TEST_F(ReleaseTest, OtherMemoryIsLeftAlone) {
  const Block small = allocate(2 * kMiB);
  const Block vmm = {value_of(target_.ask("map 4194304 1 1")), 4 * kMiB};
  const Block pool = {value_of(target_.ask("alloc-async 4194304")), 4 * kMiB};
  const Block freed = allocate(4 * kMiB);
  for (const Block* b : {&small, &vmm, &pool}) {
    ASSERT_EQ(target_.ask(fill_command(b->address, b->size, 44)), "ok");
  }
  auto agent = attach();
  auto all = agent->enumerate();
  ASSERT_TRUE(all);
  ASSERT_EQ(target_.ask("free " + freed.address), "ok");
  auto results = agent->release(*all);
  ASSERT_TRUE(results);
  ASSERT_EQ(results->size(), all->size());
  for (size_t i = 0; i < all->size(); i++) {
    EXPECT_EQ((*results)[i].status, (*all)[i].address == address_of(freed.address)
                                        ? ReleaseStatus::kStale
                                        : ReleaseStatus::kUnsuitable)
        << to_string((*all)[i].kind);
  }
  EXPECT_TRUE(agent->released()->empty());
  for (const Block* b : {&small, &vmm, &pool}) {
    EXPECT_EQ(target_.ask(check_command(*b, 44)), "ok 0");
  }
  EXPECT_TRUE(agent->unload());
}

TEST_F(ReleaseTest, ReleasedMemoryIsFree) {
  const Block b = allocate(64 * kMiB);
  auto agent = attach();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  EXPECT_EQ(target_.ask("range " + b.address), "error 500");
  EXPECT_EQ(allocate(64 * kMiB).address == b.address, false);
}

// Of the GPU the application sees as much free as before, whoever gave its memory back.
TEST_F(ReleaseTest, AsMuchIsFreeAsBefore) {
  const uint64_t total = (64 + 6 + 4) * kMiB;  // in blocks of 2 MiB
  for (uint64_t mib : {64, 5, 3}) allocate(mib * kMiB - 1000);
  auto agent = attach();
  const auto free_bytes = [&] { return std::stoull(value_of(target_.ask("memory-info"))); };
  for (const MapBackOptions& how : {MapBackOptions{}, kAdoptAll}) {
    const uint64_t before = free_bytes();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
    const uint64_t released = free_bytes();
    ASSERT_TRUE(agent->map_back(how));
    ASSERT_TRUE(agent->contents_loaded());
    const uint64_t after = free_bytes();
    if (!contract::on_simulation()) {
      EXPECT_GE(released - before, 64 * kMiB);
      continue;  // a real driver keeps some for itself
    }
    EXPECT_EQ(released - before, total);
    EXPECT_EQ(after, before);
  }
}

TEST_F(ReleaseTest, AgentStaysWhileItStandsIn) {
  const Footprint before = footprint(target_.pid());
  const Block b = allocate(6 * kMiB);
  auto agent = attach();
  auto expect_busy = [&](const char* when) {
    auto r = agent->unload();
    ASSERT_FALSE(r) << when;
    EXPECT_EQ(r.error().code(), EBUSY) << when;
  };
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  expect_busy("released");
  ASSERT_TRUE(agent->map_back(kAdoptAll));
  expect_busy("mapped back");
  ASSERT_TRUE(agent->contents_loaded());
  expect_busy("in use");
  ASSERT_EQ(target_.ask("free " + b.address), "ok");
  expect_busy("hooked");
  ASSERT_TRUE(agent->contents_loaded());
  auto gone = agent->unload();
  ASSERT_TRUE(gone) << gone.error().message();
  EXPECT_EQ(footprint(target_.pid()), before);
  expect_works();
}

// A forked child has the hooks and a copy of the table, and a driver that refuses every call.
TEST_F(ReleaseTest, ForkedChildGetsTheDriversRefusal) {
  const Block b = allocate(6 * kMiB);
  const std::string refusal = target_.ask("fork-free " + b.address);
  EXPECT_NE(refusal, "ok 0");
  auto agent = attach();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  auto released = agent->map_back(kAdoptAll);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 45));
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(target_.ask("fork-free " + b.address), refusal);
  expect_ordinary(target_, b, 45);
}

TEST_F(ReleaseTest, AnotherPhosFindsWhatIsReleased) {
  const Block b = allocate(6 * kMiB);
  {
    auto agent = attach();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  }
  {
    auto agent = attach();
    auto released = agent->released();
    ASSERT_TRUE(released);
    ASSERT_EQ(in_state(*released, ReleasedState::kReserved).size(), 1u);
    EXPECT_EQ((*released)[0].memory.address, address_of(b.address));
    EXPECT_EQ((*released)[0].memory.size, b.size);
    EXPECT_EQ((*released)[0].memory.device, 0);
    ASSERT_TRUE(agent->map_back(kAdoptAll));
  }
  auto agent = attach();
  auto released = agent->released();
  ASSERT_TRUE(released);
  ASSERT_EQ(in_state(*released, ReleasedState::kAdopted).size(), 1u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 46));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(target_, b, 46);
}

TEST_F(ReleaseTest, OverwrittenRecordIsRefused) {
  const Block b = allocate(6 * kMiB);
  uint64_t table = 0;
  {
    auto agent = attach();
    ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  }
  const Block kept = allocate(4 * kMiB);
  {
    auto mailbox = phos::Mailbox::find(target_.pid());
    ASSERT_TRUE(mailbox && *mailbox);
    table = (*mailbox)->shared().released_table;
  }
  ASSERT_NE(table, 0u);
  const std::string path = "/proc/" + std::to_string(target_.pid()) + "/mem";
  phos::UniqueFd memory(open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(memory);
  // Magic, version, count, and the first entry's address and size.
  for (uint64_t offset : {0, 8, 12, 24, 32}) {
    const auto where = static_cast<off_t>(table + offset);
    uint8_t byte = 0, wrong = 0;
    ASSERT_EQ(pread(memory.get(), &byte, 1, where), 1);
    wrong = byte ^ 0x20;
    ASSERT_EQ(pwrite(memory.get(), &wrong, 1, where), 1);
    auto agent = attach();
    auto mapped = agent->map_back(kAdoptAll);
    ASSERT_FALSE(mapped) << offset;
    EXPECT_EQ(mapped.error().code(), EPROTO);
    EXPECT_FALSE(agent->release(large(*agent)));
    EXPECT_EQ(target_.ask(fill_command(kept.address, kept.size, 1)), "ok");
    EXPECT_FALSE(agent->released());
    ASSERT_EQ(pwrite(memory.get(), &byte, 1, where), 1);
  }
  auto agent = attach();
  auto released = agent->map_back(kAdoptAll);
  ASSERT_TRUE(released) << released.error().message();
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 47));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(target_, b, 47);
}

}  // namespace
}  // namespace agent_test
