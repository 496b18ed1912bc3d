// SPDX-License-Identifier: GPL-2.0-only
// What was saved comes back, byte by byte as the application itself sees it; what cannot come back
// is refused or found out.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "test/live/loader_fixture.h"

namespace live_test {
namespace {

using phos::Domain;

TEST_F(MemoryLoaderTest, WhatWasSavedComesBack) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  const int before = imported();
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  ASSERT_OK(loader_->settle());
  EXPECT_EQ(imported(), before);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
  EXPECT_EQ(report->pages, all_pages());
  EXPECT_EQ(report->zero_pages, kZeroPages);
  EXPECT_EQ(report->bytes, all_bytes());
  EXPECT_EQ(report->read_bytes, (all_pages() - kZeroPages) * kPage);
  EXPECT_EQ(report->warm_bytes, 0u);
  EXPECT_GE(report->load_us, report->read_us);
  // And again, with the same loader.
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_OK(loader_->load(exported()));
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

TEST_F(MemoryLoaderTest, NothingToLoadIsLoaded) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  auto report = loader_->load({});
  ASSERT_OK(report);
  EXPECT_EQ(report->pages, 0u);
}

TEST_F(MemoryLoaderTest, PagesOfThreeLevels) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  for (int level = 1; level <= 3; level++) {
    for (Memory& m : memory_) {
      for (size_t at = random_() % (4 * kPage); at < m.bytes.size();
           at += 1 + random_() % (9 * kPage)) {
        m.bytes[at]++;
      }
      ASSERT_NO_FATAL_FAILURE(put(m));
    }
    ASSERT_NO_FATAL_FAILURE(save(level));
  }
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_NO_FATAL_FAILURE(open_chain(3));
  ASSERT_EQ(chain_->levels().size(), 3u);
  for (const auto& level : chain_->levels()) EXPECT_GT(level.pages.here, 0u);
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->pages, all_pages());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

TEST_F(MemoryLoaderTest, PrefetchedPagesAreNotReadAgain) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_->prefetch();
  loader_->prefetch();  // once is enough
  const uint64_t saved = (all_pages() - kZeroPages) * kPage;
  // The batches that hold it, as the pool's buffers have 2 MiB.
  const uint64_t buffers = (saved + 2 * kMiB - 1) / (2 * kMiB);
  while (engines_->pool_statistics().in_use < buffers) std::this_thread::yield();
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->warm_bytes, saved);
  EXPECT_EQ(report->read_bytes, 0u);
  EXPECT_EQ(report->pages, all_pages());
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Some of it is loaded and the rest left as it is, whatever was prefetched.
TEST_F(MemoryLoaderTest, PartOfWhatWasPrefetched) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_->prefetch();
  while (engines_->pool_statistics().in_use < 6) std::this_thread::yield();
  auto memory = exported();
  memory.erase(memory.begin() + 1);
  const Memory left = memory_[1];
  ASSERT_NO_FATAL_FAILURE(put({left.address, Bytes(left.bytes.size(), 'x')}));
  auto report = loader_->load(std::move(memory));
  ASSERT_OK(report);
  EXPECT_GT(report->warm_bytes, 0u);
  EXPECT_GT(report->read_bytes, 0u);
  EXPECT_EQ(report->warm_bytes + report->read_bytes, (all_pages() - kZeroPages - 17) * kPage);
  memory_[1].bytes.assign(left.bytes.size(), 'x');
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

TEST_F(MemoryLoaderTest, PrefetchLeavesBuffersToOthers) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_.reset();
  chain_.reset();
  make_engines(4);
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  auto other = phos::MemoryLoader::create(*chain_, *engines_);
  ASSERT_OK(other);
  loader_->prefetch();
  (*other)->prefetch();
  // One that never loads keeps nobody from it.
  auto third = phos::MemoryLoader::create(*chain_, *engines_);
  ASSERT_OK(third);
  ASSERT_OK((*third)->load(exported()));
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
  EXPECT_LE(engines_->pool_statistics().in_use, 2u);
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_OK(loader_->load(exported()));
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Where there is no room for all, there is what the load begins with.
TEST_F(MemoryLoaderTest, PrefetchReadsInTheOrderOfTheLoad) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_.reset();
  chain_.reset();
  make_engines(6);  // two of them are for others
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  phos::PagePrefetch prefetch(*chain_, *engines_, key_);
  prefetch.begin();
  while (prefetch.so_far().host_bytes < 8 * kMiB) std::this_thread::yield();
  std::vector<std::pair<size_t, uint32_t>> read, expected;  // allocation, page
  const auto all = prefetch.take();
  for (const phos::LoadBatch& batch : all) {
    for (const phos::LoadPiece& p : batch.pieces) {
      for (uint32_t i = 0; i < p.run.pages; i++) {
        read.emplace_back(p.allocation, p.run.first_page + i);
      }
    }
  }
  // Several threads end their batches in any order.
  std::sort(read.begin(), read.end());
  for (size_t i = 0; i < chain_->image().allocations.size(); i++) {
    for (const phos::PageRun& run : chain_->runs(i)) {
      for (uint32_t k = 0; k < run.pages && !run.is_zero(); k++) {
        expected.emplace_back(i, run.first_page + k);
      }
    }
  }
  ASSERT_GT(expected.size(), 8 * kMiB / kPage);
  expected.resize(8 * kMiB / kPage);
  EXPECT_EQ(read, expected);
}

