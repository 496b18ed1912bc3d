// SPDX-License-Identifier: GPL-2.0-only
// gate_tool PID[:TID] ACTION...: the gate by hand. Prints "ok ACTION" after each. Actions:
//   lease=MS         of the next close (default 10000)
//   frees            the next close gates only functions that free memory
//   pin=FILE         in a BPF file system: where the next close pins its probes when it is held, or
//                    where adopt finds them
//   close, adopt, renew, hold, disarm, release, open
//   parked=N         waits until N threads are parked
//   status           prints "STATE PARKED"
//   sleep            forever: to be killed
// Without TID the driver is asked for the restore thread.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>

#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/gate/gate.h"

namespace {

using phos::Agent;
using phos::Gate;
using phos::Result;

constexpr int kParkSeconds = 10;

Result<int> restore_thread(const char* argument, int pid) {
  if (const char* colon = strchr(argument, ':')) return atoi(colon + 1);
  auto driver = phos::open_cuda_driver();
  if (!driver) return driver.error();
  return (*driver)->restore_thread_id(pid);
}

Result<void> wait_parked(Gate& gate, size_t wanted) {
  for (int i = 0; i < kParkSeconds * 1000; i++) {
    auto s = gate.status();
    if (!s) return s.error();
    if (s->parked == wanted) return {};
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return phos::Error(phos::Domain::kErrno, ETIMEDOUT, "not as many threads have parked");
}

Result<void> print_status(Gate& gate) {
  const char* const kStates[] = {"open", "closed", "held", "expired"};
  auto s = gate.status();
  if (!s) return s.error();
  printf("%s %zu\n", kStates[static_cast<int>(s->state)], s->parked);
  return {};
}

struct Tool {
  int pid;
  Agent agent;
  phos::GateOptions options;
  std::unique_ptr<Gate> gate;

  Result<void> take(Result<std::unique_ptr<Gate>> made) {
    if (!made) return made.error();
    gate = std::move(*made);
    return {};
  }

  Result<void> act(const std::string& action) {
    const std::string name = action.substr(0, action.find('='));
    const long value = name.size() < action.size() ? atol(action.c_str() + name.size() + 1) : 0;
    if (name == "lease") {
      options.lease = std::chrono::milliseconds(value);
      return {};
    }
    if (name == "frees") {
      options.functions = phos::GatedFunctions::kMemory;
      return {};
    }
    if (name == "pin") {
      options.pin = action.substr(strlen("pin="));
      return {};
    }
    if (name == "close") return take(Gate::close(pid, agent, options));
    if (name == "adopt") return take(Gate::adopt(pid, agent, options.pin));
    if (!gate) return phos::Error(phos::Domain::kUsage, EINVAL, "no gate yet");
    const std::map<std::string, std::function<Result<void>()>> kActions = {
        {"renew", [&] { return gate->renew(); }},
        {"hold", [&] { return gate->hold(); }},
        {"disarm", [&] { return gate->disarm(); }},
        {"release", [&] { return gate->release(); }},
        {"open", [&] { return gate->open(); }},
        {"parked", [&] { return wait_parked(*gate, static_cast<size_t>(value)); }},
        {"status", [&] { return print_status(*gate); }},
        {"sleep",
         []() -> Result<void> {
           for (;;) pause();
         }},
    };
    auto found = kActions.find(name);
    if (found == kActions.end()) {
      return phos::Error(phos::Domain::kUsage, EINVAL, "unknown action " + action);
    }
    return found->second();
  }
};

int fail(const phos::Error& error) {
  fprintf(stderr, "%s\n", error.message().c_str());
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: gate_tool PID[:TID] ACTION...\n");
    return 2;
  }
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const int pid = atoi(argv[1]);
  auto tid = restore_thread(argv[1], pid);
  if (!tid) return fail(tid.error());
  auto agent = Agent::attach(pid, *tid);
  if (!agent) return fail(agent.error());
  Tool tool{pid, std::move(*agent), {}, nullptr};
  for (int i = 2; i < argc; i++) {
    if (auto r = tool.act(argv[i]); !r) return fail(r.error());
    printf("ok %s\n", argv[i]);
  }
  return 0;
}
