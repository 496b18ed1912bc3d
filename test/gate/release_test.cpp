// SPDX-License-Identifier: GPL-2.0-only
// Memory released and brought back behind the gate, from under threads that use it all the time.
#include <cuda.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "test/contract/fixture.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

using phos::AgentAllocation;
using phos::MapBackOptions;
using phos::ReleasedMemory;
using phos::ReleasedState;
using phos::ReleaseStatus;

constexpr MapBackOptions kAdoptAll{0};

// Memory of the target's, mapped into this process as phosd does it.
class Import {
 public:
  Import(Agent& agent, const AgentAllocation& a) : size_(a.mapping_size) {
    auto exported = agent.export_memory({&a, 1}, phos::AgentGuard::kCaller);
    EXPECT_TRUE(exported) << exported.error().message();
    if (!exported) return;
    const phos::AgentExport& e = (*exported)[0];
    EXPECT_EQ(e.status, phos::ExportStatus::kExported) << e.driver_result;
    by_fd_ = e.type == phos::ExportType::kFd;
    if (!by_fd_) {
      CUipcMemHandle handle;
      memcpy(&handle, e.ipc_handle.data(), sizeof handle);
      EXPECT_EQ(cuIpcOpenMemHandle(&p_, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS), CUDA_SUCCESS);
      return;
    }
    CUmemGenericAllocationHandle handle;
    void* const fd = reinterpret_cast<void*>(static_cast<intptr_t>(e.fd.get()));
    CUmemAccessDesc access = {};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {a.device}};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    EXPECT_EQ(cuMemImportFromShareableHandle(&handle, fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
              CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressReserve(&p_, size_, 0, 0, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuMemMap(p_, size_, 0, handle, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuMemSetAccess(p_, size_, &access, 1), CUDA_SUCCESS);
    cuMemRelease(handle);
  }
  ~Import() {
    if (!by_fd_) {
      EXPECT_EQ(cuIpcCloseMemHandle(p_), CUDA_SUCCESS);
      return;
    }
    EXPECT_EQ(cuMemUnmap(p_, size_), CUDA_SUCCESS);
    EXPECT_EQ(cuMemAddressFree(p_, size_), CUDA_SUCCESS);
  }
  CUdeviceptr get() const { return p_; }

 private:
  size_t size_;
  bool by_fd_ = false;
  CUdeviceptr p_ = 0;
};

// Page-locked, as what phosd copies to and from.
class Staging {
 public:
  explicit Staging(size_t size) { EXPECT_EQ(cuMemHostAlloc(&p_, size, 0), CUDA_SUCCESS); }
  ~Staging() { EXPECT_EQ(cuMemFreeHost(p_), CUDA_SUCCESS); }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  void* get() const { return p_; }

 private:
  void* p_ = nullptr;
};

struct Saved {
  AgentAllocation memory;
  std::vector<uint8_t> contents;
};

class GatedRelease : public GateTest {
 protected:
  void SetUp() override {
    GateTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
    ASSERT_EQ(cuDeviceGet(&device_, 0), CUDA_SUCCESS);
    CUcontext context;
    ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, device_), CUDA_SUCCESS);
    ASSERT_EQ(cuCtxSetCurrent(context), CUDA_SUCCESS);
    retained_ = true;
  }
  void TearDown() override {
    if (retained_) cuDevicePrimaryCtxRelease(device_);
  }

  // Closed, and no thread is in the driver.
  void close_and_drain() {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
    // A thread that the driver's lock holds up inside goes on when it is unlocked, and needs a
    // moment to get out.
    phos::Result<void> quiet;
    for (int tries = 0; tries < 50; tries++) {
      ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
      quiet = gate_->check_quiet(milliseconds(100));
      ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
      if (quiet) return;
      usleep(2000);
    }
    ASSERT_TRUE(quiet) << quiet.error().message();
  }

