// SPDX-License-Identifier: GPL-2.0-only
// A CUDA process to attach to, and what can be seen of it from outside.
#pragma once

#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "gpu-tracker/inject/agent.h"
#include "test/contract/cuda_helpers.h"
#include "test/contract/fixture.h"
#include "test/contract/worker.h"

namespace agent_test {

using contract::kMiB;
using contract::value_of;
using contract::Worker;
using phos::Agent;
using phos::AgentAllocation;
using phos::AllocationKind;
using phos::ExportStatus;
using phos::ExportType;

// What phos must not change in a process: names of its threads, descriptors, named mappings.
struct Footprint {
  std::multiset<std::string> threads, files, mappings;
  bool operator==(const Footprint&) const = default;
};
Footprint footprint(pid_t pid);
std::ostream& operator<<(std::ostream& out, const Footprint& f);

std::vector<pid_t> threads_of(pid_t pid);
// A thread with that name; 0: none.
pid_t find_thread(pid_t pid, const std::string& name);
std::string status_field(pid_t tid, const std::string& field);

int restore_tid(pid_t pid);

// The one allocation of that kind at that address.
const AgentAllocation* at(const std::vector<AgentAllocation>& all, uint64_t address);
std::vector<AgentAllocation> of_kind(const std::vector<AgentAllocation>& all, AllocationKind kind);

uint64_t address_of(const std::string& hex);
std::string hex(const std::array<uint8_t, 64>& bytes);

class AgentTest : public contract::WorkerTest {
 protected:
  phos::Result<Agent> attach(const phos::AgentOptions& options = {}) {
    return Agent::attach(target_.pid(), restore_tid(target_.pid()), options);
  }
  // attach() and enumerate() that must work.
  std::vector<AgentAllocation> enumerate();
  void expect_works() { EXPECT_EQ(target_.ask("ping"), "ok"); }

  Worker target_;
};

}  // namespace agent_test
