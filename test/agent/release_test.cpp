// SPDX-License-Identifier: GPL-2.0-only
// Memory that the agent releases and brings back, and that the application does not notice. Its
// contents are loaded by another process, as phosd does.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>

#include "gpu-tracker/inject/mailbox.h"
#include "test/agent/fixture.h"

namespace agent_test {
namespace {

using phos::AgentRelease;
using phos::MapBackOptions;
using phos::ReleasedMemory;
using phos::ReleasedState;
using phos::ReleaseStatus;

constexpr MapBackOptions kAdoptAll{0};

struct Block {
  std::string address;
  uint64_t size;
};

std::string text(uint64_t n) {
  char out[32];
  snprintf(out, sizeof out, "%llx", static_cast<unsigned long long>(n));
  return out;
}

// What `block` holds when it was filled, or loaded, with `seed`.
std::string fill_command(const std::string& address, uint64_t size, int seed) {
  return "fill " + address + " " + std::to_string(size / 4) + " " + std::to_string(seed);
}
std::string check_command(const Block& b, int seed) {
  return "check " + b.address + " " + std::to_string(b.size / 4) + " " + std::to_string(seed) +
         " 0";
}

std::vector<ReleasedMemory> in_state(const std::vector<ReleasedMemory>& all, ReleasedState state) {
  std::vector<ReleasedMemory> found;
  for (const ReleasedMemory& m : all) {
    if (m.state == state) found.push_back(m);
  }
  return found;
}

class ReleaseTest : public AgentTest {
 protected:
  Block allocate(Worker& worker, uint64_t size) {
    return {value_of(worker.ask("alloc " + std::to_string(size))), size};
  }
  Block allocate(uint64_t size) { return allocate(target_, size); }

  static std::vector<AgentAllocation> large(Agent& agent) {
    auto all = agent.enumerate();
    EXPECT_TRUE(all) << all.error().message();
    return of_kind(*all, AllocationKind::kDevice);
  }

  // Releases all; each must work.
  static void release_all(Agent& agent) {
    const auto memory = large(agent);
    auto results = agent.release(memory);
    ASSERT_TRUE(results) << results.error().message();
    for (const AgentRelease& r : *results) {
      EXPECT_EQ(r.status, ReleaseStatus::kReleased) << r.driver_result;
    }
  }

