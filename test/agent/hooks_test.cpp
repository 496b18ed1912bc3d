// SPDX-License-Identifier: GPL-2.0-only
// Hooks at entry points on which something else sits: breakpoints of a debugger, and uprobes, with
// which the gate stops threads while memory is released and mapped back.
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/perf_event.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "gpu-tracker/base/proc.h"
#include "test/agent/fixture.h"
#include "test/agent/target_text.h"

namespace agent_test {
namespace {

constexpr const char* kHooked[] = {"cuMemFree_v2",          "cuMemGetAddressRange_v2",
                                   "cuPointerGetAttribute", "cuPointerGetAttributes",
                                   "cuCtxEnablePeerAccess", "cuMemFreeAsync",
                                   "cuMemFreeAsync_ptsz"};

class HooksTest : public AgentTest {
 protected:
  static std::vector<AgentAllocation> large(Agent& agent) {
    auto all = agent.enumerate();
    EXPECT_TRUE(all) << all.error().message();
    return of_kind(*all, AllocationKind::kDevice);
  }
  static void release_and_adopt(Agent& agent, const std::vector<AgentAllocation>& memory) {
    auto results = agent.release(memory);
    ASSERT_TRUE(results) << results.error().message();
    auto released = agent.map_back({0});
    ASSERT_TRUE(released) << released.error().message();
    EXPECT_EQ(agent.missing_hook(), 0);
    ASSERT_TRUE(agent.contents_loaded());
  }
};

TEST_F(HooksTest, ComeAndGoUnderBreakpoints) {
  const std::string address = value_of(target_.ask("alloc 6291456"));
  auto agent = attach();
  ASSERT_TRUE(agent);
  const auto memory = large(*agent);
  std::vector<std::pair<uint64_t, uint8_t>> entries;
  auto set_breakpoints = [&] {
    for (const char* name : kHooked) {
      const void* function = dlsym(RTLD_DEFAULT, name);
      if (!function) continue;
      const uint64_t at = in_target(target_.pid(), place_of(function));
      ASSERT_NE(at, 0u) << name;
      entries.push_back({at, poke(target_.pid(), at, 0xcc)});
    }
  };
  auto clear_breakpoints = [&] {
    for (auto [at, byte] : entries) EXPECT_EQ(poke(target_.pid(), at, byte), 0xcc);
    entries.clear();
  };
  ASSERT_NO_FATAL_FAILURE(set_breakpoints());
  ASSERT_GE(entries.size(), 5u);
  ASSERT_NO_FATAL_FAILURE(release_and_adopt(*agent, memory));
  clear_breakpoints();
  EXPECT_EQ(target_.ask("range " + address), "ok " + address + " 6291456 1");
  EXPECT_EQ(target_.ask("free " + address), "ok");
  ASSERT_NO_FATAL_FAILURE(set_breakpoints());
  ASSERT_TRUE(agent->contents_loaded());
  clear_breakpoints();
  EXPECT_EQ(target_.ask("free " + address), "error 1");
  EXPECT_TRUE(agent->unload());
  expect_works();
}

// A uprobe by perf_event_open(2).
class Uprobe {
 public:
  Uprobe(const Place& place, pid_t pid) {
    uint32_t type = 0;
    std::ifstream("/sys/bus/event_source/devices/uprobe/type") >> type;
    perf_event_attr attr = {};
    attr.type = type;
    attr.size = sizeof attr;
    attr.uprobe_path = reinterpret_cast<uint64_t>(place.file.c_str());
    attr.probe_offset = place.offset;
    if (!type) return;
    fd_ = phos::UniqueFd(
        static_cast<int>(syscall(SYS_perf_event_open, &attr, pid, -1, -1, PERF_FLAG_FD_CLOEXEC)));
  }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  uint64_t hits() const {
    uint64_t count = 0;
    EXPECT_EQ(read(fd_.get(), &count, sizeof count), static_cast<ssize_t>(sizeof count));
    return count;
  }

 private:
  phos::UniqueFd fd_;
};

TEST_F(HooksTest, ComeAndGoUnderUprobes) {
  const Place place = place_of(dlsym(RTLD_DEFAULT, "cuMemFree_v2"));
  const std::string first = value_of(target_.ask("alloc 6291456"));
  const std::string second = value_of(target_.ask("alloc 6291456"));
  auto agent = attach();
  ASSERT_TRUE(agent);
  const auto memory = large(*agent);
  {
    // There when the hooks come.
    Uprobe probe(place, target_.pid());
    if (!probe) GTEST_SKIP() << "no uprobes here: " << strerror(errno);
    ASSERT_NO_FATAL_FAILURE(release_and_adopt(*agent, memory));
    const uint64_t before = probe.hits();
    EXPECT_EQ(target_.ask("free " + first), "ok");
    EXPECT_EQ(probe.hits(), before + 1);
  }
  EXPECT_EQ(target_.ask("free " + first), "error 1");
  {
    // Comes after them, and there when they go.
    Uprobe probe(place, target_.pid());
    ASSERT_TRUE(probe);
    EXPECT_EQ(target_.ask("free " + second), "ok");
    EXPECT_EQ(probe.hits(), 1u);
    ASSERT_TRUE(agent->contents_loaded());
    EXPECT_EQ(target_.ask("free " + second), "error 1");
    EXPECT_EQ(probe.hits(), 2u);
  }
  EXPECT_EQ(target_.ask("free " + second), "error 1");
  EXPECT_TRUE(agent->unload());
  for (const std::string& m : footprint(target_.pid()).mappings) {
    EXPECT_EQ(m.find("[uprobes]"), std::string::npos);
  }
}

}  // namespace
}  // namespace agent_test