// Of two processes the one that is loaded first, and the other as soon as that needs no more.
TEST_F(MemoryLoaderTest, PrefetchOfTwoProcessesInTurn) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_.reset();
  chain_.reset();
  make_engines(6);
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  auto first = phos::MemoryLoader::create(*chain_, *engines_);
  ASSERT_OK(first);
  const auto turns = std::make_shared<phos::ReadTurns>();
  (*first)->prefetch(turns);
  loader_->prefetch(turns);
  while ((*first)->read_ahead().host_bytes < 8 * kMiB) std::this_thread::yield();
  EXPECT_EQ(loader_->read_ahead().host_bytes, 0u);
  auto report = (*first)->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->warm_bytes, 8 * kMiB);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
  while (loader_->read_ahead().host_bytes < 8 * kMiB) std::this_thread::yield();
  ASSERT_NO_FATAL_FAILURE(spoil());
  report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->warm_bytes, 8 * kMiB);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// It does not wait for its turn to be loaded.
TEST_F(MemoryLoaderTest, LoadOfAProcessWhoseTurnHasNotCome) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_.reset();
  chain_.reset();
  make_engines(6);
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  auto first = phos::MemoryLoader::create(*chain_, *engines_);
  ASSERT_OK(first);
  const auto turns = std::make_shared<phos::ReadTurns>();
  (*first)->prefetch(turns);
  loader_->prefetch(turns);
  while ((*first)->read_ahead().host_bytes < 8 * kMiB) std::this_thread::yield();
  auto report = loader_->load(exported());
  ASSERT_OK(report);
  EXPECT_EQ(report->warm_bytes, 0u);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Two buffers, for two sessions at once.
TEST_F(MemoryLoaderTest, SmallestPool) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  loader_.reset();
  chain_.reset();
  make_engines(2);
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  auto other = phos::MemoryLoader::create(*chain_, *engines_);
  ASSERT_OK(other);
  (*other)->prefetch();
  auto memory = exported(), half = exported();
  std::vector<phos::MemoryToLoad> rest;
  for (size_t i = 0; i < 2; i++) {
    rest.push_back(std::move(half.back()));
    half.pop_back();
    memory.pop_back();
  }
  std::thread beside([&] {
    auto report = (*other)->load(std::move(rest));
    EXPECT_TRUE(report) << report.error().message();
  });
  auto report = loader_->load(std::move(memory));
  beside.join();
  ASSERT_OK(report);
  EXPECT_LE(engines_->pool_statistics().peak_in_use, 2u);
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

TEST_F(MemoryLoaderTest, TwoGpus) {
  if (gpus_.size() < 2) GTEST_SKIP() << "one GPU only";
  ASSERT_NO_FATAL_FAILURE(make_memory());
  ASSERT_NO_FATAL_FAILURE(use_device(1));
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(7 * kMiB + 5)));
  ASSERT_NO_FATAL_FAILURE(allocate(Bytes(3 * kMiB, 0)));
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  for (bool prefetch : {false, true}) {
    if (prefetch) loader_->prefetch();
    auto memory = exported();
    EXPECT_NE(memory.front().target.device_uuid, memory.back().target.device_uuid);
    auto report = loader_->load(std::move(memory));
    ASSERT_OK(report);
    EXPECT_EQ(report->pages, all_pages());
    ASSERT_NO_FATAL_FAILURE(expect_all_there());
    ASSERT_NO_FATAL_FAILURE(spoil());
  }
}

