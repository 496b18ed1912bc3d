// SPDX-License-Identifier: GPL-2.0-only
// Tests of phos's copy engine on the device of the contract suite, through its own seam.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/copy/engine.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/driver/fault_driver.h"
#include "test/contract/fixture.h"

namespace contract {

// EXPECT_OK(result): fails with the error's message.
#define EXPECT_OK(expression)                               \
  do {                                                      \
    const auto& result_ = (expression);                     \
    EXPECT_TRUE(result_.ok()) << result_.error().message(); \
  } while (0)
#define ASSERT_OK(expression)                               \
  do {                                                      \
    const auto& result_ = (expression);                     \
    ASSERT_TRUE(result_.ok()) << result_.error().message(); \
  } while (0)

inline constexpr uint64_t kBuffer = 2 * kMiB;  // small, so that rings wrap around in little memory

inline std::vector<uint8_t> random_bytes(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> bytes(n);
  for (size_t i = 0; i < n; i += 4) {
    const uint32_t word = static_cast<uint32_t>(random());
    memcpy(&bytes[i], &word, std::min<size_t>(4, n - i));
  }
  return bytes;
}

// [address, address + bytes) page by page.
inline std::vector<phos::PageRef> pages_of(uint64_t address, uint64_t bytes) {
  std::vector<phos::PageRef> pages;
  for (uint64_t at = 0; at < bytes; at += phos::kPageBytes) {
    pages.push_back(
        {address + at, static_cast<uint32_t>(std::min<uint64_t>(phos::kPageBytes, bytes - at))});
  }
  return pages;
}

class CopyTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    auto driver = phos::open_cuda_driver();
    ASSERT_OK(driver);
    driver_ = std::move(*driver);
    faults_ = std::make_unique<phos::FaultDriver>(*driver_);
    auto key = phos::PageHashKey::generate();
    ASSERT_OK(key);
    key_ = std::make_unique<phos::PageHashKey>(*key);
    phos::PinnedPoolOptions options;
    options.buffer_bytes = kBuffer;
    options.max_bytes = 8 * kBuffer;
    options.step_bytes = 2 * kBuffer;
    options.threads = 2;
    pool_ = std::make_unique<phos::PinnedPool>(options);
    ASSERT_NO_FATAL_FAILURE(open());
  }
  void TearDown() override {
    close();
    pool_.reset();
    if (context_) cuCtxSetCurrent(context_);  // closing a context leaves none current
    CudaTest::TearDown();
  }

  void open() {
    CUuuid uuid;
    ASSERT_EQ(cuDeviceGetUuid(&uuid, device_), CUDA_SUCCESS);
    phos::GpuUuid id;
    memcpy(id.data(), uuid.bytes, id.size());
    auto context = faults_->open_context(id);
    ASSERT_OK(context);
    copy_context_ = std::move(*context);
    ASSERT_OK(pool_->attach(*copy_context_));
    auto engine = phos::CopyEngine::create(*copy_context_, *pool_, *key_, options());
    ASSERT_OK(engine);
    engine_ = std::move(*engine);
  }
  void close() {
    engine_.reset();
    if (pool_) (void)pool_->detach();
    copy_context_.reset();
  }
  // As small as can be: every operation takes several launches.
  static phos::CopyEngineOptions options() {
    phos::CopyEngineOptions options;
    options.slots = 3;
    options.hash_batch_pages = 20;
    return options;
  }

  void soil_the_pool() {
    std::vector<phos::PinnedPool::Buffer> all;
    while (auto buffer = pool_->try_acquire()) {
      memset(buffer->data(), 0xee, kBuffer);
      all.push_back(std::move(*buffer));
    }
  }

  // Device memory with these contents; freed with the fixture's context at the latest.
  CUdeviceptr upload(const std::vector<uint8_t>& bytes) {
    CUdeviceptr p = 0;
    EXPECT_EQ(cuMemAlloc(&p, bytes.size()), CUDA_SUCCESS);
    EXPECT_EQ(cuMemcpyHtoD(p, bytes.data(), bytes.size()), CUDA_SUCCESS);
    return p;
  }

  // The copy of all pages, in order; each page padded with zeros.
  struct Copy {
    std::vector<uint8_t> bytes;
    std::vector<phos::PageHash> hashes;
  };
  phos::CopySink into(Copy& copy) {
    return [&copy, this](phos::CopiedPages pages) -> phos::Result<void> {
      EXPECT_EQ(pages.first, copy.hashes.size());
      pages.hash(*key_);
      const uint8_t* data = pages.buffer.data();
      copy.bytes.insert(copy.bytes.end(), data, data + pages.hashes.size() * phos::kPageBytes);
      copy.hashes.insert(copy.hashes.end(), pages.hashes.begin(), pages.hashes.end());
      return {};
    };
  }
  // The number of pages of a copy whose hash is not that of the bytes that came with it.
  size_t wrong_hashes(const Copy& copy) {
    size_t wrong = 0;
    for (size_t i = 0; i < copy.hashes.size(); i++) {
      const uint8_t* page = &copy.bytes[i * phos::kPageBytes];
      wrong += copy.hashes[i] != hash_page(*key_, page, phos::kPageBytes);
    }
    return wrong;
  }

  std::unique_ptr<phos::GpuDriver> driver_;
  std::unique_ptr<phos::FaultDriver> faults_;
  std::unique_ptr<phos::PageHashKey> key_;
  std::unique_ptr<phos::PinnedPool> pool_;
  std::unique_ptr<phos::GpuContext> copy_context_;
  std::unique_ptr<phos::CopyEngine> engine_;
  // No limit, and a limit: copies are hashed by the GPU, and by the CPU.
  const phos::Pace pace_{0};
  const phos::Pace beside_others_{0.05};
};

}  // namespace contract
