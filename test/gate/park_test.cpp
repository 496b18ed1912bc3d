// SPDX-License-Identifier: GPL-2.0-only
// Closed: every thread parks at its next call, and nothing happens. Open: they go on as if nothing
// had been.
#include <cuda.h>
#include <signal.h>

#include <cstdio>
#include <cstring>

#include "test/gate/fixture.h"

namespace gate_test {
namespace {

// What is in the target's memory, through an import, as phosd reads it.
std::vector<uint8_t> read_memory(Agent& agent, uint64_t address) {
  std::vector<uint8_t> bytes(8 * 4096);
  auto all = agent.enumerate();
  if (!all) return {};
  for (const phos::AgentAllocation& a : *all) {
    if (a.address != address) continue;
    auto exported = agent.export_memory({&a, 1}, phos::AgentGuard::kCaller);
    if (!exported) return {};
    CUipcMemHandle handle;
    memcpy(&handle, (*exported)[0].ipc_handle.data(), sizeof handle);
    CUdeviceptr p = 0;
    EXPECT_EQ(cuIpcOpenMemHandle(&p, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS), CUDA_SUCCESS);
    EXPECT_EQ(cuMemcpyDtoH(bytes.data(), p, bytes.size()), CUDA_SUCCESS);
    EXPECT_EQ(cuIpcCloseMemHandle(p), CUDA_SUCCESS);
    return bytes;
  }
  return {};
}

// The variants of functions for a default stream in each thread, and who has pointers to functions
// from cuGetProcAddress: four threads, with one function each.
TEST_F(GateTest, ParksWhoeverCallsByOtherNames) {
  ASSERT_EQ(target_.ask("start variants 4"), "ok");
  ASSERT_TRUE(eventually([&] { return number("count") > 1000; }));
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  EXPECT_EQ(status().sent, 4u);
  EXPECT_EQ(status().passed, 0u);
  EXPECT_EQ(calls_in(milliseconds(50)), 0u);
  CUcheckpointLockArgs arguments = {};
  ASSERT_EQ(cuCheckpointProcessLock(target_.pid(), &arguments), CUDA_SUCCESS);
  auto quiet = gate_->check_quiet();
  EXPECT_TRUE(quiet) << quiet.error().message();
  ASSERT_EQ(cuCheckpointProcessUnlock(target_.pid(), nullptr), CUDA_SUCCESS);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, ParksEveryThreadAndLetsItGoOn) {
  ASSERT_EQ(target_.ask("start memset 8"), "ok");
  ASSERT_TRUE(eventually([&] { return number("count") > 1000; }));
  const auto original = library_text(target_.pid());
  auto start = std::chrono::steady_clock::now();
  ASSERT_NO_FATAL_FAILURE(close_gate());
  const double closing = milliseconds_since(start);
  ASSERT_TRUE(wait_parked(8));
  const double parked = milliseconds_since(start);
  EXPECT_NE(library_text(target_.pid()), original);

  const GateStatus s = status();
  EXPECT_EQ(s.state, State::kClosed);
  EXPECT_EQ(s.sent, 8u);
  EXPECT_EQ(s.arrived, 8u);
  EXPECT_EQ(s.passed, 0u);
  EXPECT_TRUE(s.blocked_threads.empty());
  EXPECT_EQ(calls_in(milliseconds(50)), 0u);

  start = std::chrono::steady_clock::now();
  auto released = gate_->release();
  const double releasing = milliseconds_since(start);
  ASSERT_TRUE(released) << released.error().message();
  ASSERT_TRUE(eventually([&] { return status().parked == 0; }));
  auto opened = gate_->open();
  ASSERT_TRUE(opened) << opened.error().message();
  printf(
      "%zu probes: closed in %.1f ms, 8 threads parked after %.1f ms; released in %.3f ms, "
      "probes gone after %.1f ms\n",
      gate_->probe_count(), closing, parked, releasing, milliseconds_since(start));
  EXPECT_EQ(library_text(target_.pid()), original);
  EXPECT_EQ(maps_of(target_.pid()).find("[uprobes"), std::string::npos);
  expect_works();
}

TEST_F(GateTest, MemoryStaysAsItIsWhileClosed) {
  CUdevice device;
  CUcontext context;
  ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
  ASSERT_EQ(cuDeviceGet(&device, 0), CUDA_SUCCESS);
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, device), CUDA_SUCCESS);
  ASSERT_EQ(cuCtxSetCurrent(context), CUDA_SUCCESS);
  const uint64_t address = number("memory");
  ASSERT_EQ(target_.ask("start memset 8"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(8));
  // The agent's calls pass.
  const auto first = read_memory(*agent_, address);
  ASSERT_FALSE(first.empty());
  for (int i = 0; i < 5; i++) EXPECT_EQ(read_memory(*agent_, address), first);
  ASSERT_TRUE(gate_->open());
  EXPECT_TRUE(eventually([&] { return read_memory(*agent_, address) != first; }));
  expect_works();
  cuDevicePrimaryCtxRelease(device);
}

TEST_F(GateTest, ParksQuestionsAndAllocationsToo) {
  ASSERT_EQ(target_.ask("start query 2"), "ok");
  ASSERT_EQ(target_.ask("start churn 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  EXPECT_EQ(calls_in(milliseconds(20)), 0u);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, RegistersAndErrnoSurvive) {
  if (!number("registers")) GTEST_SKIP() << "this libcuda's cuGetErrorName uses vector registers";
  ASSERT_EQ(target_.ask("start registers 4"), "ok");
  for (int i = 0; i < 5; i++) {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_TRUE(wait_parked(4));
    ASSERT_TRUE(gate_->open());
    gate_.reset();
  }
  expect_works();
}

TEST_F(GateTest, ThreadsStartedMeanwhilePark) {
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_EQ(target_.ask("start memset 3"), "ok");
  ASSERT_TRUE(wait_parked(3));
  ASSERT_EQ(target_.ask("start query 5"), "ok");
  ASSERT_TRUE(wait_parked(8));
  EXPECT_EQ(number("count"), 0u);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, ClosesAndOpensAgainAndAgain) {
  const std::string caught = status_field(target_.pid(), "SigCgt");
  ASSERT_EQ(target_.ask("start memset 8"), "ok");
  const auto original = library_text(target_.pid());
  for (int i = 0; i < 10; i++) {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_TRUE(wait_parked(8));
    EXPECT_NE(status_field(target_.pid(), "SigCgt"), caught);
    auto opened = gate_->open();
    ASSERT_TRUE(opened) << opened.error().message();
    EXPECT_EQ(status_field(target_.pid(), "SigCgt"), caught);
    EXPECT_EQ(library_text(target_.pid()), original);
    gate_.reset();
  }
  expect_works();
}

TEST_F(GateTest, OpensWhenDestroyed) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  const auto original = library_text(target_.pid());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  gate_.reset();
  EXPECT_EQ(library_text(target_.pid()), original);
  expect_works();
}

TEST_F(GateTest, ThreadsStayParkedWithoutProbes) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  const auto original = library_text(target_.pid());
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  ASSERT_TRUE(gate_->disarm());
  EXPECT_EQ(library_text(target_.pid()), original);
  EXPECT_EQ(calls_in(milliseconds(30)), 0u);
  EXPECT_EQ(status().parked, 4u);
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, OneGateAtATime) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  auto second = Gate::close(target_.pid(), *agent_);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code(), EBUSY) << second.error().message();
  // Another session gets no agent, hence no gate.
  auto other = Agent::attach(target_.pid(), agent_->restore_tid());
  ASSERT_FALSE(other);
  EXPECT_EQ(other.error().code(), EBUSY) << other.error().message();
  ASSERT_TRUE(wait_parked(2)) << "the refused ones must leave the gate alone";
  ASSERT_TRUE(gate_->open());
  gate_.reset();
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  ASSERT_TRUE(gate_->open());
  expect_works();
}

TEST_F(GateTest, EndsWithItsProcess) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  kill(target_.pid(), SIGKILL);
  ASSERT_TRUE(target_.wait_death());
  auto s = gate_->status();
  ASSERT_FALSE(s);
  EXPECT_EQ(s.error().code(), ESRCH) << s.error().message();
  auto opened = gate_->open();
  EXPECT_TRUE(opened) << opened.error().message();
}

TEST_F(GateTest, ProcessEndsWhileThreadsAreParked) {
  ASSERT_EQ(target_.ask("start memset 4"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(4));
  target_.close_input();
  EXPECT_EQ(target_.wait_death().value_or(-1), 0);
}

TEST_F(GateTest, AgentCanBeUnloadedAfterwardsOnly) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_TRUE(wait_parked(2));
  auto refused = agent_->unload();
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code(), EBUSY) << refused.error().message();
  ASSERT_TRUE(gate_->open());
  gate_.reset();
  auto unloaded = agent_->unload();
  EXPECT_TRUE(unloaded) << unloaded.error().message();
  EXPECT_EQ(maps_of(target_.pid()).find(PHOS_MAILBOX_NAME), std::string::npos);
  expect_works();
}

}  // namespace
}  // namespace gate_test
