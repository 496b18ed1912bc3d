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
    make_engines(8, {.stage = true});
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
    for (auto& u : unmap) EXPECT_TRUE(u());
    kept.push_back(std::move(k));
    return kept;
  }
  uint64_t free_bytes() {
    auto gpu = engines_->use(gpus_[0].uuid, key_);
    EXPECT_TRUE(gpu);
    auto info = (*gpu)->context->memory_info();
    EXPECT_TRUE(info);
    return info ? info->free : 0;
  }
  uint64_t whole() const { return all_pages() * kPage; }

  const phos::PageHashKey key_ = *phos::PageHashKey::generate();
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
  const uint64_t room = memory->total / 8 + 5 * kMiB;
  std::optional<phos::DeviceRoom::Claim> others =
      engines_->room().claim(gpus_[0].uuid, memory->free - room);
  for (const bool ahead : {false, true}) {
    loader_->keep(keep(whole()));
    EXPECT_LT(kept_, whole());
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
  loader_->keep(keep(whole()));
  ASSERT_EQ(kept_, whole());
  ASSERT_NO_FATAL_FAILURE(spoil());
  loader_->prefetch();
  std::vector<phos::DeviceRoom::Claim> claims;
  claims.push_back(engines_->room().claim(gpus_[0].uuid, before));
  engines_->room().make_room(claims);
  const uint64_t slack = contract::on_simulation() ? 0 : 32 * kMiB;
  EXPECT_GE(free_bytes() + slack, before);
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->kept_bytes, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
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

TEST_F(KeptTest, EveryCallOfItMayFail) {
  ASSERT_NO_FATAL_FAILURE(make_saved());
  (void)exported();  // the agent is there
  auto open = engines_->use(gpus_[0].uuid, key_);
  ASSERT_OK(open);
  int reached = 0;
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  for (int nth = 1; nth == 1 || reached == nth - 1; nth++) {
    for (auto when : {When::kBefore, When::kAfter}) {
      const size_t at = faults_->calls().size() + static_cast<size_t>(nth) - 1;
      faults_->fail(nth, when, phos::Error(Domain::kCuda, 2, "injected"));
      auto k = phos::KeptMemory::begin(*engines_, gpus_[0].uuid, key_, whole());
      ASSERT_TRUE(k);
      auto source = (*open)->context->allocate(3 * kMiB);
      if (source) {
        k->add(1, *source, 3 * kMiB);
        EXPECT_LE(k->finish(), 3 * kMiB);
      }
      faults_->fail(0, when, phos::Error(Domain::kCuda, 2, "injected"));
      if (!faults_->call(at).empty()) reached = nth;
      Kept kept;
      kept.push_back(std::move(k));
      loader_->keep(std::move(kept));
      ASSERT_NO_FATAL_FAILURE(spoil());
      auto report = loader_->load(exported());
      ASSERT_OK(report);
      EXPECT_EQ(report->kept_bytes, 0u);  // nobody's address
      ASSERT_OK(loader_->settle());
      ASSERT_NO_FATAL_FAILURE(expect_all_there());
      if (source) (void)(*open)->context->free(*source).ok();
    }
  }
  EXPECT_GT(reached, 4);
}

}  // namespace
}  // namespace live_test
