// SPDX-License-Identifier: GPL-2.0-only
// Pre-dumps of an application that allocates and frees all the time, on two threads: the driver
// would crash it if its memory were handed over at the wrong moment.
#include <fcntl.h>
#include <linux/capability.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "gpu-tracker/track/activity_program.h"
#include "test/contract/cuda_helpers.h"
#include "test/contract/fixture.h"
#include "test/live/interleaving.h"

namespace live_test {
namespace {

using contract::Worker;
using phos::LiveCopy;
using phos::Result;

std::string maps_of(int pid) {
  std::ifstream f("/proc/" + std::to_string(pid) + "/maps");
  std::stringstream text;
  text << f.rdbuf();
  return text.str();
}

std::string caught_signals(int pid) {
  std::ifstream f("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(f, line);) {
    if (line.rfind("SigCgt:", 0) == 0) return line;
  }
  return "";
}

uint64_t number(Worker& application, const char* command) {
  const std::string reply = application.ask(command);
  EXPECT_EQ(reply.substr(0, 3), "ok ") << command << ": " << reply;
  return reply.size() > 3 ? strtoull(reply.c_str() + 3, nullptr, 10) : 0;
}

// Without what BPF needs, on this thread.
class LesserThread {
 public:
  LesserThread() {
    syscall(SYS_capget, &header_, before_);
    __user_cap_data_struct less[2] = {before_[0], before_[1]};
    for (int cap : {CAP_SYS_ADMIN, CAP_BPF, CAP_PERFMON, CAP_CHECKPOINT_RESTORE}) {
      less[cap / 32].effective &= ~(1u << cap % 32);
    }
    syscall(SYS_capset, &header_, less);
  }
  ~LesserThread() { syscall(SYS_capset, &header_, before_); }

 private:
  __user_cap_header_struct header_ = {_LINUX_CAPABILITY_VERSION_3, 0};
  __user_cap_data_struct before_[2] = {};
};

class ChurnTest : public contract::WorkerTest {
 protected:
  void SetUp() override {
    contract::WorkerTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    ASSERT_EQ(copier_.start(), "");
    ASSERT_NE(mkdtemp(directory_), nullptr);
  }
  void TearDown() override {
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }

  Result<std::unique_ptr<LiveCopy>> start(int pid, int directory) {
    phos::DumpId id;
    id.fill(7);
    auto store = phos::PageStore::create(directory, id, {});
    if (!store) return store.error();
    phos::LiveCopyImages images;
    images.store = std::move(*store);
    for (const phos::GpuInfo& gpu : copier_.gpus()) images.gpus.push_back(gpu.uuid);
    auto tid = copier_.driver().restore_thread_id(pid);
    if (!tid) return tid.error();
    return LiveCopy::start({pid, pid, *tid}, std::move(images), copier_.engines());
  }

  // As Session does it.
  Result<bool> pre_dump(int pid) {
    const std::string path = std::string(directory_) + "/images";
    std::filesystem::remove_all(path);
    std::filesystem::create_directory(path);
    phos::UniqueFd directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    auto copy = start(pid, directory.get());
    if (!copy) return copy.error();
    bool postponed = false;
    for (int i = 0; i < 2; i++) {
      auto report = (*copy)->round(0);
      if (!report) return report.error();
      postponed |= report->postponed;
    }
    if (auto r = (*copy)->forget_freed(); !r) return r.error();
    if (auto r = (*copy)->stop_watching(); !r) return r.error();
    (*copy)->conclude();
    if (auto r = (*copy)->release(); !r) return r.error();
    phos::ProcessImage image;
    if (auto r = (*copy)->finish(&image); !r) return r.error();
    return postponed;
  }

  Copier copier_;
  char directory_[32] = "/dev/shm/phos-live-XXXXXX";
};

TEST_F(ChurnTest, LivesThroughManyPreDumps) {
  Worker application("churn,2");
  const std::string caught = caught_signals(application.pid());
  constexpr int times = 25;
  uint64_t slowest = 0, postponed = 0, calls = 0;
  for (int i = 0; i < times; i++) {
    const uint64_t before = number(application, "count");
    auto done = pre_dump(application.pid());
    ASSERT_TRUE(done) << "pre-dump " << i + 1 << ": " << done.error().message();
    postponed += *done;
    slowest = std::max(slowest, number(application, "slowest"));
    calls = number(application, "count");
    EXPECT_GT(calls, before) << "it goes on meanwhile";
  }
  std::cout << times << " pre-dumps, some memory postponed in " << postponed << "; " << calls
            << " calls, the slowest that frees took " << slowest / 1000.0 << " ms" << std::endl;
  const std::string maps = maps_of(application.pid());
  EXPECT_EQ(maps.find("[uprobes"), std::string::npos);
  EXPECT_EQ(maps.find(PHOS_MAILBOX_NAME), std::string::npos);
  EXPECT_EQ(caught_signals(application.pid()), caught);
}

TEST_F(ChurnTest, NothingIsHandedOverWhereThreadsCannotBeParked) {
  if (auto able = phos::check_uprobe_multi(); !able) GTEST_SKIP() << able.error().message();
  Worker application("churn,2");
  const std::string caught = caught_signals(application.pid());
  phos::UniqueFd directory(open(directory_, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  auto copy = start(application.pid(), directory.get());
  ASSERT_TRUE(copy) << copy.error().message();
  {
    const LesserThread lesser;
    auto report = (*copy)->round(0);
    ASSERT_FALSE(report);
    EXPECT_EQ(report.error().code(), EPERM) << report.error().message();
    EXPECT_NE(report.error().message().find("cannot be handed over while it runs"),
              std::string::npos);
    EXPECT_NE(report.error().message().find("root"), std::string::npos) << report.error().message();
  }
  EXPECT_EQ((*copy)->total_bytes(), 0u);
  EXPECT_TRUE((*copy)->stop_watching());
  EXPECT_EQ(caught_signals(application.pid()), caught);
  auto report = (*copy)->round(0);
  ASSERT_TRUE(report) << report.error().message();
  copy->reset();
  const uint64_t before = number(application, "count");
  while (!HasFailure() && number(application, "count") == before) usleep(1000);
}

}  // namespace
}  // namespace live_test
