// SPDX-License-Identifier: GPL-2.0-only
// The copy engine: the GPU's hashes are the CPU's, and what is copied is what is hashed.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <thread>

#include "test/contract/copy_fixture.h"

namespace contract {
namespace {

using phos::kPageBytes;
using phos::PageHash;
using phos::PageRef;

// Pages of every odd size, at every 16th byte.
TEST_F(CopyTest, GpuHashesAsTheCpuDoes) {
  const auto bytes = random_bytes(4 * kMiB, 1);
  const CUdeviceptr p = upload(bytes);
  std::vector<PageRef> pages = pages_of(p, bytes.size());
  for (uint32_t size :
       {1u,   2u,   3u,   4u,    5u,    7u,    8u,     15u,    16u,    17u,    31u,    32u,   33u,
        255u, 256u, 257u, 4095u, 4096u, 4097u, 32767u, 32768u, 65519u, 65520u, 65521u, 65535u}) {
    pages.push_back({p + 16 * size, size});
  }
  for (uint32_t offset = 16; offset < kPageBytes; offset = offset * 3 / 32 * 16 + 16) {
    pages.push_back({p + offset, kPageBytes});
  }
  std::vector<PageHash> hashes(pages.size());
  ASSERT_OK(engine_->hash(pages, hashes, pace_));
  for (const phos::Pace* pace : {&pace_, &beside_others_}) {
    // So that what is there already is not what should come.
    ASSERT_NO_FATAL_FAILURE(soil_the_pool());
    Copy copy;
    ASSERT_OK(engine_->copy(pages, into(copy), *pace));
    ASSERT_EQ(copy.hashes.size(), pages.size());
    for (size_t i = 0; i < pages.size(); i++) {
      const uint8_t* source = &bytes[pages[i].address - p];
      const PageHash expected = hash_page(*key_, source, pages[i].bytes);
      EXPECT_EQ(hashes[i], expected) << "page " << i << " of " << pages[i].bytes << " bytes";
      EXPECT_EQ(copy.hashes[i], expected) << "page " << i << " of " << pages[i].bytes << " bytes";
      EXPECT_EQ(memcmp(&copy.bytes[i * kPageBytes], source, pages[i].bytes), 0) << i;
      const auto* rest = &copy.bytes[i * kPageBytes + pages[i].bytes];
      EXPECT_EQ(std::count(rest, rest + kPageBytes - pages[i].bytes, 0),
                kPageBytes - pages[i].bytes);
    }
  }
}

// Words of all ones and all zeros: carries everywhere.
TEST_F(CopyTest, GpuHashesExtremeContents) {
  for (uint8_t value : {0x00, 0xff, 0x80, 0x7f}) {
    const std::vector<uint8_t> bytes(3 * kPageBytes, value);
    const CUdeviceptr p = upload(bytes);
    const auto pages = pages_of(p, bytes.size());
    std::vector<PageHash> hashes(pages.size());
    ASSERT_OK(engine_->hash(pages, hashes, pace_));
    for (const PageHash& hash : hashes) {
      EXPECT_EQ(hash, hash_page(*key_, bytes.data(), kPageBytes)) << int{value};
    }
    EXPECT_EQ(cuMemFree(p), CUDA_SUCCESS);
  }
}

TEST_F(CopyTest, AnotherKeyGivesOtherHashes) {
  const CUdeviceptr p = upload(random_bytes(kPageBytes, 2));
  const auto pages = pages_of(p, kPageBytes);
  PageHash before[1], after[1], again[1];
  ASSERT_OK(engine_->hash(pages, before, pace_));
  auto other = phos::PageHashKey::generate();
  ASSERT_OK(other);
  ASSERT_OK(engine_->use_key(*other));
  ASSERT_OK(engine_->hash(pages, after, pace_));
  ASSERT_OK(engine_->use_key(*key_));
  ASSERT_OK(engine_->hash(pages, again, pace_));
  EXPECT_NE(before[0], after[0]);
  EXPECT_EQ(before[0], again[0]);
}

// Far more buffers than there are slots and pool buffers.
TEST_F(CopyTest, RingWrapsAround) {
  const auto bytes = random_bytes(41 * kMiB + 12345, 3);
  const auto pages = pages_of(upload(bytes), bytes.size());
  for (const phos::Pace* pace : {&pace_, &beside_others_}) {
    Copy copy;
    ASSERT_OK(engine_->copy(pages, into(copy), *pace));
    ASSERT_EQ(copy.hashes.size(), pages.size());
    EXPECT_EQ(memcmp(copy.bytes.data(), bytes.data(), bytes.size()), 0);
    EXPECT_EQ(wrong_hashes(copy), 0u);
    EXPECT_EQ(pool_->statistics().in_use, 0u);
  }
}

// A limit that comes and goes while lanes are in flight.
TEST_F(CopyTest, PaceMayChangeInTheMiddle) {
  const auto bytes = random_bytes(30 * kMiB, 8);
  const auto pages = pages_of(upload(bytes), bytes.size());
  phos::Pace pace;
  Copy copy;
  const auto sink = into(copy);
  ASSERT_OK(engine_->copy(
      pages,
      [&](phos::CopiedPages copied) -> phos::Result<void> {
        pace.set_max_slowdown(pace.max_slowdown() > 0 ? 0 : 0.05);
        return sink(std::move(copied));
      },
      pace));
  EXPECT_EQ(copy.bytes, bytes);
  EXPECT_EQ(wrong_hashes(copy), 0u);
}

// Where others must not be slowed down, a copy starts no kernel.
TEST_F(CopyTest, CopyBesideOthersIsDmaOnly) {
  const auto bytes = random_bytes(3 * kMiB, 9);
  const auto pages = pages_of(upload(bytes), bytes.size());
  for (const phos::Pace* pace : {&pace_, &beside_others_}) {
    const size_t before = faults_->calls().size();
    Copy copy;
    ASSERT_OK(engine_->copy(pages, into(copy), *pace));
    const auto& calls = faults_->calls();
    EXPECT_EQ(std::count(calls.begin() + static_cast<ptrdiff_t>(before), calls.end(), "launch"),
              pace == &pace_ ? 2 : 0);
  }
}

// Nor does it have the GPU interrupt the CPUs for each piece of it: others run there.
TEST_F(CopyTest, CopyBesideOthersWaitsWithoutInterrupts) {
  std::set<ptrdiff_t> waits;
  for (const uint64_t size : {3 * kMiB, 41 * kMiB}) {
    const auto bytes = random_bytes(size, 10);
    const auto pages = pages_of(upload(bytes), bytes.size());
    const auto before = static_cast<ptrdiff_t>(faults_->calls().size());
    Copy copy;
    ASSERT_OK(engine_->copy(pages, into(copy), beside_others_));
    EXPECT_EQ(copy.bytes, bytes);
    const auto& calls = faults_->calls();
    EXPECT_GT(std::count(calls.begin() + before, calls.end(), "query"), 0);
    waits.insert(std::count(calls.begin() + before, calls.end(), "synchronize"));
  }
  EXPECT_EQ(waits.size(), 1u);  // however much is copied: to measure the link
}

TEST_F(CopyTest, NothingToDoIsDone) {
  ASSERT_OK(engine_->hash({}, {}, pace_));
  ASSERT_OK(engine_->copy(
      {},
      [](phos::CopiedPages) -> phos::Result<void> {
        return phos::Error(phos::Domain::kUsage, EINVAL, "no pages, no buffers");
      },
      pace_));
}

TEST_F(CopyTest, UnalignedAndOversizedPagesAreRefused) {
  const CUdeviceptr p = upload(random_bytes(2 * kPageBytes, 4));
  PageHash hash[1];
  for (PageRef page : {PageRef{p + 8, 4096}, PageRef{p, kPageBytes + 1}, PageRef{p, 0}}) {
    auto r = engine_->hash({&page, 1}, hash, pace_);
    ASSERT_FALSE(r);
    EXPECT_NE(r.error().message().find("multiple of 16"), std::string::npos);
  }
  const auto pages = pages_of(p, 2 * kPageBytes);
  EXPECT_FALSE(engine_->hash(pages, hash, pace_)) << "one hash for two pages";
  EXPECT_FALSE(engine_->broken());
}

}  // namespace
}  // namespace contract
