// SPDX-License-Identifier: GPL-2.0-only
// Whether the page cache holds a file.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

constexpr uint64_t kMiB = 1 << 20;

// In memory, where what has never been written has no pages.
class CachedTest : public testing::TestWithParam<uint64_t> {
 protected:
  void SetUp() override {
    const UniqueFd small(memfd_create("small", MFD_CLOEXEC));
    ASSERT_EQ(fallocate(small.get(), 0, 0, 4096), 0);
    if (!is_cached(small.get(), 4096)) GTEST_SKIP() << "this kernel does not tell (Linux 6.5)";
    file_ = UniqueFd(memfd_create("file", MFD_CLOEXEC));
    ASSERT_EQ(ftruncate(file_.get(), static_cast<off_t>(GetParam())), 0);
  }
  void fill(uint64_t begin, uint64_t end) {
    ASSERT_EQ(fallocate(file_.get(), 0, static_cast<off_t>(begin), static_cast<off_t>(end - begin)),
              0);
  }
  bool cached() const { return is_cached(file_.get(), GetParam()); }

  UniqueFd file_;
};

TEST_P(CachedTest, IsTrueOfTheLargerPart) {
  const uint64_t size = GetParam();
  EXPECT_FALSE(cached());
  fill(0, size / 3);
  EXPECT_FALSE(cached());
  fill(size / 3, size / 3 * 2);
  EXPECT_TRUE(cached());
  fill(size / 3 * 2, size);
  EXPECT_TRUE(cached());
}

TEST_P(CachedTest, IsTrueOfTheEndAloneIfThatIsMost) {
  fill(GetParam() / 3, GetParam());
  EXPECT_TRUE(cached());
}

INSTANTIATE_TEST_SUITE_P(Sizes, CachedTest,
                         testing::Values(12288, 3 * kMiB, 16 * kMiB, 16 * kMiB + 4096, 129 * kMiB));

TEST(Cached, IsFalseOfWhatIsNoFile) {
  EXPECT_FALSE(is_cached(-1, 1));
}

}  // namespace
}  // namespace phos