  static void driver_checkpoint(pid_t pid) {
    ASSERT_EQ(contract::lock(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::checkpoint(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::restore(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::unlock(pid), CUDA_SUCCESS);
  }

  // Fills what is mapped back through an import of it. Adopted memory can be imported by
  // descriptor, the driver's own by a legacy handle.
  void load(Agent& agent, const std::vector<ReleasedMemory>& released, int seed) {
    std::vector<AgentAllocation> memory;
    for (const ReleasedMemory& m : released) memory.push_back(m.memory);
    auto exports = agent.export_memory(memory, phos::ExportGuard::kCaller);
    ASSERT_TRUE(exports) << exports.error().message();
    for (size_t i = 0; i < exports->size(); i++) {
      const auto& e = (*exports)[i];
      ASSERT_EQ(e.status, ExportStatus::kExported) << e.driver_result;
      const std::string there = value_of(
          e.type == ExportType::kFd ? loader_.ask("vmm-import " + std::to_string(getpid()) + " " +
                                                  std::to_string(e.fd.get()) + " " +
                                                  std::to_string(memory[i].mapping_size))
                                    : loader_.ask("ipc-import " + hex(e.ipc_handle)));
      ASSERT_EQ(loader_.ask(fill_command(there, memory[i].size, seed)), "ok");
      if (e.type == ExportType::kIpc) {
        ASSERT_EQ(loader_.ask("ipc-close " + there), "ok");
      }
    }
  }

  // The application finds its memory as cuMemAlloc made it, with these contents, and frees it.
  void expect_ordinary(Worker& worker, const Block& b, int seed) {
    EXPECT_EQ(worker.ask(check_command(b, seed)), "ok 0") << b.address;
    const uint64_t inside = address_of(b.address) + b.size - 1;
    const std::string range = "ok " + b.address + " " + std::to_string(b.size) + " 1";
    EXPECT_EQ(worker.ask("range " + b.address), range);
    EXPECT_EQ(worker.ask("range " + text(inside)), range);
    EXPECT_EQ(worker.ask("free " + text(address_of(b.address) + 512)), "error 1");
    EXPECT_EQ(worker.ask("free " + b.address), "ok");
    EXPECT_EQ(worker.ask("free " + b.address), "error 1");
  }

  Worker loader_;
};

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
  const Block b = allocate(6 * kMiB);
  auto agent = attach();
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  ASSERT_TRUE(agent->map_back(kAdoptAll));
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(target_.ask("free-async " + b.address), "ok");
  EXPECT_TRUE(agent->released()->empty());
  EXPECT_EQ(target_.ask("free-async " + b.address), "error 1");
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

// ---- A driver that fails: nothing is lost, and no address.

class FaultyRelease : public ReleaseTest {
 protected:
  void SetUp() override {
    ReleaseTest::SetUp();
    if (IsSkipped()) return;
    if (!contract::on_simulation()) GTEST_SKIP() << "a real driver does not fail on request";
    faulty_.emplace("cuda", std::vector<std::string>{"PHOS_SIM_FAULTS=" + faults_});
  }
  void TearDown() override { unlink(faults_.c_str()); }
  void fail(const std::string& line) { std::ofstream(faults_) << line << "\n"; }

  std::optional<Worker> faulty_;
  const std::string faults_ = testing::TempDir() + "release-faults-" + std::to_string(getpid());
};

constexpr const char* kCalls[] = {
    "cuPointerGetAttributes",
    "cuDeviceGetCount",
    "cuDeviceGetAttribute",
    "cuCtxPushCurrent",
    "cuMemFree",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemAlloc",
    "cuMemCreate",
    "cuMemMap",
    "cuMemSetAccess",
    "cuMemRelease",
    "cuMemUnmap",
};

bool is_untouched(ReleaseStatus status) {
  return status == ReleaseStatus::kFailed || status == ReleaseStatus::kNotReached ||
         status == ReleaseStatus::kUnsuitable;
}

// Every call in turn, from the first on and once, during release and during map back: afterwards
// all allocations are where they were and can be loaded, used and freed.
TEST_F(FaultyRelease, NothingIsLostWhateverFails) {
  for (const char* call : kCalls) {
    for (const char* when : {"release", "map back"}) {
      for (unsigned misses : {0u, 16u}) {
        SCOPED_TRACE(std::string(call) + " during " + when + ", " + std::to_string(misses));
        unlink(faults_.c_str());
        Worker worker("cuda", {"PHOS_SIM_FAULTS=" + faults_});
        std::vector<Block> blocks;
        for (uint64_t i = 0; i < 3; i++) blocks.push_back(allocate(worker, (2 + i) * kMiB + 1));
        auto agent = Agent::attach(worker.pid(), restore_tid(worker.pid()));
        ASSERT_TRUE(agent);
        for (const Block& b : blocks)
          ASSERT_EQ(worker.ask(fill_command(b.address, b.size, 1)), "ok");
        const auto memory = large(*agent);
        const bool first = !strcmp(when, "release");
        if (first) fail(std::string(call) + " * 2");
        auto results = agent->release(memory);
        ASSERT_TRUE(results) << results.error().message();
        if (!first) fail(std::string(call) + " * 2");
        auto tried = agent->map_back({misses});
        if (!tried) {
          EXPECT_EQ(tried.error().domain(), phos::Domain::kCuda);
        }
        unlink(faults_.c_str());
        auto released = agent->map_back({misses});
        ASSERT_TRUE(released) << released.error().message();
        for (size_t i = 0; i < blocks.size(); i++) {
          const auto status = (*results)[i].status;
          const bool untouched = is_untouched(status);
          if (!untouched) continue;
          EXPECT_EQ(worker.ask(check_command(blocks[i], 1)), "ok 0");
        }
        for (const ReleasedMemory& m : *released) {
          EXPECT_TRUE(m.state == ReleasedState::kNative || m.state == ReleasedState::kAdopted)
              << static_cast<int>(m.state) << " " << m.driver_result;
        }
        ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 2));
        ASSERT_TRUE(agent->contents_loaded());
        for (size_t i = 0; i < blocks.size(); i++) {
          const auto status = (*results)[i].status;
          const bool untouched = is_untouched(status);
          expect_ordinary(worker, blocks[i], untouched ? 1 : 2);
        }
      }
    }
  }
}

TEST_F(FaultyRelease, RefusedReservationIsMadeGoodAtOnce) {
  // With a free gap below, smaller than the memory, into which cuMemAlloc would rather put it.
  const Block gap = allocate(*faulty_, 4 * kMiB);
  const Block b = allocate(*faulty_, 6 * kMiB);
  ASSERT_EQ(address_of(gap.address) + gap.size, address_of(b.address));
  ASSERT_EQ(faulty_->ask("free " + gap.address), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  fail("cuMemAddressReserve 6+ 2");  // once it has been seen that addresses can be kept
  auto results = agent->release(large(*agent));
  ASSERT_TRUE(results);
  EXPECT_EQ((*results)[0].status, ReleaseStatus::kReallocated);
  auto released = agent->released();
  ASSERT_TRUE(released);
  ASSERT_EQ(in_state(*released, ReleasedState::kNative).size(), 1u);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 48));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(*faulty_, b, 48);
}

// A driver that gives others first, as one was seen to do: memory is not released then, and what
// has been is not brought back in the driver's own way, for which its addresses would be given up
// once.
TEST_F(FaultyRelease, AddressIsKeptWhereOthersAreGivenFirst) {
  const Block gap = allocate(*faulty_, 8 * kMiB);
  allocate(*faulty_, 2 * kMiB);
  const Block b = allocate(*faulty_, 6 * kMiB);
  ASSERT_EQ(faulty_->ask("free " + gap.address), "ok");
  ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, 47)), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  std::vector<AgentAllocation> memory = large(*agent);
  std::erase_if(memory, [&](const auto& a) { return a.address != address_of(b.address); });
  ASSERT_EQ(memory.size(), 1u);
  fail("cuMemAddressReserve * elsewhere");
  auto results = agent->release(memory);
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kUnsuitable);
  const std::string check = "check " + b.address + " " + std::to_string(b.size / 4);
  EXPECT_EQ(faulty_->ask(check + " 47 0"), "ok 0");

  unlink(faults_.c_str());
  results = agent->release(memory);
  ASSERT_TRUE(results);
  ASSERT_EQ((*results)[0].status, ReleaseStatus::kReleased);
  fail("cuMemAddressReserve * elsewhere");
  auto back = agent->map_back();
  ASSERT_TRUE(back);
  ASSERT_EQ(back->size(), 1u);
  EXPECT_EQ((*back)[0].memory.address, address_of(b.address));
  EXPECT_EQ((*back)[0].state, ReleasedState::kAdopted);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *back, 48));
  ASSERT_TRUE(agent->contents_loaded());
  EXPECT_EQ(faulty_->ask(check + " 48 0"), "ok 0");
}

