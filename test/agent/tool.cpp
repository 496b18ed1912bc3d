// SPDX-License-Identifier: GPL-2.0-only
// agent_tool PID[:TID] ACTION...: the agent by hand. Actions: attach, enumerate, unload.
// `enumerate` prints a line an allocation: kind, address, size, exportable how. Without TID the
// driver is asked for the restore thread.
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: agent_tool PID[:TID] attach|enumerate|unload...\n");
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
    phos::Result<void> r;
    if (!strcmp(argv[i], "enumerate")) {
      r = enumerate(*agent);
    } else if (!strcmp(argv[i], "unload")) {
      r = agent->unload();
    } else if (strcmp(argv[i], "attach") != 0) {
      fprintf(stderr, "agent_tool: unknown action %s\n", argv[i]);
      return 2;
    }
    if (!r) return fail(r.error());
  }
  return 0;
}
