// SPDX-License-Identifier: GPL-2.0-only
// A process whose memory is copied live step by step, and the image that comes of it.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "test/contract/fixture.h"
#include "test/live/interleaving.h"

namespace live_test {

using contract::value_of;
using contract::Worker;
using phos::AllocationInfo;

#define ASSERT_OK(expression)                               \
  do {                                                      \
    const auto& result_ = (expression);                     \
    ASSERT_TRUE(result_.ok()) << result_.error().message(); \
  } while (0)

inline constexpr uint64_t kBytes = 4 << 20;
inline constexpr char kBytesText[] = " 4194304";
inline constexpr char kElements[] = " 1048576 ";

class LiveCopyMemory : public contract::WorkerTest {
 protected:
  void SetUp() override {
    contract::WorkerTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(copier_.start(), "");
    ASSERT_NE(mkdtemp(directory_), nullptr);
    fd_.reset(open(directory_, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    process_.emplace("cuda");
    start();
  }
  void TearDown() override {
    copy_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }

  void start() {
    phos::DumpId id;
    id.fill(7);
    auto store = phos::PageStore::create(fd_.get(), id, {});
    ASSERT_OK(store);
    phos::LiveCopyImages images;
    images.store = std::move(*store);
    for (const phos::GpuInfo& gpu : copier_.gpus()) images.gpus.push_back(gpu.uuid);
    const int pid = process_->pid();
    auto tid = copier_.driver().restore_thread_id(pid);
    ASSERT_OK(tid);
    auto copy = phos::LiveCopy::start({pid, pid, *tid}, std::move(images), copier_.engines());
    ASSERT_OK(copy);
    copy_ = std::move(*copy);
  }

  // The process is locked, the last round made, the image written.
  void complete() {
    ASSERT_OK(copier_.driver().lock(process_->pid(), 10000));
    auto last = copy_->last_round();
    EXPECT_TRUE(last) << last.error().message();
    EXPECT_TRUE(copy_->release());
    phos::ProcessImage image;
    image.dump_id.fill(7);
    image.pid = process_->pid();
    image.comm = "worker";
    image.driver_release = "none";
    image.driver_api = 13000;
    image.created_us = 1;
    image.phos_version = "test";
    image.gpus = copier_.gpus();
    auto finished = copy_->finish(&image);
    EXPECT_TRUE(finished) << finished.error().message();
    ASSERT_OK(copier_.driver().unlock(process_->pid()));
    ASSERT_OK(write_process_image(fd_.get(), image));
    auto chain = phos::PageChain::open(fd_.get(), process_->pid(), phos::PageIo::kCached);
    ASSERT_OK(chain);
    chain_.emplace(std::move(*chain));
  }

  // The index of what the image has at that address; nothing: it has nothing there.
  std::optional<size_t> find(const std::string& address) {
    const uint64_t at = strtoull(address.c_str(), nullptr, 16);
    const auto& all = chain_->image().allocations;
    for (size_t i = 0; i < all.size(); i++) {
      if (all[i].address == at) return i;
    }
    return {};
  }
  const AllocationInfo& allocation(size_t index) { return chain_->image().allocations[index]; }

  // Is it saved with what phos_fill(seed) writes?
  void expect_saved(size_t index, uint32_t seed) {
    const AllocationInfo& a = allocation(index);
    ASSERT_FALSE(chain_->runs(index).empty()) << "no page is saved";
    std::vector<uint32_t> words;
    auto* page = static_cast<uint8_t*>(aligned_alloc(phos::kPageIoAlignment, phos::kImagePageSize));
    for (uint64_t i = 0; i < page_count(a); i++) {
      ASSERT_OK(chain_->read_page(index, i, page));
      const auto* begin = reinterpret_cast<const uint32_t*>(page);
      words.insert(words.end(), begin, begin + phos::kImagePageSize / 4);
    }
    free(page);
    words.resize(a.size / 4);
    EXPECT_EQ(contract::count_wrong(words, seed), 0u);
  }

  std::string fill(const std::string& address, unsigned seed) {
    return process_->ask("fill " + address + kElements + std::to_string(seed));
  }

  Copier copier_;
  char directory_[32] = "/dev/shm/phos-live-XXXXXX";
  phos::UniqueFd fd_;
  std::optional<Worker> process_;
  std::unique_ptr<phos::LiveCopy> copy_;
  std::optional<phos::PageChain> chain_;
};

}  // namespace live_test
