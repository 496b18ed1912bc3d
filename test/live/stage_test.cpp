// SPDX-License-Identifier: GPL-2.0-only
// Pages that are read ahead into GPU memory nobody needs: as good as any, never in the way.
#include <cerrno>
#include <functional>
#include <thread>

#include "gpu-tracker/daemon/page_prefetch.h"
#include "test/live/loader_fixture.h"

namespace live_test {
namespace {

using phos::Domain;
using When = phos::FaultDriver::When;

class StageTest : public MemoryLoaderTest {
 protected:
  void make_staging(uint64_t buffers) {
    loader_.reset();
    chain_.reset();
    make_engines(buffers, {.stage = true});
    ASSERT_NO_FATAL_FAILURE(open_chain(1));
  }
  void wait_until(const std::function<bool()>& condition) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (!condition()) {
      ASSERT_LT(std::chrono::steady_clock::now(), end);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  uint64_t saved_bytes() const { return (all_pages() - kZeroPages) * kPage; }
  static void expect_free(uint64_t now, uint64_t expected) {
    EXPECT_GE(now + slack(), expected);
    EXPECT_LE(now, expected + slack());
  }
  bool reclaim(const phos::DeviceRoom::Freed& before) {
    std::vector<phos::DeviceRoom::Claim> claims;
    claims.push_back(engines_->room().claim(gpus_[0].uuid, 1));
    return engines_->room().reclaim(claims, before);
  }
};

// All of it, though it is many times what the host buffers hold.
TEST_F(StageTest, PagesGetThereThroughFewHostBuffers) {
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(10 * kMiB + 4096)));
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(4));
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
  EXPECT_EQ(loader_->read_ahead().host_bytes, 0u);
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->staged_bytes, saved_bytes());
  EXPECT_EQ(report->warm_bytes, saved_bytes());
  EXPECT_EQ(report->read_bytes, 0u);
  EXPECT_EQ(report->pages, all_pages());
  EXPECT_EQ(report->bytes, all_bytes());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
  ASSERT_OK(loader_->settle());
  // And a second time, with nothing read ahead.
  ASSERT_NO_FATAL_FAILURE(spoil());
  report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->staged_bytes, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Making host buffers takes longer than reading ahead into GPU memory does.
TEST_F(StageTest, FewHostBuffersAreMadeThoughManyMayBe) {
  const uint64_t most = phos::reader_threads() + 16 + 1;  // made two at a time
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes((most + 4) * 2 * kMiB)));
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(1024));
  ASSERT_GT(saved_bytes() / (2 * kMiB), most);
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
  EXPECT_LE(engines_->pool_statistics().buffers, most);
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->staged_bytes, saved_bytes());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Whenever the load begins: the rest is read then.
TEST_F(StageTest, LoadMayBeginAtAnyTime) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  for (uint64_t mib : {0, 2, 6, 10}) {
    ASSERT_NO_FATAL_FAILURE(make_staging(8));
    loader_->prefetch();
    ASSERT_NO_FATAL_FAILURE(
        wait_until([&] { return loader_->read_ahead().gpu_bytes >= mib * kMiB; }));
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_GE(report->staged_bytes, mib * kMiB);
    EXPECT_EQ(report->warm_bytes + report->read_bytes, saved_bytes());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
    ASSERT_NO_FATAL_FAILURE(spoil());
    agent_.reset();
  }
}

// What is left over when each process has got what it needs.
TEST_F(StageTest, RoomThatSomebodyNeedsIsLeft) {
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(4 * kMiB)));
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  auto open = engines_->use(gpus_[0].uuid, key_);  // and stays
  ASSERT_OK(open);
  // In the simulation for one batch, besides a slab's remainder; on a GPU for all.
  const uint64_t before = free_bytes();
  // An eighth is left to others in any case.
  const uint64_t room = 4 * kMiB + 2 * slack() + total_bytes() / 8;
  const uint64_t expected = contract::on_simulation() ? 2 * kMiB : saved_bytes();
  auto others = engines_->room().claim(gpus_[0].uuid, before - room);
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(wait_until([&] {
    const auto ahead = loader_->read_ahead();
    return ahead.gpu_bytes == expected && ahead.host_bytes == saved_bytes() - expected;
  }));
  EXPECT_GE(free_bytes() + slack(), before - room);
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->staged_bytes, expected);
  EXPECT_EQ(report->warm_bytes, saved_bytes());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
  ASSERT_OK(loader_->settle());
  expect_free(free_bytes(), before);
}

TEST_F(StageTest, NothingIsStagedAsLongAsAllIsNeeded) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  auto open = engines_->use(gpus_[0].uuid, key_);
  ASSERT_OK(open);
  auto others = std::make_optional(engines_->room().claim(gpus_[0].uuid, free_bytes()));
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().host_bytes == saved_bytes(); }));
  EXPECT_FALSE(reclaim({}));
  others.reset();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
}

