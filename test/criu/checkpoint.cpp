// SPDX-License-Identifier: GPL-2.0-only
// checkpoint PID ACTION...: the driver's checkpoint calls by hand, as a user's own tool makes them.
// Actions: lock, checkpoint, restore, unlock; `state` prints the state; `rotate` restores every
// GPU's state onto the next GPU.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "gpu-tracker/driver/cuda_driver.h"

namespace {

phos::Result<void> rotate(phos::GpuDriver& driver, int pid) {
  auto gpus = driver.gpus();
  if (!gpus) return gpus.error();
  std::vector<phos::GpuPair> pairs;
  for (size_t i = 0; i < gpus->size(); i++) {
    pairs.push_back({(*gpus)[i].uuid, (*gpus)[(i + 1) % gpus->size()].uuid});
  }
  return driver.restore(pid, pairs);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: checkpoint PID lock|checkpoint|restore|rotate|unlock|state...\n");
    return 2;
  }
  auto driver = phos::open_cuda_driver();
  if (!driver) {
    fprintf(stderr, "%s\n", driver.error().message().c_str());
    return 1;
  }
  const int pid = atoi(argv[1]);
  for (int i = 2; i < argc; i++) {
    phos::Result<void> r;
    if (!strcmp(argv[i], "lock")) {
      r = (*driver)->lock(pid, 10000);
    } else if (!strcmp(argv[i], "checkpoint")) {
      r = (*driver)->checkpoint(pid);
    } else if (!strcmp(argv[i], "restore")) {
      r = (*driver)->restore(pid, {});
    } else if (!strcmp(argv[i], "rotate")) {
      r = rotate(**driver, pid);
    } else if (!strcmp(argv[i], "unlock")) {
      r = (*driver)->unlock(pid);
    } else if (!strcmp(argv[i], "state")) {
      auto state = (*driver)->state(pid);
      if (!state) {
        r = state.error();
      } else {
        puts(phos::to_string(*state));
      }
    } else {
      fprintf(stderr, "checkpoint: unknown action %s\n", argv[i]);
      return 2;
    }
    if (!r) {
      fprintf(stderr, "%s\n", r.error().message().c_str());
      return 1;
    }
  }
  return 0;
}
