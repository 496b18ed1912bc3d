// SPDX-License-Identifier: GPL-2.0-only
// A whole dump that releases memory, without CRIU, and every call of phosd's into the driver made
// to fail in turn: the process goes on with its memory, whatever became of the dump.
#include "gpu-tracker/daemon/session.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/wait.h>

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <string>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/driver/fault_driver.h"
#include "gpu-tracker/track/activity_program.h"
#include "test/contract/cuda_helpers.h"
#include "test/contract/worker.h"

namespace live_test {
namespace {

using phos::CudaState;
using phos::FaultDriver;
using phos::Session;

// Bytes of the target's allocations, above and below what is released.
constexpr uint64_t kSizes[] = {8 << 20, 5000000, 1 << 20};

class ReleasingSession : public testing::Test {
 protected:
  void SetUp() override {
    if (auto able = phos::check_uprobe_multi(); !able) GTEST_SKIP() << able.error().message();
    auto driver = phos::open_cuda_driver();
    if (!driver || target_.ask("ping") != "ok") GTEST_SKIP() << "no CUDA device here";
    driver_ = std::move(*driver);
    char path[] = "/tmp/phos-releasing-XXXXXX";
    dir_ = mkdtemp(path);
    std::filesystem::create_directory(dir_ + "/images");
    std::filesystem::create_directory(dir_ + "/lock");
    phos::set_log_sink([this](phos::LogLevel, const std::string& line) { log_ += line + "\n"; });
    for (uint64_t size : kSizes) {
      const std::string reply = target_.ask("alloc " + std::to_string(size));
      ASSERT_EQ(reply.substr(0, 3), "ok ");
      addresses_.push_back(reply.substr(3));
    }
  }
  void TearDown() override {
    phos::set_log_sink([](phos::LogLevel, const std::string&) {});
    if (dir_.empty()) return;
    umount((dir_ + "/bpf").c_str());  // phosd's own, where the machine has none
    std::filesystem::remove_all(dir_);
  }

  void tell_memory(const char* what, unsigned seed, const std::string& more,
                   const std::string& expected) {
    for (size_t i = 0; i < addresses_.size(); i++) {
      EXPECT_EQ(target_.ask(std::string(what) + " " + addresses_[i] + " " +
                            std::to_string(kSizes[i] / 4) + " " + std::to_string(seed) + more),
                expected)
          << kSizes[i];
    }
  }