// By whoever needs it: another process that comes, or whom the driver has told that there is none.
TEST_F(StageTest, WhatIsStagedIsGivenUp) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  for (bool claim : {true, false}) {
    ASSERT_NO_FATAL_FAILURE(make_staging(32));
    auto open = engines_->use(gpus_[0].uuid, key_);
    ASSERT_OK(open);
    const uint64_t before = free_bytes();
    loader_->prefetch();
    ASSERT_NO_FATAL_FAILURE(
        wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
    EXPECT_LE(free_bytes(), before - saved_bytes() + slack());
    phos::DeviceRoom& room = engines_->room();
    std::vector<phos::DeviceRoom::Claim> claims;
    claims.push_back(room.claim(gpus_[0].uuid, before / 2));
    room.make_room(claims);
    if (gpus_.size() > 1) {
      std::vector<phos::DeviceRoom::Claim> other;
      other.push_back(room.claim(gpus_[1].uuid, uint64_t{1} << 50));
      room.make_room(other);
      EXPECT_FALSE(room.reclaim(other, {}));
    }
    EXPECT_EQ(loader_->read_ahead().gpu_bytes, saved_bytes());
    EXPECT_TRUE(room.freed().empty());
    if (claim) {
      claims.push_back(room.claim(gpus_[0].uuid, before / 2));
      room.make_room(claims);
      EXPECT_FALSE(reclaim(room.freed()));
    } else {
      EXPECT_TRUE(reclaim({}));
    }
    EXPECT_GE(room.freed().at(gpus_[0].uuid), saved_bytes());
    EXPECT_EQ(loader_->read_ahead().gpu_bytes, 0u);
    expect_free(free_bytes(), before);
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_EQ(report->staged_bytes, 0u);
    EXPECT_EQ(report->warm_bytes + report->read_bytes, saved_bytes());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
    ASSERT_NO_FATAL_FAILURE(spoil());
  }
}

// At any time of a prefetch, and of a load.
TEST_F(StageTest, ItCanBeTakenBackAtAnyTime) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  std::jthread others([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      (void)reclaim({});
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  for (int i = 0; i < 12; i++) {
    ASSERT_NO_FATAL_FAILURE(open_chain(1));
    loader_->prefetch();
    std::this_thread::sleep_for(std::chrono::milliseconds(i));
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_EQ(report->warm_bytes + report->read_bytes, saved_bytes());
    ASSERT_OK(loader_->settle());
  }
  others.request_stop();
  others.join();
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// A process that is restored to another GPU than it was saved from.
TEST_F(StageTest, PagesStagedOnAnotherGpuAreReadAgain) {
  if (gpus_.size() < 2) GTEST_SKIP() << "one GPU only";
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
  const std::vector<Memory> old = memory_;
  ASSERT_NO_FATAL_FAILURE(use_device(1));
  memory_.clear();
  for (const Memory& m : old) ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(m.bytes.size())));
  std::vector<phos::MemoryToLoad> there;
  auto tid = driver_->restore_thread_id(process_->pid());
  ASSERT_OK(tid);
  auto agent = phos::Agent::attach(process_->pid(), *tid);
  ASSERT_OK(agent);
  auto seen = agent->enumerate();
  ASSERT_OK(seen);
  for (size_t i = 0; i < old.size(); i++) {
    for (const phos::AgentAllocation& a : *seen) {
      if (a.address != memory_[i].number()) continue;
      auto handles = agent->export_memory({&a, 1}, phos::AgentGuard::kCaller);
      ASSERT_OK(handles);
      there.push_back({index_of(old[i].number()), a, std::move((*handles)[0])});
    }
    memory_[i].bytes = old[i].bytes;
  }
  ASSERT_EQ(there.size(), old.size());
  auto report = loader_->load(std::move(there));
  ASSERT_OK(report);
  EXPECT_EQ(report->staged_bytes, 0u);
  EXPECT_EQ(report->read_bytes, saved_bytes());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Proved where it ends up, so that it does not matter what has happened on the way.
TEST_F(StageTest, DamagedPageIsFoundOut) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  const std::string where = damage(index_of(memory_[3].number()), 30, 777);
  loader_->prefetch();
  ASSERT_NO_FATAL_FAILURE(
      wait_until([&] { return loader_->read_ahead().gpu_bytes == saved_bytes(); }));
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code(), EBADMSG);
  EXPECT_NE(report.error().message().find(where), std::string::npos) << report.error().message();
  EXPECT_EQ(engines_->pool_statistics().in_use, 0u);
}

// Whatever call fails on the way there, nothing is lost but time.
TEST_F(StageTest, EveryCallOfItMayFail) {
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(5 * kMiB + 5000)));
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(make_staging(32));
  auto open = engines_->use(gpus_[0].uuid, key_);
  ASSERT_OK(open);
  const uint64_t before = free_bytes(), saved = all_pages() * kPage;
  uint64_t lost = 0;
  int reached = 0;
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  for (int nth = 1; nth == 1 || reached == nth - 1; nth++) {
    for (auto when : {When::kBefore, When::kAfter}) {
      ASSERT_NO_FATAL_FAILURE(spoil());
      ASSERT_NO_FATAL_FAILURE(open_chain(1));
      const size_t at = faults_->calls().size() + static_cast<size_t>(nth) - 1;
      faults_->fail(nth, when, phos::Error(Domain::kCuda, 2, "injected"));
      loader_->prefetch();
      // Until it fails, all goes on until all is staged.
      ASSERT_NO_FATAL_FAILURE(wait_until(
          [&] { return !faults_->call(at).empty() || loader_->read_ahead().gpu_bytes == saved; }));
      faults_->fail(0, when, phos::Error(Domain::kCuda, 2, "injected"));
      const std::string name = faults_->call(at);
      if (!name.empty()) reached = nth;
      auto report = loader_->load(exported());
      ASSERT_TRUE(report) << name << ": " << report.error().message();
      EXPECT_EQ(report->warm_bytes + report->read_bytes, saved) << name;
      ASSERT_OK(loader_->settle());
      // Memory of which nobody was told stays until the GPU is closed.
      if (name == "allocate" && when == When::kAfter) lost = before - free_bytes();
      SCOPED_TRACE(name);
      expect_free(free_bytes() + lost, before);
      ASSERT_NO_FATAL_FAILURE(expect_all_there());
    }
  }
  EXPECT_GT(reached, 8);
}

}  // namespace
}  // namespace live_test
