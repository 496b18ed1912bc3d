// SPDX-License-Identifier: GPL-2.0-only
// Memory that a thread is just freeing. Driver 580 does not protect cuIpcGetMemHandle,
// cuMemRetainAllocationHandle and what follows against that, nor cuPointerGetAttributes: another
// thread that calls them for this memory crashes on objects that are gone.
#include <unistd.h>

#include <random>

#include "test/sim/memory.h"

namespace phos_sim {
namespace {

constexpr unsigned kMomentUs = 200;
constexpr unsigned kLongUs = 2000;
constexpr unsigned kLongOneIn = 50;

}  // namespace

void linger(std::unique_lock<std::mutex>* hold) {
  thread_local std::minstd_rand random(static_cast<unsigned>(gettid()));
  hold->unlock();
  usleep(random() % kLongOneIn ? random() % kMomentUs : kLongUs);
  hold->lock();
}

// No raise(): a thread that has SIGSEGV blocked, as the agent's, survives that.
void crash() {
  for (;;) *static_cast<volatile int*>(nullptr) = 0;
}

}  // namespace phos_sim
