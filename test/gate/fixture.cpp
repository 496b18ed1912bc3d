// SPDX-License-Identifier: GPL-2.0-only
#include "test/gate/fixture.h"

#include <cuda.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/gate/threads.h"
#include "test/contract/cuda_helpers.h"

namespace gate_test {

double milliseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

std::string maps_of(int pid) {
  std::ifstream f("/proc/" + std::to_string(pid) + "/maps");
  std::stringstream text;
  text << f.rdbuf();
  return text.str();
}

std::vector<std::string> library_text(int pid) {
  std::vector<std::string> texts;
  auto maps = phos::read_proc_maps(pid);
  phos::UniqueFd memory(
      open(("/proc/" + std::to_string(pid) + "/mem").c_str(), O_RDONLY | O_CLOEXEC));
  if (!maps || !memory) return texts;
  for (const phos::ProcMapping& m : *maps) {
    if (m.perms[2] != 'x' || m.path.find("/libcuda.so") == std::string::npos) continue;
    std::string text(m.end - m.start, '\0');
    const ssize_t n = pread(memory.get(), text.data(), text.size(), static_cast<off_t>(m.start));
    text.resize(n > 0 ? static_cast<size_t>(n) : 0);
    texts.push_back(std::move(text));
  }
  return texts;
}

std::string status_field(int pid, const std::string& field) {
  std::ifstream in("/proc/" + std::to_string(pid) + "/status");
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(field + ":", 0) == 0) {
      return line.substr(line.find_first_not_of(" \t", field.size() + 1));
    }
  }
  return "";
}

bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return true;
}

void GateTest::SetUp() {
  if (target_.ask("count") != "ok 0") {
    if (getenv("REQUIRE_GPU")) FAIL() << "the target cannot start CUDA";
    GTEST_SKIP() << "no CUDA device here";
  }
  int tid = 0;
  ASSERT_EQ(cuCheckpointProcessGetRestoreThreadId(target_.pid(), &tid), CUDA_SUCCESS);
  auto agent = Agent::attach(target_.pid(), tid);
  if (!agent && agent.error().code() == EPERM) GTEST_SKIP() << agent.error().message();
  ASSERT_TRUE(agent) << agent.error().message();
  agent_.emplace(std::move(*agent));
  auto gate = Gate::close(target_.pid(), *agent_);
  if (!gate) {
    const int code = gate.error().code();
    if (code == EPERM || code == ENOTSUP) GTEST_SKIP() << gate.error().message();
    FAIL() << gate.error().message();
  }
  auto opened = (*gate)->open();
  ASSERT_TRUE(opened) << opened.error().message();
}

void GateTest::close_gate(const GateOptions& options) {
  auto gate = Gate::close(target_.pid(), *agent_, options);
  ASSERT_TRUE(gate) << gate.error().message();
  gate_ = std::move(*gate);
}

GateStatus GateTest::status() {
  auto s = gate_->status();
  EXPECT_TRUE(s) << s.error().message();
  return s ? *s : GateStatus{};
}

bool GateTest::wait_parked(size_t count) {
  return eventually([&] { return status().parked == count; });
}

// The simulated driver waits asleep, a real one may spin. Nothing sleeps on its way there.
bool GateTest::wait_inside() {
  if (!contract::on_simulation()) return usleep(50000) == 0;
  return eventually([&] {
    auto threads = phos::list_threads(target_.pid());
    if (!threads) return false;
    size_t own = 0, asleep = 0;
    for (const phos::ThreadInfo& t : *threads) {
      if (t.tid == target_.pid() || t.comm == PHOS_AGENT_THREAD_NAME) continue;
      if (phos::is_driver_thread(t)) continue;
      own++;
      auto sleep = phos::find_asleep(target_.pid(), t.tid);
      asleep += sleep && sleep->number == SYS_futex;
    }
    return own > 0 && asleep == own;
  });
}

bool GateTest::gets_on() {
  const uint64_t before = number("count");
  return eventually([&] { return number("count") > before; });
}

uint64_t GateTest::number(const std::string& command) {
  const std::string reply = target_.ask(command);
  EXPECT_EQ(reply.substr(0, 3), "ok ") << command << ": " << reply;
  return reply.size() > 3 ? strtoull(reply.c_str() + 3, nullptr, 10) : 0;
}

uint64_t GateTest::calls_in(milliseconds time) {
  const uint64_t before = number("count");
  std::this_thread::sleep_for(time);
  return number("count") - before;
}

void GateTest::expect_works() {
  const uint64_t before = number("count");
  EXPECT_TRUE(eventually([&] { return number("count") > before + 10; })) << "threads must go on";
  EXPECT_EQ(number("stop"), 0u) << "calls failed";
}

}  // namespace gate_test
