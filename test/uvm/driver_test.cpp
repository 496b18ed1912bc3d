// SPDX-License-Identifier: GPL-2.0-only
// nvidia-uvm and phos.ko loaded and unloaded around trackers; what phos.ko refuses.
#include "test/uvm/driver.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include <cerrno>

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

class Kmod : public Watched {};
INSTANTIATE_TEST_SUITE_P(, Kmod, testing::Values(Backend::kKmod), backend_name);

TEST_P(Kmod, RefusesWhatItDoesNotKnow) {
  phos::UniqueFd device(open(PHOS_KMOD_DEVICE, O_RDWR | O_CLOEXEC));
  phos::UniqueFd other(open("/dev/null", O_RDWR | O_CLOEXEC));
  auto layout = phos::uvm_layout();
  ASSERT_TRUE(layout) << layout.error().message();
  phos_kmod_track good = {};
  good.abi = PHOS_KMOD_ABI;
  good.pid = getpid();
  good.slots = 1024;
  good.space_count = 1;
  good.spaces[0] = other.get();
  good.layout = layout->offsets;
  const auto answer = [&](const phos_kmod_track& want) {
    return ioctl(device.get(), PHOS_KMOD_TRACK, &want) == 0 ? 0 : errno;
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
  phos_kmod_epoch epoch = {};
  EXPECT_EQ(ioctl(device.get(), PHOS_KMOD_NEXT_EPOCH, &epoch), -1);
  EXPECT_EQ(errno, ENXIO);
  EXPECT_EQ(ioctl(device.get(), 0, 0), -1);
  EXPECT_EQ(errno, ENOTTY);
  EXPECT_EQ(mmap(nullptr, kPage, PROT_READ, MAP_SHARED, device.get(), 0), MAP_FAILED);
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
