// SPDX-License-Identifier: GPL-2.0-only
// phos status: the CUDA processes of this machine, the state the driver holds them in, and phosd.

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <future>
#include <memory>
#include <thread>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "tools/phos/command.h"
#include "tools/phos/daemon_client.h"
#include "tools/phos/processes.h"
#include "tools/phos/table.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "status";

// A restore thread answers within a millisecond; one that does not is in some state that /proc
// does not show, and must not hang this command.
constexpr auto kAnswerTime = std::chrono::seconds(2);

struct Row {
  int pid = 0;
  int restore_tid = 0;  // 0: not a CUDA process
  int tracer = 0;
  std::string command;
  std::string state;
};

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "[PID...] [--json]";
  s.about =
      "Lists the CUDA processes of this machine, or the processes given: the state the\n"
      "NVIDIA driver holds each in (running, locked, checkpointed, failed), its restore\n"
      "thread, and who traces it. `stopped` and `frozen` processes cannot answer. Then the\n"
      "phosd that runs, if one does.\n";
  s.positional = "pid";
  s.options.add_options()("json", "print JSON");
  return s;
}

// Asks from a thread of its own, which is left behind if no answer comes.
std::string ask_state(const std::shared_ptr<GpuDriver>& driver, int pid) {
  auto answer = std::make_shared<std::promise<std::string>>();
  auto future = answer->get_future();
  std::thread([driver, pid, answer] {
    auto state = driver->state(pid);
    if (state) {
      answer->set_value(to_string(*state));
    } else if (state.error().code() == kCudaErrorNotInitialized) {
      answer->set_value("no CUDA");
    } else {
      answer->set_value("unknown");  // gone meanwhile, or not ours to ask about
    }
  }).detach();
  if (future.wait_for(kAnswerTime) != std::future_status::ready) return "no answer";
  return future.get();
}

Result<Row> look_at(int pid, const std::shared_ptr<GpuDriver>& driver) {
  auto status = read_proc_status(pid);
  if (!status || status->tgid != pid) {
    return Error(Domain::kUsage, ESRCH, "no process with pid " + std::to_string(pid));
  }
  Row row;
  row.pid = pid;
  row.tracer = status->tracer_pid;
  row.command = command_of(pid, *status);
  row.restore_tid = find_restore_thread(pid).value_or(0);
  if (row.restore_tid == 0) {
    row.state = "no CUDA";
  } else if (status->state == 'T' || status->state == 't') {
    row.state = "stopped";  // the driver's question would block until it goes on
  } else if (is_cgroup_frozen(pid)) {
    row.state = "frozen";
  } else if (driver) {
    row.state = ask_state(driver, pid);
  } else {
    row.state = "unknown";
  }
  return row;
}

Result<std::vector<int>> parse_pids(const std::vector<std::string>& words) {
  std::vector<int> pids;
  for (const std::string& word : words) {
    int pid = 0;
    auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), pid);
    if (error != std::errc() || end != word.data() + word.size() || pid <= 0) {
      return Error(Domain::kUsage, EINVAL, "'" + word + "' is not a pid");
    }
    pids.push_back(pid);
  }
  return pids;
}

using DaemonAnswer = Result<std::optional<DaemonInfo>>;

void write_error(JsonWriter& w, const char* key, const std::string& error) {
  w.key(key);
  if (error.empty()) {
    w.null();
  } else {
    w.value(error);
  }
}

void print_json(const std::vector<Row>& rows, const std::string& driver_error,
                const DaemonAnswer& daemon) {
  JsonWriter w;
  w.begin_object();
  write_error(w, "driver_error", driver_error);
  write_error(w, "daemon_error", daemon ? "" : daemon.error().message());
  w.key("daemon");
  write_daemon(w, daemon ? *daemon : std::nullopt);
  w.key("processes").begin_array();
  for (const Row& row : rows) {
    w.begin_object().member("pid", row.pid).member("command", row.command);
    w.member("state", row.state).member("restore_thread", row.restore_tid);
    w.member("tracer", row.tracer).end_object();
  }
  w.end_array().end_object();
  printf("%s\n", w.str().c_str());
}

void print_rows(const std::vector<Row>& rows) {
  std::vector<TableRow> table = {{"PID", "STATE", "THREAD", "TRACED BY", "COMMAND"}};
  for (const Row& row : rows) {
    table.push_back({std::to_string(row.pid), row.state,
                     row.restore_tid ? std::to_string(row.restore_tid) : "-",
                     row.tracer ? describe(row.tracer) : "-", row.command});
  }
  print_table(table);
}

}  // namespace

int run_status(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  std::vector<int> pids;
  bool named = options->has("pid");
  if (named) {
    auto parsed = parse_pids(options->values["pid"].as<std::vector<std::string>>());
    if (!parsed) return fail(kName, parsed.error().message(), kExitUsage);
    pids = *parsed;
  } else {
    pids = find_cuda_processes();
  }
  auto daemon = ask_daemon();
  // It uses the driver, and has a restore thread as any process that does; nobody dumps it.
  if (!named && daemon && *daemon) std::erase(pids, (*daemon)->pid);

  std::string driver_error;
  std::shared_ptr<GpuDriver> driver;
  if (auto opened = open_cuda_driver(); opened) {
    driver = std::move(*opened);
  } else {
    driver_error = opened.error().message();
  }
  std::vector<Row> rows;
  for (int pid : pids) {
    auto row = look_at(pid, driver);
    if (!row && named) return fail(kName, row.error().message());
    if (row) rows.push_back(*row);  // one that has just ended is no news in a list of all
  }
  bool json = options->has("json");
  if (!driver_error.empty() && !json) fprintf(stderr, "phos status: %s\n", driver_error.c_str());
  if (json) {
    print_json(rows, driver_error, daemon);
    return kExitOk;
  }
  print_rows(rows);
  if (!daemon) {
    fprintf(stderr, "phos status: %s\n", daemon.error().message().c_str());
  } else if (*daemon) {
    printf("\n%s\n", describe(**daemon).c_str());
  }
  return kExitOk;
}

}  // namespace phos::cli