  std::vector<Saved> save() {
    std::vector<Saved> saved;
    auto all = agent_->enumerate();
    EXPECT_TRUE(all) << all.error().message();
    for (const AgentAllocation& a : *all) {
      if (a.kind != phos::AllocationKind::kDevice) continue;
      saved.push_back({a, std::vector<uint8_t>(a.size)});
      const Import import(*agent_, a);
      const Staging staging(a.size);
      EXPECT_EQ(cuMemcpyDtoH(staging.get(), import.get(), a.size), CUDA_SUCCESS);
      memcpy(saved.back().contents.data(), staging.get(), a.size);
    }
    return saved;
  }

  // False: a thread is in the middle of freeing memory for which the agent stands in.
  bool try_release(const std::vector<Saved>& saved) {
    std::vector<AgentAllocation> memory;
    for (const Saved& s : saved) memory.push_back(s.memory);
    auto released = agent_->release(memory);
    if (!released && released.error().code() == EBUSY) return false;
    EXPECT_TRUE(released) << released.error().message();
    for (const phos::AgentRelease& r : *released) {
      EXPECT_EQ(r.status, ReleaseStatus::kReleased) << r.driver_result;
    }
    return true;
  }

  // Until all is released and the gate held.
  std::vector<Saved> close_and_release() {
    for (int i = 0; i < 100; i++) {
      close_and_drain();
      if (HasFatalFailure()) return {};
      auto saved = save();
      EXPECT_TRUE(gate_->hold());
      if (try_release(saved)) return saved;
      EXPECT_TRUE(gate_->open());
      gate_.reset();
      std::this_thread::sleep_for(milliseconds(5));
    }
    ADD_FAILURE() << "there is always a thread that frees";
    return {};
  }

  void bring_back(const std::vector<Saved>& saved, const MapBackOptions& options) {
    auto back = agent_->map_back(options);
    ASSERT_TRUE(back) << back.error().message();
    EXPECT_EQ(agent_->missing_hook(), 0);
    ASSERT_EQ(back->size(), saved.size());
    for (size_t i = 0; i < saved.size(); i++) {
      const ReleasedMemory& m = (*back)[i];
      ASSERT_TRUE(m.state == ReleasedState::kNative || m.state == ReleasedState::kAdopted)
          << static_cast<int>(m.state) << " " << m.driver_result;
      ASSERT_EQ(m.memory.address, saved[i].memory.address);
      const Import import(*agent_, m.memory);
      const Staging staging(saved[i].contents.size());
      memcpy(staging.get(), saved[i].contents.data(), saved[i].contents.size());
      ASSERT_EQ(cuMemcpyHtoD(import.get(), staging.get(), saved[i].contents.size()), CUDA_SUCCESS);
    }
    auto loaded = agent_->contents_loaded();
    ASSERT_TRUE(loaded) << loaded.error().message();
  }

  void open_gate() {
    auto opened = gate_->open();
    ASSERT_TRUE(opened) << opened.error().message();
    gate_.reset();
  }

