// SPDX-License-Identifier: GPL-2.0-only
// nvidia-uvm and phos.ko loaded and unloaded around trackers; what phos.ko refuses.
#include "test/uvm/driver.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstdlib>

#include "gpu-tracker/track/uvm_layout.h"
#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

using phos::UvmEpoch;

// One page, written to in an epoch of this backend's tracker, is what it records.
void expect_works(Backend backend) {
  auto space = Space::make();
  ASSERT_TRUE(space) << space.error().message();
  auto memory = space->map(kAddress, kChunk);
  ASSERT_TRUE(memory) << memory.error().message();
  memset(*memory, 1, kChunk);
  auto tracker = start(backend, getpid());
  ASSERT_TRUE(tracker) << tracker.error().message();
  ASSERT_TRUE(space->revoke_writes(*memory, kChunk));
  (*tracker)->next_epoch();
  (*memory)[3 * kPage] = 2;
  const UvmEpoch epoch = (*tracker)->next_epoch();
  EXPECT_EQ(epoch.doubt(), "");
  EXPECT_EQ(epoch.granted_pages(), backend == Backend::kTools ? kChunk / kPage : 1u);
  EXPECT_TRUE(epoch.maybe_dirty(kAddress + 3 * kPage, 1));
  munmap(*memory, kChunk);
}

class Driver : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (!uvm_module()) GTEST_SKIP() << "PHOS_UVM_MODULE does not name nvidia-uvm.ko";
    if (const std::string reason = missing(GetParam()); !reason.empty()) GTEST_SKIP() << reason;
  }
};
PHOS_UVM_BACKENDS(Driver);

TEST_P(Driver, MayBeReplacedBetweenTrackers) {
  expect_works(GetParam());
  ASSERT_EQ(unload_uvm(), 0);
  auto none = start(GetParam(), getpid());
  ASSERT_FALSE(none);
  EXPECT_EQ(none.error().code(), ENOTSUP);
  ASSERT_EQ(load_uvm(), 0);
  expect_works(GetParam());
}

TEST_P(Driver, UnderATrackerStaysOrIsMissed) {
  auto space = std::make_unique<Space>();
  if (auto made = Space::make()) *space = std::move(*made);
  auto tracker = start(GetParam(), getpid());
  ASSERT_TRUE(tracker) << tracker.error().message();
  space.reset();
  if (GetParam() != Backend::kKmod) {
    EXPECT_EQ(unload_at_once("nvidia_uvm"), EWOULDBLOCK);
    EXPECT_EQ((*tracker)->next_epoch().doubt(), "");
    return;
  }
  ASSERT_EQ(unload_uvm(), 0);
  EXPECT_NE((*tracker)->next_epoch().doubt(), "");
  ASSERT_EQ(load_uvm(), 0);
  EXPECT_NE((*tracker)->next_epoch().doubt(), "");
  expect_works(GetParam());  // a new one, beside it
  EXPECT_EQ(unload_at_once("phos"), EWOULDBLOCK);
}

class OneSpace : public Watched {};
INSTANTIATE_TEST_SUITE_P(, OneSpace, testing::Values(Backend::kKmod, Backend::kTools),
                         backend_name);

TEST_P(OneSpace, ThatIsNotTheOnlyOneMakesADoubt) {
  begin();
  auto another = Space::make();
  ASSERT_TRUE(another) << another.error().message();
  EXPECT_NE(watch_->next_epoch().doubt(), "");
  EXPECT_NE(watch_->next_epoch().doubt(), "");
}

// A tracker of this process, told by hand.
struct UniqueTracker {
  explicit UniqueTracker(int space) {
    if (auto known = phos::uvm_layout()) want.layout = known->offsets;
    want.abi = PHOS_KMOD_ABI;
    want.pid = getpid();
    want.slots = 1024;
    want.space_count = 1;
    want.spaces[0] = space;
  }
  int track() const { return ioctl(device.get(), PHOS_KMOD_TRACK, &want) == 0 ? 0 : errno; }

  phos::UniqueFd device{open(PHOS_KMOD_DEVICE, O_RDWR | O_CLOEXEC)};
  phos_kmod_track want = {};
};

class Kmod : public Watched {};
INSTANTIATE_TEST_SUITE_P(, Kmod, testing::Values(Backend::kKmod), backend_name);

