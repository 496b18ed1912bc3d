// SPDX-License-Identifier: GPL-2.0-only
// phos check: one table of what this machine can do, with a remedy for each thing that is missing.

#include <cstdio>

#include "gpu-tracker/base/json.h"
#include "tools/phos/checks.h"
#include "tools/phos/command.h"
#include "tools/phos/table.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "check";

using CheckGroup = std::vector<Check> (*)();

constexpr CheckGroup kGroups[] = {check_privileges, check_gpu_driver, check_criu, check_kernel,
                                  check_limits};

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "[--json]";
  s.about =
      "Tells whether this machine can dump and restore CUDA processes, and what to do\n"
      "about what is missing. Changes nothing. Exit code 1: something required is missing.\n";
  s.options.add_options()("json", "print JSON");
  return s;
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

void print_json(const std::vector<Check>& checks, bool ready) {
  JsonWriter w;
  w.begin_object().member("ready", ready).key("checks").begin_array();
  for (const Check& c : checks) {
    w.begin_object().member("name", c.name).member("verdict", to_string(c.verdict));
    w.member("detail", c.detail).member("remedy", c.remedy).end_object();
  }
  w.end_array().end_object();
  printf("%s\n", w.str().c_str());
}

void print_rows(const std::vector<Check>& checks) {
  std::vector<TableRow> table = {{"WHAT", "VERDICT", "FOUND"}};
  for (const Check& c : checks) {
    table.push_back({c.name, to_string(c.verdict), c.detail});
    if (!c.remedy.empty()) table.push_back({"", "", "-> " + c.remedy});
  }
  print_table(table);
}

}  // namespace

const char* to_string(Verdict verdict) {
  switch (verdict) {
    case Verdict::kOk:
      return "ok";
    case Verdict::kWarn:
      return "warn";
    case Verdict::kMissing:
      return "missing";
  }
  return "unknown";
}

int run_check(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  std::vector<Check> checks;
  std::vector<std::string> missing;
  for (CheckGroup group : kGroups) {
    for (const Check& check : group()) {
      checks.push_back(check);
      if (check.verdict == Verdict::kMissing) missing.push_back(check.name);
    }
  }
  bool ready = missing.empty();
  if (options->has("json")) {
    print_json(checks, ready);
  } else {
    print_rows(checks);
    printf("\n%s\n", ready ? "This machine can dump and restore CUDA processes."
                           : ("Dump and restore of CUDA processes do not work here; missing: " +
                              join(missing) + ".")
                                 .c_str());
  }
  return ready ? kExitOk : kExitFailed;
}

}  // namespace phos::cli
