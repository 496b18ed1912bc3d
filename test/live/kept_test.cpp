// SPDX-License-Identifier: GPL-2.0-only
// Memory that is kept on its GPU while it is away: proven like any other, never in the way.
#include <cerrno>
#include <functional>

#include "gpu-tracker/daemon/kept_memory.h"
#include "test/live/loader_fixture.h"

namespace live_test {
namespace {

using phos::Domain;
using When = phos::FaultDriver::When;

class KeptTest : public MemoryLoaderTest {
 protected:
  using Kept = std::vector<std::unique_ptr<phos::KeptMemory>>;

  void make_saved() {
    loader_.reset();
    chain_.reset();
    // Of slabs that hold one part or two, and a rest that is too small.
    make_engines(8, {.stage = true, .stage_slab = 4 * kMiB + kMiB / 2});
    ASSERT_NO_FATAL_FAILURE(make_memory());
    ASSERT_NO_FATAL_FAILURE(save(1));
    ASSERT_NO_FATAL_FAILURE(open_chain(1));
  }
  // What a session does with it before it is released, for up to so many bytes.
  Kept keep(uint64_t bytes) {
    Kept kept;
    auto k = phos::KeptMemory::begin(*engines_, gpus_[0].uuid, key_, bytes);
    if (!k) return kept;
    auto gpu = engines_->use(gpus_[0].uuid, key_);
    EXPECT_TRUE(gpu);
    phos::GpuContext& context = *(*gpu)->context;
    std::vector<std::function<phos::Result<void>()>> unmap;
    for (phos::MemoryToLoad& m : exported()) {
      const bool ipc = m.handle.type == phos::ExportType::kIpc;
      auto at = ipc ? context.import_ipc(m.handle.ipc_handle)
                    : context.import_fd(m.handle.fd.get(), m.target.mapping_size,
                                        phos::MemoryAccess::kRead);
      if (!at) continue;
      k->add(m.target.address, *at, m.target.size);
      unmap.push_back([&context, ipc, at = *at, size = m.target.mapping_size] {
        return ipc ? context.close_ipc(at) : context.close_fd(at, size);
      });
    }
    kept_ = k->finish();
    for (auto& u : unmap) (void)u().ok();
    kept.push_back(std::move(k));
    return kept;
  }
  uint64_t whole() const { return all_pages() * kPage; }

  uint64_t kept_ = 0;
};

TEST_F(KeptTest, IsNotReadAgain) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  for (const bool ahead : {false, true}) {
    loader_->keep(keep(whole()));
    EXPECT_EQ(kept_, whole());
    ASSERT_NO_FATAL_FAILURE(spoil());
    if (ahead) loader_->prefetch();
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_EQ(report->kept_bytes, whole());
    EXPECT_EQ(report->staged_bytes, whole());
    EXPECT_EQ(report->read_bytes, 0u);
    EXPECT_EQ(report->pages, all_pages());
    ASSERT_OK(loader_->settle());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
  }
}

// The rest is read.
TEST_F(KeptTest, AsMuchAsThereIsRoomFor) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  auto open = engines_->use(gpus_[0].uuid, key_);  // and stays
  ASSERT_OK(open);
  auto memory = (*open)->context->memory_info();
  ASSERT_OK(memory);
  const uint64_t room = memory->total / 8 + 5 * kMiB + slack();
  std::optional<phos::DeviceRoom::Claim> others =
      engines_->room().claim(gpus_[0].uuid, memory->free - room);
  for (const bool ahead : {false, true}) {
    loader_->keep(keep(whole()));
    if (contract::on_simulation()) {  // a GPU has a little more or less from one moment to the next
      EXPECT_GT(kept_, 0u);
      EXPECT_LT(kept_, whole());
    }
    ASSERT_NO_FATAL_FAILURE(spoil());
    if (ahead) loader_->prefetch();
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_EQ(report->kept_bytes, kept_);
    EXPECT_EQ(report->pages, all_pages());
    ASSERT_OK(loader_->settle());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
  }
}

TEST_F(KeptTest, GoesWhenSomebodyNeedsTheRoom) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  auto open = engines_->use(gpus_[0].uuid, key_);
  ASSERT_OK(open);
  const uint64_t before = free_bytes();
  for (const bool ahead : {false, true}) {
    loader_->keep(keep(whole()));
    ASSERT_EQ(kept_, whole());
    ASSERT_NO_FATAL_FAILURE(spoil());
    if (ahead) loader_->prefetch();
    {
      std::vector<phos::DeviceRoom::Claim> claims;
      claims.push_back(engines_->room().claim(gpus_[0].uuid, before + slack()));
      engines_->room().make_room(claims);
      EXPECT_GE(free_bytes() + slack(), before);
    }
    auto report = loader_->load(exported());
    ASSERT_OK(report);
    EXPECT_EQ(report->kept_bytes, 0u);
    ASSERT_OK(loader_->settle());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
  }
}

// What is kept is what the memory held then; what is loaded is what was saved, or nothing.
TEST_F(KeptTest, WhatIsNotWhatWasSavedIsFoundOut) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  ASSERT_NO_FATAL_FAILURE(spoil());
  loader_->keep(keep(whole()));
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code(), EBADMSG);
}

// For another image of the same memory.
TEST_F(KeptTest, AnotherLoaderMayHaveIt) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  loader_->keep(keep(whole()));
  auto chain = std::move(chain_);
  auto first = std::move(loader_);
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  loader_->keep(first->take_kept());
  first.reset();
  ASSERT_NO_FATAL_FAILURE(spoil());
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->kept_bytes, whole());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Whatever call fails, nothing is lost but time.
TEST_F(KeptTest, EveryCallOfItMayFail) {
  loader_.reset();
  make_engines(8, {.stage = true, .stage_slab = 2 * kMiB});
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(3 * kMiB + 5000)));
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  (void)exported();  // the agent is there
  auto open = engines_->use(gpus_[0].uuid, key_);
  ASSERT_OK(open);
  const uint64_t before = free_bytes();
  uint64_t lost = 0;
  int reached = 0;
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  for (int nth = 1; nth == 1 || reached == nth - 1; nth++) {
    for (auto when : {When::kBefore, When::kAfter}) {
      const size_t at = faults_->calls().size() + static_cast<size_t>(nth) - 1;
      faults_->fail(nth, when, phos::Error(Domain::kCuda, 2, "injected"));
      Kept kept = keep(whole());
      faults_->fail(0, when, phos::Error(Domain::kCuda, 2, "injected"));
      const std::string name = faults_->call(at);
      if (!name.empty()) reached = nth;
      loader_->keep(std::move(kept));
      ASSERT_NO_FATAL_FAILURE(spoil());
      auto report = loader_->load(exported());
      ASSERT_TRUE(report) << name << ": " << report.error().message();
      EXPECT_EQ(report->kept_bytes, kept_) << name;
      EXPECT_EQ(report->warm_bytes + report->read_bytes, whole()) << name;
      ASSERT_OK(loader_->settle());
      ASSERT_NO_FATAL_FAILURE(expect_all_there());
      // Memory of which nobody was told stays until the GPU is closed.
      if (name == "allocate" && when == When::kAfter) lost = before - free_bytes();
      EXPECT_GE(free_bytes() + lost + slack(), before) << name;
    }
  }
  EXPECT_GT(reached, 8);
}

}  // namespace
}  // namespace live_test