TEST_F(FaultyRelease, LostAddressStopsTheReleaseAndIsFoundAgain) {
  const Block blocks[] = {allocate(*faulty_, 6 * kMiB), allocate(*faulty_, 6 * kMiB)};
  ASSERT_EQ(faulty_->ask(fill_command(blocks[1].address, blocks[1].size, 1)), "ok");
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  const auto memory = large(*agent);
  fail("cuMemAddressReserve 7+ 2\ncuMemAlloc * 2");
  auto results = agent->release(memory);
  ASSERT_TRUE(results);
  EXPECT_EQ((*results)[0].status, ReleaseStatus::kLost);
  EXPECT_EQ((*results)[1].status, ReleaseStatus::kNotReached);
  unlink(faults_.c_str());
  auto released = agent->map_back(kAdoptAll);
  ASSERT_TRUE(released);
  ASSERT_EQ(released->size(), 1u);
  EXPECT_EQ((*released)[0].state, ReleasedState::kAdopted);
  ASSERT_NO_FATAL_FAILURE(load(*agent, *released, 49));
  ASSERT_TRUE(agent->contents_loaded());
  expect_ordinary(*faulty_, blocks[0], 49);
  expect_ordinary(*faulty_, blocks[1], 1);
}

TEST_F(FaultyRelease, ThreadThatFreesAdoptedMemoryIsNotOvertaken) {
  const Block a = allocate(*faulty_, 3 * kMiB), b = allocate(*faulty_, 3 * kMiB);
  auto agent = Agent::attach(faulty_->pid(), restore_tid(faulty_->pid()));
  ASSERT_TRUE(agent);
  ASSERT_NO_FATAL_FAILURE(release_all(*agent));
  ASSERT_TRUE(agent->map_back(kAdoptAll));
  ASSERT_TRUE(agent->contents_loaded());
  ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, 3)), "ok");
  const auto memory = large(*agent);
  fail("cuMemUnmap * hold");
  faulty_->send("free " + a.address);
  ASSERT_TRUE(contract::wait_held(faults_));
  auto refused = agent->release(memory);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EBUSY);
  unlink(faults_.c_str());
  EXPECT_EQ(faulty_->reply().value_or("hangs"), "ok");
  expect_ordinary(*faulty_, b, 3);
}

// A phosd that dies in the middle of a command: the agent ends it, or stops between two
// allocations; the next phosd finds everything recorded.
TEST_F(FaultyRelease, PhosdKilledAnywhereLosesNothing) {
  const pid_t pid = faulty_->pid(), tid = restore_tid(pid);
  std::vector<Block> blocks;
  for (uint64_t i = 0; i < 8; i++) blocks.push_back(allocate(*faulty_, 3 * kMiB));
  ASSERT_TRUE(Agent::attach(pid, tid));
  fail("cuMemAddressReserve * slow:2\ncuMemMap * slow:2");
  for (int step = 0; step < 12; step++) {
    SCOPED_TRACE(step);
    const pid_t child = fork();
    if (child == 0) {
      auto agent = Agent::attach(pid, tid);
      if (agent) (void)agent->release(large(*agent)).ok();
      if (agent) (void)agent->map_back(kAdoptAll).ok();
      _exit(0);
    }
    usleep(static_cast<useconds_t>(step) * 3000);
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    auto agent = Agent::attach(pid, tid);
    ASSERT_TRUE(agent) << agent.error().message();
    auto released = agent->map_back(kAdoptAll);
    ASSERT_TRUE(released) << released.error().message();
    for (const ReleasedMemory& m : *released) {
      EXPECT_TRUE(m.state == ReleasedState::kAdopted || m.state == ReleasedState::kInUse);
    }
    ASSERT_TRUE(agent->contents_loaded());
    for (const Block& b : blocks) {
      ASSERT_EQ(faulty_->ask(fill_command(b.address, b.size, step)), "ok");
      ASSERT_EQ(faulty_->ask(check_command(b, step)), "ok 0");
    }
  }
  for (const Block& b : blocks) expect_ordinary(*faulty_, b, 11);
}

}  // namespace
}  // namespace agent_test
