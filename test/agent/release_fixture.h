// SPDX-License-Identifier: GPL-2.0-only
// Memory that the agent releases and brings back. Its contents are loaded by another process, as
// phosd does.
#pragma once

#include <unistd.h>

#include <string>
#include <vector>

#include "test/agent/fixture.h"

namespace agent_test {

using phos::AgentRelease;
using phos::MapBackOptions;
using phos::ReleasedMemory;
using phos::ReleasedState;
using phos::ReleaseStatus;

inline constexpr MapBackOptions kAdoptAll{0};

struct Block {
  std::string address;
  uint64_t size;
};

inline std::string text(uint64_t n) {
  char out[32];
  snprintf(out, sizeof out, "%llx", static_cast<unsigned long long>(n));
  return out;
}

// What `block` holds when it was filled, or loaded, with `seed`.
inline std::string fill_command(const std::string& address, uint64_t size, int seed) {
  return "fill " + address + " " + std::to_string(size / 4) + " " + std::to_string(seed);
}
inline std::string check_command(const Block& b, int seed) {
  return "check " + b.address + " " + std::to_string(b.size / 4) + " " + std::to_string(seed) +
         " 0";
}

inline std::vector<ReleasedMemory> in_state(const std::vector<ReleasedMemory>& all,
                                            ReleasedState state) {
  std::vector<ReleasedMemory> found;
  for (const ReleasedMemory& m : all) {
    if (m.state == state) found.push_back(m);
  }
  return found;
}

class ReleaseTest : public AgentTest {
 protected:
  Block allocate(Worker& worker, uint64_t size) {
    return {value_of(worker.ask("alloc " + std::to_string(size))), size};
  }
  Block allocate(uint64_t size) { return allocate(target_, size); }

  static std::vector<AgentAllocation> large(Agent& agent) {
    auto all = agent.enumerate();
    EXPECT_TRUE(all) << all.error().message();
    return of_kind(*all, AllocationKind::kDevice);
  }

  // Releases all; each must work.
  static void release_all(Agent& agent) {
    const auto memory = large(agent);
    auto results = agent.release(memory);
    ASSERT_TRUE(results) << results.error().message();
    for (const AgentRelease& r : *results) {
      EXPECT_EQ(r.status, ReleaseStatus::kReleased) << r.driver_result;
    }
  }

  static void driver_checkpoint(pid_t pid) {
    ASSERT_EQ(contract::lock(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::checkpoint(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::restore(pid), CUDA_SUCCESS);
    ASSERT_EQ(contract::unlock(pid), CUDA_SUCCESS);
  }

  // Fills what is mapped back through an import of it. Adopted memory can be imported by
  // descriptor, the driver's own by a legacy handle.
  void load(Agent& agent, const std::vector<ReleasedMemory>& released, int seed) {
    std::vector<AgentAllocation> memory;
    for (const ReleasedMemory& m : released) memory.push_back(m.memory);
    auto exports = agent.export_memory(memory, phos::AgentGuard::kCaller);
    ASSERT_TRUE(exports) << exports.error().message();
    for (size_t i = 0; i < exports->size(); i++) {
      const auto& e = (*exports)[i];
      ASSERT_EQ(e.status, ExportStatus::kExported) << e.driver_result;
      const std::string there = value_of(
          e.type == ExportType::kFd ? loader_.ask("vmm-import " + std::to_string(getpid()) + " " +
                                                  std::to_string(e.fd.get()) + " " +
                                                  std::to_string(memory[i].mapping_size))
                                    : loader_.ask("ipc-import " + hex(e.ipc_handle)));
      ASSERT_EQ(loader_.ask(fill_command(there, memory[i].size, seed)), "ok");
      if (e.type == ExportType::kIpc) {
        ASSERT_EQ(loader_.ask("ipc-close " + there), "ok");
      }
    }
  }

  // The application finds its memory as cuMemAlloc made it, with these contents, and frees it.
  void expect_ordinary(Worker& worker, const Block& b, int seed) {
    EXPECT_EQ(worker.ask(check_command(b, seed)), "ok 0") << b.address;
    const uint64_t inside = address_of(b.address) + b.size - 1;
    const std::string range = "ok " + b.address + " " + std::to_string(b.size) + " 1";
    EXPECT_EQ(worker.ask("range " + b.address), range);
    EXPECT_EQ(worker.ask("range " + text(inside)), range);
    EXPECT_EQ(worker.ask("free " + text(address_of(b.address) + 512)), "error 1");
    EXPECT_EQ(worker.ask("free " + b.address), "ok");
    EXPECT_EQ(worker.ask("free " + b.address), "error 1");
  }

  Worker loader_;
};

}  // namespace agent_test
