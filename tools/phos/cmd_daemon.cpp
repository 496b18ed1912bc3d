// SPDX-License-Identifier: GPL-2.0-only
// phos daemon: asks for, starts and stops this machine's phosd. Nobody has to start it.

#include <cstdio>

#include "gpu-tracker/base/json.h"
#include "tools/phos/command.h"
#include "tools/phos/daemon_client.h"
#include "tools/phos/table.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "daemon";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "status|start|stop [--json]";
  s.about =
      "Tells what this machine's phosd is doing, starts it, or makes it leave (refused while\n"
      "it has sessions). CRIU's phos plugin starts phosd when it needs it; a running one must be\n"
      "stopped after an upgrade of phos or of the NVIDIA driver.\n";
  s.positional = "action";
  s.options.add_options()("json", "print JSON");
  return s;
}

void print(const std::optional<DaemonInfo>& info, bool json) {
  if (json) {
    JsonWriter w;
    write_daemon(w, info);
    printf("%s\n", w.str().c_str());
    return;
  }
  if (!info) {
    puts("phosd does not run; it is started when it is needed");
    return;
  }
  puts(describe(*info).c_str());
  if (info->sessions.empty()) return;
  std::vector<TableRow> table = {{"SESSION", "STAGE", "CLIENT", "PID", "STATE", "CHECKPOINT"}};
  for (const DaemonSession& s : info->sessions) {
    const std::string state = s.unsynced_bytes ? "writing " + format_bytes(s.unsynced_bytes)
                              : s.recovering   ? "recovering"
                                               : "open";
    table.push_back({std::to_string(s.id), s.stage, std::to_string(s.client_pid),
                     s.pid ? std::to_string(s.pid) : "-", state,
                     s.checkpoint.empty() ? "-" : s.checkpoint});
  }
  print_table(table);
}

// Like systemctl's: failure means that none runs.
int status(bool json) {
  auto info = ask_daemon();
  if (!info) return fail(kName, info.error().message());
  print(*info, json);
  return *info ? kExitOk : kExitFailed;
}

int start(bool json) {
  auto info = start_daemon();
  if (!info) return fail(kName, info.error().message());
  print(*info, json);
  return kExitOk;
}

int stop() {
  auto stopped = stop_daemon();
  if (!stopped) return fail(kName, stopped.error().message());
  if (!*stopped) puts("phosd does not run");
  return kExitOk;
}

}  // namespace

int run_daemon(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  const bool json = options->has("json");
  if (options->has("action")) {
    const auto words = options->values["action"].as<std::vector<std::string>>();
    if (words == std::vector<std::string>{"status"}) return status(json);
    if (words == std::vector<std::string>{"start"}) return start(json);
    if (words == std::vector<std::string>{"stop"}) return stop();
  }
  return fail(kName, "one of status, start and stop is needed; see `phos daemon --help`",
              kExitUsage);
}

}  // namespace phos::cli
