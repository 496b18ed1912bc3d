// SPDX-License-Identifier: GPL-2.0-only
// Who is proved to be outside of libcuda, and who is not.
#include <cuda.h>
#include <unistd.h>

#include "test/gate/fixture.h"

namespace gate_test {
namespace {

class QuietTest : public GateTest {
 protected:
  CUresult lock() {
    CUcheckpointLockArgs arguments = {};
    return cuCheckpointProcessLock(target_.pid(), &arguments);
  }
  CUresult unlock() { return cuCheckpointProcessUnlock(target_.pid(), nullptr); }
};

TEST_F(QuietTest, ParkedAndSleepingThreadsAreQuiet) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_EQ(target_.ask("start query 4"), "ok");
  ASSERT_EQ(target_.ask("sleeper"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_EQ(lock(), CUDA_SUCCESS);
  ASSERT_EQ(unlock(), CUDA_SUCCESS);
  ASSERT_EQ(lock(), CUDA_SUCCESS);
  const auto start = std::chrono::steady_clock::now();
  auto quiet = gate_->check_quiet(milliseconds(5000));
  EXPECT_TRUE(quiet) << quiet.error().message();
  printf("shown to be quiet in %.2f ms\n", milliseconds_since(start));
  EXPECT_EQ(unlock(), CUDA_SUCCESS);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(QuietTest, ThreadInsideTheDriverIsNot) {
  ASSERT_EQ(target_.ask("sync 2000"), "ok");
  ASSERT_TRUE(wait_inside());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  auto quiet = gate_->check_quiet(milliseconds(20));
  ASSERT_FALSE(quiet);
  EXPECT_EQ(quiet.error().code(), EAGAIN);
  // A driver that waits may spin.
  EXPECT_TRUE(quiet.error().message().find("inside libcuda") != std::string::npos ||
              quiet.error().message().find("running") != std::string::npos)
      << quiet.error().message();
  // Lock waits for the kernel; then the thread leaves, and ends.
  ASSERT_EQ(lock(), CUDA_SUCCESS);
  ASSERT_EQ(unlock(), CUDA_SUCCESS);
  ASSERT_EQ(lock(), CUDA_SUCCESS);
  quiet = gate_->check_quiet(milliseconds(5000));
  EXPECT_TRUE(quiet) << quiet.error().message();
  EXPECT_EQ(unlock(), CUDA_SUCCESS);
  ASSERT_TRUE(gate_->open());
  EXPECT_EQ(number("stop"), 0u);
}

// Tables of its functions, on the stack and in memory that follows it, are no calls.
TEST_F(QuietTest, PointersToFunctionsAreNotCalls) {
  ASSERT_EQ(target_.ask("start-asleep"), "ok");
  ASSERT_EQ(target_.ask("start memset 1"), "ok");
  usleep(50000);
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(1));
  auto quiet = gate_->check_quiet(milliseconds(5000));
  EXPECT_TRUE(quiet) << quiet.error().message();
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// Held up at the driver's own lock, from before the gate: inside, until it is unlocked.
TEST_F(QuietTest, ThreadHeldUpByTheDriversLockIsNot) {
  ASSERT_EQ(lock(), CUDA_SUCCESS);
  ASSERT_EQ(target_.ask("start memset 1"), "ok");
  ASSERT_TRUE(wait_inside());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  auto quiet = gate_->check_quiet(milliseconds(20));
  ASSERT_FALSE(quiet);
  EXPECT_EQ(quiet.error().code(), EAGAIN) << quiet.error().message();
  ASSERT_EQ(unlock(), CUDA_SUCCESS);
  ASSERT_TRUE(wait_parked(1));
  quiet = gate_->check_quiet(milliseconds(5000));
  EXPECT_TRUE(quiet) << quiet.error().message();
  ASSERT_TRUE(gate_->open());
  expect_works();
}

// The contract with the driver that check_quiet() rests on: what it starts can be told by name. The
// target has started no thread itself.
TEST_F(QuietTest, DriversThreadsAreKnownByName) {
  auto threads = phos::list_threads(target_.pid());
  ASSERT_TRUE(threads);
  size_t drivers = 0;
  for (const phos::ThreadInfo& t : *threads) {
    if (t.tid == target_.pid() || t.comm == PHOS_AGENT_THREAD_NAME) continue;
    EXPECT_TRUE(phos::is_driver_thread(t)) << t.comm;
    drivers++;
  }
  EXPECT_GE(drivers, 2u) << "the restore thread, and one for events";
}

// And this: what cannot be probed does nothing that matters (gate.h).
TEST_F(QuietTest, OnlyKnownFunctionsAreUngated) {
  ASSERT_NO_FATAL_FAILURE(close_gate());
  for (const std::string& name : gate_->ungated()) {
    EXPECT_TRUE(name.rfind("cudbg", 0) == 0 || name.rfind("cuMemGetAttribute", 0) == 0) << name;
  }
  ASSERT_TRUE(gate_->open());
}

TEST(DriverThread, NamesAreMatchedExactly) {
  auto is_driver = [](const std::string& comm) {
    phos::ThreadInfo t;
    t.comm = comm;
    return phos::is_driver_thread(t);
  };
  EXPECT_TRUE(is_driver("cuda00001400006"));
  EXPECT_TRUE(is_driver("cuda-EvtHandlr"));
  EXPECT_FALSE(is_driver("cuda0000140000"));
  EXPECT_FALSE(is_driver("cuda_worker_thr"));
  EXPECT_FALSE(is_driver("cuda-EvtHandlr2"));
  EXPECT_FALSE(is_driver("python3"));
  EXPECT_FALSE(is_driver(""));
}

TEST_F(QuietTest, OpenGateIsNot) {
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(gate_->open());
  EXPECT_FALSE(gate_->check_quiet(milliseconds(0)));
}

}  // namespace
}  // namespace gate_test
