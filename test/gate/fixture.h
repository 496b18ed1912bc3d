// SPDX-License-Identifier: GPL-2.0-only
// A process with a gate, and what can be seen of it from outside.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gpu-tracker/gate/gate.h"
#include "test/contract/worker.h"

namespace gate_test {

using phos::Agent;
using phos::Gate;
using phos::GateOptions;
using phos::GateStatus;
using State = phos::GateStatus::State;
using std::chrono::milliseconds;

double milliseconds_since(std::chrono::steady_clock::time_point start);
std::string maps_of(int pid);
// The executable mappings of libcuda, as they are in memory now.
std::vector<std::string> library_text(int pid);
// A field of /proc/PID/status.
std::string status_field(int pid, const std::string& field);
// Polls until it holds; false after half a minute.
bool eventually(const std::function<bool()>& condition);

class GateTest : public testing::Test {
 protected:
  void SetUp() override;

  // Gate::close() that must work; into gate_.
  void close_gate(const GateOptions& options = {});
  GateStatus status();
  bool wait_parked(size_t count);
  // Until the threads that the target has started are in the driver, and not on their way there.
  bool wait_inside();
  // Calls return.
  bool gets_on();
  // "ok N" -> N
  uint64_t number(const std::string& command);
  // Calls that returned within this time.
  uint64_t calls_in(milliseconds time);
  void expect_works();

  contract::Worker target_;
  std::optional<Agent> agent_;
  std::unique_ptr<Gate> gate_;
};

}  // namespace gate_test