  // One whole stop.
  void cycle(const MapBackOptions& options) {
    const auto saved = close_and_release();
    ASSERT_GE(saved.size(), 1u);
    ASSERT_EQ(contract::lock(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::checkpoint(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::restore(target_.pid()), CUDA_SUCCESS);
    ASSERT_EQ(contract::unlock(target_.pid()), CUDA_SUCCESS);
    ASSERT_NO_FATAL_FAILURE(bring_back(saved, options));
    const auto now = save();
    ASSERT_EQ(now.size(), saved.size());
    for (size_t i = 0; i < now.size(); i++) EXPECT_EQ(now[i].contents, saved[i].contents);
    ASSERT_NO_FATAL_FAILURE(open_gate());
  }

  CUdevice device_ = 0;
  bool retained_ = false;
};

TEST_F(GatedRelease, ThreadsThatUseAndFreeTheMemoryGoOn) {
  for (const char* what : {"start memset 3", "start churn 3", "start query 2", "start range 2"}) {
    ASSERT_EQ(target_.ask(what), "ok");
  }
  for (const MapBackOptions& options : {kAdoptAll, MapBackOptions{}, kAdoptAll, kAdoptAll}) {
    ASSERT_NO_FATAL_FAILURE(cycle(options));
    const uint64_t before = number("count");
    EXPECT_TRUE(eventually([&] { return number("count") > before + 50; }));
  }
  expect_works();
}

TEST_F(GatedRelease, AgentLeavesWhenNeitherGateNorMemoryNeedIt) {
  auto expect_busy = [&](const char* when) {
    auto r = agent_->unload();
    ASSERT_FALSE(r) << when;
    EXPECT_EQ(r.error().code(), EBUSY) << when << ": " << r.error().message();
  };
  const auto saved = close_and_release();
  ASSERT_EQ(saved.size(), 1u);
  expect_busy("closed, memory released");
  ASSERT_NO_FATAL_FAILURE(open_gate());
  expect_busy("open, memory released");
  ASSERT_NO_FATAL_FAILURE(close_gate());
  ASSERT_NO_FATAL_FAILURE(bring_back(saved, {}));
  expect_busy("closed, memory back");
  ASSERT_NO_FATAL_FAILURE(open_gate());
  auto gone = agent_->unload();
  EXPECT_TRUE(gone) << gone.error().message();
  ASSERT_EQ(target_.ask("start memset 1"), "ok");
  expect_works();
}

// A thread for which the agent answers enters libcuda past the gate: wherever it was interrupted,
// it is not outside.
TEST_F(GatedRelease, ThreadInTheAgentsCodeIsNotQuiet) {
  ASSERT_NO_FATAL_FAILURE(cycle(kAdoptAll));
  ASSERT_EQ(target_.ask("start range 1"), "ok");
  auto threads = phos::list_threads(target_.pid());
  ASSERT_TRUE(threads);
  int tid = 0;
  for (const phos::ThreadInfo& t : *threads) {
    if (t.tid == target_.pid() || t.comm == PHOS_AGENT_THREAD_NAME || is_driver_thread(t)) continue;
    tid = t.tid;
  }
  ASSERT_NE(tid, 0);
  auto code = agent_->call_code();
  ASSERT_TRUE(code);
  ASSERT_EQ(code->size(), 2u) << "the agent's, and the hooks'";
  for (const phos::AddressRange& range : *code) {
    ASSERT_EQ(target_.ask("dozing"), "ok");
    ASSERT_EQ(ptrace(PTRACE_SEIZE, tid, nullptr, nullptr), 0);
    ASSERT_EQ(ptrace(PTRACE_INTERRUPT, tid, nullptr, nullptr), 0);
    user_regs_struct registers = {};
    for (int step = 0; step < 1000000; step++) {
      int stopped = 0;
      ASSERT_EQ(waitpid(tid, &stopped, __WALL), tid);
      ASSERT_EQ(ptrace(PTRACE_GETREGS, tid, nullptr, &registers), 0);
      if (registers.rip >= range.begin && registers.rip < range.end) break;
      ASSERT_EQ(ptrace(PTRACE_SINGLESTEP, tid, nullptr, nullptr), 0);
    }
    ASSERT_TRUE(registers.rip >= range.begin && registers.rip < range.end);
    // Not as the signal to detach with: that is lost where it was stopped in here at once.
    ASSERT_EQ(syscall(SYS_tgkill, target_.pid(), tid, SIGUSR2), 0);
    ASSERT_EQ(ptrace(PTRACE_DETACH, tid, nullptr, nullptr), 0);
    ASSERT_NO_FATAL_FAILURE(close_gate());
    auto quiet = gate_->check_quiet(milliseconds(50));
    ASSERT_FALSE(quiet) << "it sleeps in a handler, and then goes on into libcuda";
    EXPECT_EQ(quiet.error().code(), EAGAIN) << quiet.error().message();
    ASSERT_EQ(target_.ask("awake"), "ok");
    ASSERT_TRUE(wait_parked(1));
    quiet = gate_->check_quiet(milliseconds(5000));
    EXPECT_TRUE(quiet) << quiet.error().message();
    ASSERT_NO_FATAL_FAILURE(open_gate());
  }
  expect_works();
}

}  // namespace
}  // namespace gate_test
