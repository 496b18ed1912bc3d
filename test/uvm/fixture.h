// SPDX-License-Identifier: GPL-2.0-only
// Managed memory of this process, watched by each of the trackers that there are.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <set>
#include <string>

#include "gpu-tracker/track/uvm_kmod.h"
#include "gpu-tracker/track/uvm_tools.h"
#include "gpu-tracker/track/uvm_watch.h"
#include "test/uvm/managed.h"

namespace uvm_test {

enum class Backend { kBpf, kKmod, kTools };

inline std::string backend_name(const testing::TestParamInfo<Backend>& info) {
  const char* const names[] = {"Bpf", "Kmod", "Tools"};
  return names[static_cast<int>(info.param)];
}

// Why it cannot be had here; empty: it can.
inline std::string missing(Backend backend) {
  if (backend == Backend::kKmod) {
    return access(PHOS_KMOD_DEVICE, F_OK) == 0 ? "" : "phos.ko is not loaded";
  }
  if (backend == Backend::kTools) return "";
  // Anything else than being forbidden or unknown is for the tests to fail by.
  static const std::string reason = [] {
    auto watch = phos::UvmWatch::start(getpid());
    const int code = watch ? 0 : watch.error().code();
    return code == EPERM || code == ENOTSUP ? watch.error().message() : std::string();
  }();
  return reason;
}

inline phos::Result<std::unique_ptr<phos::UvmTracker>> start(Backend backend, pid_t pid,
                                                             uint32_t chunks = phos::kUvmChunks) {
  using Tracker = std::unique_ptr<phos::UvmTracker>;
  if (backend == Backend::kBpf) {
    auto watch = phos::UvmWatch::start(pid, chunks);
    if (!watch) return watch.error();
    return Tracker(std::move(*watch));
  }
  if (backend == Backend::kTools) {
    auto tools = phos::UvmTools::start(pid, chunks);
    if (!tools) return tools.error();
    (*tools)->next_epoch();  // in the first one all may be dirty
    return Tracker(std::move(*tools));
  }
  auto kmod = phos::UvmKmod::start(pid, chunks);
  if (!kmod) return kmod.error();
  return Tracker(std::move(*kmod));
}

class Watched : public testing::TestWithParam<Backend> {
 protected:
  static constexpr size_t kSize = 8 * kChunk, kPages = kSize / kPage;

  void SetUp() override {
    if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
    auto space = Space::make();
    ASSERT_TRUE(space) << space.error().message();
    space_ = std::move(*space);
    auto memory = space_.map(kAddress, kSize);
    ASSERT_TRUE(memory) << memory.error().message();
    memory_ = *memory;
    memset(memory_, 1, kSize);  // the first touch of a page grants its neighbours, too
    watch(phos::kUvmChunks);
  }
  void TearDown() override {
    watch_.reset();
    if (memory_) munmap(memory_, kSize);
  }

  void watch(uint32_t chunks) {
    auto watch = start(GetParam(), getpid(), chunks);
    ASSERT_TRUE(watch) << watch.error().message();
    watch_ = std::move(*watch);
  }

  volatile uint8_t& byte(size_t page) { return memory_[page * kPage + page % kPage]; }

  // The same memory made anew, not touched yet.
  void map_anew() {
    munmap(memory_, kSize);
    auto memory = space_.map(kAddress, kSize);
    ASSERT_TRUE(memory) << memory.error().message();
  }

  // By faults 2 MiB are recorded, not pages, and in two epochs.
  static bool is_exact() { return GetParam() != Backend::kTools; }

  // What is recorded if these pages are written to.
  static std::set<size_t> recorded(const std::set<size_t>& written) {
    if (is_exact()) return written;
    std::set<size_t> pages;
    for (const size_t page : written) {
      for (size_t i = 0; i < kChunk / kPage; i++) pages.insert(page / 512 * 512 + i);
    }
    return pages;
  }

  // A new epoch, in which nothing may be written to without a record.
  void begin() {
    if (!is_exact()) watch_->next_epoch();
    watch_->next_epoch();
    auto revoked = space_.revoke_writes(memory_, kSize);
    ASSERT_TRUE(revoked) << revoked.error().message();
  }

  // Pages of the memory that may be dirty by this record.
  static std::set<size_t> dirty(const phos::UvmEpoch& epoch) {
    std::set<size_t> pages;
    for (size_t i = 0; i < kPages; i++) {
      if (epoch.maybe_dirty(kAddress + i * kPage, kPage)) pages.insert(i);
    }
    return pages;
  }

  Space space_;
  uint8_t* memory_ = nullptr;
  std::unique_ptr<phos::UvmTracker> watch_;
};

#define PHOS_UVM_BACKENDS(suite) \
  INSTANTIATE_TEST_SUITE_P(      \
      , suite, testing::Values(Backend::kBpf, Backend::kKmod, Backend::kTools), backend_name)

}  // namespace uvm_test