// The one is done when the other comes to a bad page.
TEST_F(MemoryLoaderTest, NothingStaysImportedWhereOneOfTwoGpusFails) {
  if (gpus_.size() < 2) GTEST_SKIP() << "one GPU only";
  ASSERT_NO_FATAL_FAILURE(map(random_bytes(2 * kMiB)));
  ASSERT_NO_FATAL_FAILURE(use_device(1));
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(48 * kMiB)));
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  damage(index_of(memory_[1].number()), 48 * kMiB / kPage - 1, 3);
  const int before = imported();
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code(), EBADMSG) << report.error().message();
  EXPECT_EQ(imported(), before);
}

TEST_F(MemoryLoaderTest, DamagedPageIsNamed) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  const Memory& m = memory_[3];
  const std::string where = damage(index_of(m.number()), 30, 777);
  for (bool prefetch : {false, true}) {
    const int before = imported();  // prefetching opens GPUs, which have memory of their own
    if (prefetch) loader_->prefetch();
    auto report = loader_->load(exported());
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().domain(), Domain::kFormat);
    EXPECT_EQ(report.error().code(), EBADMSG);
    const std::string& text = report.error().message();
    for (const std::string& part :
         {std::string("GPU-"), "0x" + m.address, std::to_string(m.bytes.size()) + " bytes",
          "offset " + std::to_string(30 * kPage) + ":", where, std::string("damaged")}) {
      EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
    }
    EXPECT_EQ(imported(), before);
    EXPECT_EQ(engines_->pool_statistics().in_use, 0u);
  }
}

// The last byte of a short last page, in a parent's file.
TEST_F(MemoryLoaderTest, DamageInAParent) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(save(2));
  ASSERT_NO_FATAL_FAILURE(open_chain(2));
  const Memory& m = memory_[0];
  const uint64_t last = m.bytes.size() / kPage;
  const std::string where = damage(index_of(m.number()), last, m.bytes.size() % kPage - 1);
  EXPECT_NE(where.find("/1/phos-pages-"), std::string::npos) << where;
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().message().find("offset " + std::to_string(last * kPage) + ":"),
            std::string::npos)
      << report.error().message();
  EXPECT_NE(report.error().message().find(where), std::string::npos);
}

TEST_F(MemoryLoaderTest, FileThatEndsEarlyIsNamed) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  const auto run = chain_->locate(index_of(memory_[0].number()), 80);
  ASSERT_TRUE(run);
  const std::string where = chain_->describe(*run);
  const std::string path = where.substr(0, where.find(", slot"));
  ASSERT_EQ(truncate(path.c_str(), static_cast<off_t>(chain_->place(*run).slot * kPage)), 0);
  const int before = imported();
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().message().find(path), std::string::npos) << report.error().message();
  EXPECT_EQ(imported(), before);
}

TEST_F(MemoryLoaderTest, WhatDoesNotFitIsRefusedUntouched) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  const auto expect_refused = [&](const char* text, auto&& change) {
    auto memory = exported();
    change(memory);
    const size_t before = faults_->calls().size();
    auto report = loader_->load(std::move(memory));
    ASSERT_FALSE(report) << text;
    EXPECT_NE(report.error().message().find(text), std::string::npos) << report.error().message();
    EXPECT_EQ(faults_->calls().size(), before) << "the driver was called";
  };
  using List = std::vector<phos::MemoryToLoad>;
  expect_refused("the image has 1048577 bytes", [](List& l) { l[1].target.size--; });
  expect_refused("the image has 1048577 bytes", [](List& l) { l[1].target.size++; });
  expect_refused("no such allocation", [](List& l) { l[2].allocation = 1000; });
  expect_refused("same contents", [](List& l) { l[2].allocation = l[1].allocation; });
  expect_refused("handed it over", [](List& l) { l[2].handle.fd.reset(); });
  expect_refused("handed it over",
                 [](List& l) { l[0].handle.status = phos::ExportStatus::kStale; });
  expect_refused("overlaps", [](List& l) { l[1].target.address = l[0].target.address + 4096; });
  expect_refused("mapping of its own", [](List& l) { l[2].target.mapping_size -= 4096; });
}

