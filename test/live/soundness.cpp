// SPDX-License-Identifier: GPL-2.0-only
#include "test/live/soundness.h"

#include <sys/stat.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>

#include "gpu-tracker/inject/agent.h"

namespace live_test {

namespace fs = std::filesystem;

namespace {

constexpr int kDeathMs = 200;

std::string death(std::optional<int> status) {
  if (!status) return "";
  if (WIFSIGNALED(*status)) {
    return "; the application was ended by signal " + std::to_string(WTERMSIG(*status));
  }
  return "; the application ended with " + std::to_string(WEXITSTATUS(*status));
}

}  // namespace

Soundness::~Soundness() {
  std::error_code ignored;
  if (!directory_.empty()) fs::remove_all(directory_, ignored);
}

std::string Soundness::start() {
  // Memory, not a disk: thousands of small files are made durable.
  char pattern[] = "/dev/shm/phos-live-XXXXXX";
  if (!mkdtemp(pattern)) return "cannot make a directory in /dev/shm";
  directory_ = pattern;
  return copier_.start();
}

std::string Soundness::run(uint32_t seed, unsigned count) {
  contract::Worker application(std::to_string(seed) + "," + std::to_string(1 + seed / 2 % 2));
  if (seed % 2) {
    // An agent that is there already is found and stays.
    auto tid = copier_.driver().restore_thread_id(application.pid());
    if (!tid) return tid.error().message();
    auto agent = phos::Agent::attach(application.pid(), *tid);
    if (!agent) return agent.error().message();
  }
  for (unsigned i = 0; i < count; i++) {
    const std::string images = directory_ + "/images";
    fs::create_directory(images);
    Interleaving one(copier_, application, images, seed * 7919 + i, watch_);
    const std::string problem = one.run();
    tally_ += one.tally();
    std::error_code error;
    if (problem.empty()) fs::remove_all(images, error);
    if (!problem.empty()) {
      const std::string end = death(application.wait_death(kDeathMs));
      return "interleaving " + std::to_string(i) + ": " + problem + end;
    }
  }
  return "";
}

int run_soundness(unsigned seconds, uint32_t seed, bool one_seed, unsigned watch) {
  using std::chrono::steady_clock;
  const auto end = steady_clock::now() + std::chrono::seconds(seconds);
  Soundness soundness(watch);
  std::string problem = soundness.start();
  for (unsigned i = 0; problem.empty() && steady_clock::now() < end; i++) {
    problem = soundness.run(seed, 40);
    if (problem.empty() && i % 10 == 0) std::cout << soundness.tally() << std::endl;
    if (problem.empty() && !one_seed) seed++;
  }
  std::cout << soundness.tally() << std::endl;
  if (problem.empty()) return 0;
  std::cout << "FAILED with seed " << seed << ": " << problem << std::endl;
  return 1;
}

}  // namespace live_test