TEST_P(Kmod, RefusesWhatItDoesNotKnow) {
  phos::UniqueFd other(open("/dev/null", O_RDWR | O_CLOEXEC));
  UniqueTracker raw(other.get());
  const phos_kmod_track good = raw.want;
  const auto answer = [&](const phos_kmod_track& want) {
    raw.want = want;
    return raw.track();
  };
  EXPECT_EQ(answer(good), EBADF);
  phos_kmod_track bad = good;
  bad.abi++;
  EXPECT_EQ(answer(bad), EPROTO);
  for (const uint32_t slots : {0u, 1000u, 1u << 31}) {
    bad = good;
    bad.slots = slots;
    EXPECT_EQ(answer(bad), EINVAL) << slots;
  }
  bad = good;
  bad.space_count = PHOS_KMOD_MAX_SPACES + 1;
  EXPECT_EQ(answer(bad), EINVAL);
  bad = good;
  bad.layout.block_start = 49;
  EXPECT_EQ(answer(bad), EINVAL);
  bad = good;
  bad.layout.mutex_bytes = 7;
  EXPECT_EQ(answer(bad), EOPNOTSUPP);
  phos_kmod_epoch epoch = {};
  EXPECT_EQ(ioctl(raw.device.get(), PHOS_KMOD_NEXT_EPOCH, &epoch), -1);
  EXPECT_EQ(errno, ENXIO);
  EXPECT_EQ(ioctl(raw.device.get(), 0, 0), -1);
  EXPECT_EQ(errno, ENOTTY);
  EXPECT_EQ(mmap(nullptr, kPage, PROT_READ, MAP_SHARED, raw.device.get(), 0), MAP_FAILED);
}

TEST_P(Kmod, TracksOnceAFile) {
  UniqueTracker raw(space_.fd());
  ASSERT_EQ(raw.track(), 0);
  EXPECT_EQ(raw.track(), EBUSY);
  // The first one goes on.
  phos_kmod_epoch epoch = {};
  EXPECT_EQ(ioctl(raw.device.get(), PHOS_KMOD_NEXT_EPOCH, &epoch), 0);
  EXPECT_EQ(epoch.doubts, 0u);
}

TEST_P(Kmod, ShowsARecordThatCannotBeWritten) {
  UniqueTracker raw(space_.fd());
  ASSERT_EQ(raw.track(), 0);
  EXPECT_EQ(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, raw.device.get(), 0),
            MAP_FAILED);
  void* p = mmap(nullptr, kPage, PROT_READ, MAP_SHARED, raw.device.get(), 0);
  ASSERT_NE(p, MAP_FAILED);
  EXPECT_EQ(mprotect(p, kPage, PROT_READ | PROT_WRITE), -1);
  EXPECT_EQ(errno, EACCES);
  munmap(p, kPage);
}

// Not while a file is open, nor while its record is mapped alone; then it is, and comes back.
TEST_P(Kmod, StaysLoadedWhileItIsInUse) {
  const char* module = getenv("PHOS_KMOD_MODULE");
  if (!module) GTEST_SKIP() << "PHOS_KMOD_MODULE does not name phos.ko";
  watch_.reset();
  UniqueTracker raw(space_.fd());
  EXPECT_EQ(unload_at_once("phos"), EWOULDBLOCK);
  ASSERT_EQ(raw.track(), 0);
  EXPECT_EQ(unload_at_once("phos"), EWOULDBLOCK);
  void* p = mmap(nullptr, kPage, PROT_READ, MAP_SHARED, raw.device.get(), 0);
  ASSERT_NE(p, MAP_FAILED);
  raw.device.reset();
  EXPECT_EQ(unload_at_once("phos"), EWOULDBLOCK);
  memory_[5 * kPage] = 7;  // through its hooks
  munmap(p, kPage);
  ASSERT_EQ(unload_at_once("phos"), 0);
  memory_[6 * kPage] = 7;
  EXPECT_FALSE(start(GetParam(), getpid()));
  ASSERT_EQ(load_module(module), 0);
  watch(phos::kUvmChunks);
  begin();
  byte(8) = 1;
  EXPECT_EQ(dirty(watch_->next_epoch()), recorded({8}));
}

TEST_P(Kmod, IsForRootOnly) {
  const pid_t pid = fork();
  if (pid == 0) {
    const int r = setresuid(65534, 65534, 65534);
    _exit(r == 0 && open(PHOS_KMOD_DEVICE, O_RDWR) < 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
}

}  // namespace
}  // namespace uvm_test
