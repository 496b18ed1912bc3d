// SPDX-License-Identifier: GPL-2.0-only
// agent_tool PID[:TID] ACTION...: the agent by hand. Actions: attach, enumerate, unload; for a
// process that makes no CUDA call meanwhile: release (everything that can be), released, map-back,
// adopt (map-back without native reallocation), loaded.
// `enumerate` prints a line an allocation: kind, address, size, exportable how. Release and map
// back print a line each: address, size, state. Contents are not saved. Without TID the driver is
// asked for the restore thread.
#include <cerrno>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/inject/agent.h"

namespace {

int fail(const phos::Error& error) {
  fprintf(stderr, "%s\n", error.message().c_str());
  return 1;
}

phos::Result<int> restore_thread(const char* argument, int pid) {
  if (const char* colon = strchr(argument, ':')) return atoi(colon + 1);
  auto driver = phos::open_cuda_driver();
  if (!driver) return driver.error();
  return (*driver)->restore_thread_id(pid);
}

phos::Result<void> enumerate(phos::Agent& agent) {
  auto all = agent.enumerate();
  if (!all) return all.error();
  for (const phos::AgentAllocation& a : *all) {
    const char* const kExports[] = {"none", "ipc", "fd"};
    printf("%s 0x%" PRIx64 " %" PRIu64 " %s\n", to_string(a.kind), a.address, a.size,
           kExports[static_cast<int>(a.export_type)]);
  }
  const phos::ScanCost& cost = agent.last_scan();
  fprintf(stderr, "%" PRIu64 " driver calls over %" PRIu64 " MiB of addresses in %.3f ms\n",
          cost.driver_calls, cost.probed_bytes >> 20, static_cast<double>(cost.time.count()) / 1e6);
  return {};
}

phos::Result<void> print(phos::Result<std::vector<phos::ReleasedMemory>> released) {
  if (!released) return released.error();
  const char* const kStates[] = {"", "reserved", "lost", "native", "adopted", "in-use"};
  for (const phos::ReleasedMemory& m : *released) {
    printf("0x%" PRIx64 " %" PRIu64 " %s %d\n", m.memory.address, m.memory.size,
           kStates[static_cast<int>(m.state)], m.driver_result);
  }
  return {};
}

phos::Result<void> release(phos::Agent& agent) {
  auto all = agent.enumerate();
  if (!all) return all.error();
  auto results = agent.release(*all);
  if (!results) return results.error();
  return print(agent.released());
}

phos::Result<void> act(phos::Agent& agent, const std::string& action) {
  if (action == "attach") return {};
  if (action == "enumerate") return enumerate(agent);
  if (action == "unload") return agent.unload();
  if (action == "release") return release(agent);
  if (action == "released") return print(agent.released());
  if (action == "map-back") return print(agent.map_back());
  if (action == "adopt") return print(agent.map_back({.native_misses = 0}));
  if (action == "loaded") return print(agent.contents_loaded());
  return phos::Error(phos::Domain::kErrno, EINVAL, "agent_tool: unknown action " + action);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: agent_tool PID[:TID] ACTION...\n");
    return 2;
  }
  const int pid = atoi(argv[1]);
  auto tid = restore_thread(argv[1], pid);
  if (!tid) return fail(tid.error());
  const auto start = std::chrono::steady_clock::now();
  auto agent = phos::Agent::attach(pid, *tid);
  if (!agent) return fail(agent.error());
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  fprintf(stderr, "attached in %.3f ms\n", took.count());
  for (int i = 2; i < argc; i++) {
    auto r = act(*agent, argv[i]);
    if (!r) return fail(r.error());
  }
  return 0;
}