  // What a dump does with --leave-running, up to the first failure.
  bool dump(Session& session) {
    phos::UniqueFd images(open((dir_ + "/images").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!session.begin_dump(std::move(images))) return false;
    auto found = session.inspect(target_.pid());
    if (!found || found->size() != 1) return false;
    phos::CopyLimits limits;
    limits.max_rounds = 1;
    auto copied =
        session.copy(limits, [](int, unsigned, const phos::RoundReport&) { return true; });
    return copied && session.lock(5000) && session.complete_copies() &&
           session.checkpoint(target_.pid());
  }

  // Why the memory went through the driver.
  std::string first_warning() const {
    for (const char* sign : {"through the driver: ", "not copied ahead: ", "cannot be copied"}) {
      const size_t at = log_.find(sign);
      if (at != std::string::npos) return log_.substr(at, log_.find('\n', at) - at);
    }
    return log_;
  }

  // All of it. True if the dump succeeded.
  bool run(phos::GpuDriver& driver) {
    log_.clear();
    phos::PinnedPoolOptions pool;
    pool.max_bytes = pool.step_bytes = 64 << 20;  // more only takes time, at each dump
    phos::GpuEngines engines(driver, pool);
    Session session(driver, dir_ + "/lock", &engines);
    const bool ok = dump(session);
    (void)session.undo(target_.pid(), CudaState::kRunning).ok();
    (void)session.finish(ok).ok();
    session.recover();
    return ok;
  }

  std::vector<uint64_t> released() const {
    std::vector<uint64_t> sizes;
    phos::UniqueFd images(open((dir_ + "/images").c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    auto image = phos::read_process_image(images.get(), target_.pid());
    if (!image) return sizes;
    for (const phos::AllocationInfo& a : image->allocations) {
      if (a.path == phos::MemoryPath::kReleased) sizes.push_back(a.size);
    }
    std::sort(sizes.begin(), sizes.end());
    return sizes;
  }
  size_t image_count() const {
    size_t n = 0;
    for (const auto& entry : std::filesystem::directory_iterator(dir_ + "/images")) {
      n += entry.path().filename().string().rfind("phos-", 0) == 0;
    }
    return n;
  }

  contract::Worker target_;
  std::unique_ptr<phos::GpuDriver> driver_;
  std::string dir_, log_;
  std::vector<std::string> addresses_;
};

TEST_F(ReleasingSession, ProcessGoesOnWithItsMemory) {
  for (unsigned seed = 1; seed <= 3; seed++) {
    tell_memory("fill", seed, "", "ok");
    ASSERT_TRUE(run(*driver_)) << log_;
    EXPECT_EQ(released(), (std::vector<uint64_t>{5000000, 8 << 20})) << log_;
    tell_memory("check", seed, " 0", "ok 0");
  }
}

// Is it inside of a row of calls of one function (an engine's events), and not near its ends? One
// failure in such a row is like the other.
bool is_amid_its_like(const std::vector<std::string>& calls, size_t at) {
  if (at < 2 || at + 2 >= calls.size()) return false;
  return std::all_of(&calls[at - 2], &calls[at + 2] + 1,
                     [&](const std::string& name) { return name == calls[at]; });
}

TEST_F(ReleasingSession, EveryCallMayFail) {
  FaultDriver counted(*driver_);
  ASSERT_TRUE(run(counted)) << log_;
  const int calls = static_cast<int>(counted.calls().size());
  ASSERT_GT(calls, 50);
  std::vector<int> tried;
  for (int nth = 1; nth <= calls; nth++) {
    if (!is_amid_its_like(counted.calls(), static_cast<size_t>(nth - 1))) tried.push_back(nth);
  }
  unsigned seed = 1, succeeded = 0, released_in = 0;
  std::map<std::string, int> not_released;  // why, and how often
  for (auto when : {FaultDriver::When::kBefore, FaultDriver::When::kAfter}) {
    // A reply that got lost is the rarer case; and a real GPU takes a second for each.
    const bool all = getenv("PHOS_SIMULATED_GPU") && getenv("PHOS_TEST_LONG");
    const size_t step = all ? (when == FaultDriver::When::kAfter ? 3 : 1) : 7;
    for (size_t i = 0; i < tried.size(); i += step, seed++) {
      const int nth = tried[i];
      tell_memory("fill", seed, "", "ok");
      FaultDriver faulty(*driver_);
      faulty.fail(nth, when, phos::Error(phos::Domain::kCuda, 999, "injected fault"));
      const bool ok = run(faulty);
      tell_memory("check", seed, " 0", "ok 0");
      succeeded += ok;
      released_in += ok && !released().empty();
      if (ok && released().empty()) not_released[first_warning()]++;
      const auto failed = static_cast<size_t>(nth) <= faulty.calls().size()
                              ? faulty.calls()[static_cast<size_t>(nth - 1)]
                              : "none";
      EXPECT_EQ(image_count() == 0, !ok) << failed << "\n" << log_;
      EXPECT_TRUE(std::filesystem::is_empty(dir_ + "/lock")) << failed;
      ASSERT_FALSE(HasFailure()) << "call " << nth << " of " << calls << " (" << failed << "), "
                                 << (when == FaultDriver::When::kBefore ? "before" : "after")
                                 << ", dump " << (ok ? "succeeded" : "failed") << "\n"
                                 << log_;
    }
  }
  std::cout << seed - 1 << " dumps, " << succeeded << " succeeded, " << released_in
            << " of them with released memory; the others:" << std::endl;
  for (const auto& [why, count] : not_released) std::cout << count << "x " << why << std::endl;
}

}  // namespace
}  // namespace live_test