// Memory that the image lists and nobody has copied.
TEST_F(MemoryLoaderTest, MemoryWithoutPagesIsRefused) {
  ASSERT_NO_FATAL_FAILURE(make_memory());
  ASSERT_NO_FATAL_FAILURE(save(1));
  const phos::UniqueFd fd(open(file("1").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  auto image = phos::read_process_image(fd.get(), process_->pid());
  ASSERT_OK(image);
  image->allocations[2].hashes.clear();
  image->allocations[2].extents.clear();
  image->allocations[2].path = phos::MemoryPath::kDriver;
  ASSERT_OK(write_process_image(fd.get(), *image));
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  loader_->prefetch();
  auto report = loader_->load(exported());
  ASSERT_FALSE(report);
  EXPECT_NE(report.error().message().find("not all of its pages"), std::string::npos)
      << report.error().message();
}

TEST_F(MemoryLoaderTest, StopIsObeyed) {
  ASSERT_NO_FATAL_FAILURE(make_saved_and_spoilt());
  const int before = imported();
  std::stop_source stop;
  stop.request_stop();
  auto refused = loader_->load(exported(), stop.get_token());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), ECANCELED);
  // While it waits for buffers, which somebody else has.
  std::vector<phos::PinnedPool::Buffer> others;
  for (int i = 0; i < 32; i++) others.push_back(std::move(*engines_->pool().acquire({})));
  std::stop_source later;
  std::jthread canceller([&] {
    while (engines_->pool_statistics().waits == 0) std::this_thread::yield();
    later.request_stop();
  });
  auto report = loader_->load(exported(), later.get_token());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code(), ECANCELED);
  EXPECT_EQ(imported(), before);
  others.clear();
  ASSERT_OK(loader_->load(exported()));
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

// Whatever call fails, before or after its work: an error, and no import that outlives the use of
// the GPU. A load that claims to be done is done.
TEST_F(MemoryLoaderTest, EveryCallMayFail) {
  ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(3 * kMiB + 5000)));
  ASSERT_NO_FATAL_FAILURE(map(random_bytes(2 * kMiB)));
  ASSERT_NO_FATAL_FAILURE(allocate(Bytes(kMiB + kPage, 0)));
  ASSERT_NO_FATAL_FAILURE(save(1));
  ASSERT_NO_FATAL_FAILURE(spoil());
  ASSERT_NO_FATAL_FAILURE(open_chain(1));
  int before = imported();
  size_t start = faults_->calls().size();
  ASSERT_OK(loader_->load(exported()));
  ASSERT_OK(loader_->settle());
  // From the first import to the last that is let go: opening and closing a GPU is tested
  // elsewhere.
  const std::vector<std::string> all(faults_->calls().begin() + static_cast<ptrdiff_t>(start),
                                     faults_->calls().end());
  const auto is_close = [](const std::string& name) { return name.find("close_") == 0; };
  const int opening =
      static_cast<int>(std::find(all.begin(), all.end(), "import_ipc") - all.begin());
  const int calls = static_cast<int>(all.rend() - std::find_if(all.rbegin(), all.rend(), is_close));
  ASSERT_GT(calls, opening + 40);
  phos::set_log_sink([](phos::LogLevel, const std::string&) {});
  for (int nth = opening + 1; nth <= calls; nth++) {
    for (auto when : {phos::FaultDriver::When::kBefore, phos::FaultDriver::When::kAfter}) {
      auto memory = exported();
      start = faults_->calls().size();
      faults_->fail(nth, when, phos::Error(Domain::kCuda, 2, "injected"));
      auto report = loader_->load(std::move(memory));
      auto settled = loader_->settle();
      faults_->fail(0, when, phos::Error(Domain::kCuda, 2, "injected"));
      const auto& names = faults_->calls();
      const size_t at = start + static_cast<size_t>(nth) - 1;
      const std::string name = at < names.size() ? names[at] : "none";
      // VMM mappings are the process's, not the context's: one of which nobody knows, or which the
      // driver does not take down, stays.
      const bool done = when == phos::FaultDriver::When::kAfter;
      if ((name == "import_fd" && done) || (name == "close_fd" && !done)) {
        before += contract::on_simulation();
      }
      EXPECT_EQ(imported(), before) << name;
      EXPECT_EQ(engines_->pool_statistics().in_use, 0u) << name;
      ASSERT_FALSE(report && settled) << name;
      const std::string message = (report ? settled.error() : report.error()).message();
      EXPECT_NE(message.find("injected"), std::string::npos) << message;
    }
  }
  ASSERT_OK(loader_->load(exported()));
  ASSERT_NO_FATAL_FAILURE(expect_all_there());
}

}  // namespace
}  // namespace live_test
