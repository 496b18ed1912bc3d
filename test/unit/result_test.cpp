// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/base/result.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <memory>
#include <string>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

bool is_open(int fd) {
  return fcntl(fd, F_GETFD) != -1;
}

TEST(Error, FromErrnoNamesTheCause) {
  Error error = Error::from_errno(ENOENT, "cannot open x");
  EXPECT_EQ(error.domain(), Domain::kErrno);
  EXPECT_EQ(error.code(), ENOENT);
  EXPECT_EQ(error.message(), "cannot open x: No such file or directory");
}

TEST(Error, WrapKeepsDomainAndCode) {
  Error error = Error(Domain::kCuda, 801, "not supported").wrap("pid 7").wrap("dump");
  EXPECT_EQ(error.domain(), Domain::kCuda);
  EXPECT_EQ(error.code(), 801);
  EXPECT_EQ(error.message(), "dump: pid 7: not supported");
}

TEST(Result, HoldsAValueOrAnError) {
  Result<std::string> good = std::string("yes");
  ASSERT_TRUE(good);
  EXPECT_EQ(*good, "yes");
  EXPECT_EQ(good->size(), 3u);
  Result<std::string> bad = Error(Domain::kUsage, 1, "no");
  ASSERT_FALSE(bad);
  EXPECT_EQ(bad.error().message(), "no");
}

TEST(Result, CarriesMoveOnlyValues) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(5);
  std::unique_ptr<int> taken = std::move(*result);
  EXPECT_EQ(*taken, 5);
}

TEST(Result, FalseIsAValue) {
  Result<bool> result = false;
  EXPECT_TRUE(result.ok());
  EXPECT_FALSE(*result);
}

TEST(Result, Void) {
  Result<void> good;
  EXPECT_TRUE(good);
  Result<void> bad = Error(Domain::kErrno, EIO, "disk");
  EXPECT_FALSE(bad);
  EXPECT_EQ(bad.error().code(), EIO);
}

TEST(UniqueFd, ClosesOnceAndMoves) {
  int number = open("/dev/null", O_RDONLY | O_CLOEXEC);
  ASSERT_GE(number, 0);
  {
    UniqueFd first(number);
    UniqueFd second(std::move(first));
    EXPECT_FALSE(first);
    EXPECT_EQ(second.get(), number);
    second = UniqueFd(second.release());
    EXPECT_TRUE(is_open(number));
  }
  EXPECT_FALSE(is_open(number));
}

TEST(UniqueFd, ReleaseGivesUpOwnership) {
  int number = open("/dev/null", O_RDONLY | O_CLOEXEC);
  {
    UniqueFd fd(number);
    EXPECT_EQ(fd.release(), number);
  }
  ASSERT_TRUE(is_open(number));
  close(number);
}

}  // namespace
}  // namespace phos
