// SPDX-License-Identifier: GPL-2.0-only
// phos check: stock CRIU, the plugin beside it, and the daemon the plugin talks to.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

#include "gpu-tracker/base/unique_fd.h"
#include "tools/criu/locate.h"
#include "tools/criu/plugins.h"
#include "tools/phos/capture.h"
#include "tools/phos/checks.h"
#include "tools/phos/log_tail.h"

namespace phos::cli {
namespace {

constexpr char kInstallCriu[] = "install CRIU 4.2, or set PHOS_CRIU to its path";

Check check_version(const std::string& path) {
  Check c{"CRIU", Verdict::kMissing, path, kInstallCriu};
  auto ran = capture({path, "--version"});
  int major = 0, minor = 0;
  if (!ran || ran->code != 0 || sscanf(ran->output.c_str(), "Version: %d.%d", &major, &minor) < 1) {
    c.detail += ": does not tell its version";
    return c;
  }
  std::string line = ran->output.substr(0, ran->output.find('\n'));
  c.detail = line.substr(strlen("Version: ")) + " (" + path + ")";
  if (major < 4) {
    c.detail += " has no device hooks";
  } else if (major == 4 && minor < 2) {
    c.verdict = Verdict::kWarn;
    c.remedy = "CRIU 4.2 is recommended";
  } else {
    c.verdict = Verdict::kOk;
    c.remedy.clear();
  }
  return c;
}

Check check_features(const std::string& path) {
  Check c{"criu check", Verdict::kOk, "looks good", ""};
  auto ran = capture({path, "check"});
  if (ran && ran->code == 0) return c;
  c.verdict = Verdict::kMissing;
  c.remedy = "run `" + path + " check` and follow what it says";
  c.detail = ran ? "failed" : ran.error().message();
  std::istringstream lines(ran ? ran->output : "");
  for (std::string line; std::getline(lines, line);) {
    std::string text = error_text(line);
    if (text.empty()) continue;
    c.detail = text;
    break;
  }
  return c;
}

// It cannot be loaded here: it needs symbols that only criu has.
bool is_elf(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  char magic[4] = {};
  return fd && read(fd.get(), magic, sizeof magic) == static_cast<ssize_t>(sizeof magic) &&
         memcmp(magic, "\177ELF", sizeof magic) == 0;
}

void check_plugin(std::vector<Check>& checks) {
  Check c{"phos plugin", Verdict::kOk, "", ""};
  auto found = criu::find_plugins({"phos"}, criu::plugin_dirs(criu::self_dir()));
  if (!found) {
    c.verdict = Verdict::kMissing;
    c.detail = "phos_plugin.so is in none of the plugin directories";
    c.remedy = "install it to " PHOS_PLUGINDIR ", or set PHOS_PLUGIN_PATH";
    checks.push_back(c);
    return;
  }
  const criu::Plugin& plugin = found->front();
  c.detail = plugin.dir + "/" + plugin.file;
  if (!is_elf(c.detail)) {
    c.verdict = Verdict::kMissing;
    c.detail += " is no shared object";
    c.remedy = "install phos again";
  }
  checks.push_back(c);
  auto neighbours = criu::shared_objects(plugin.dir);
  if (std::count(neighbours.begin(), neighbours.end(), "cuda_plugin.so") == 0) return;
  checks.push_back({"NVIDIA's cuda_plugin", Verdict::kWarn,
                    "in the same directory; phos takes over",
                    "use --enable-plugin phos, which loads phos only, or remove cuda_plugin.so"});
}

Check check_daemon() {
  Check c{"phosd", Verdict::kMissing, "not found", "install phos again"};
  // As the plugin looks for it: $PHOS_PHOSD, below its own prefix, where it was built for.
  std::vector<std::string> candidates;
  if (const char* named = getenv("PHOS_PHOSD")) candidates.emplace_back(named);
  auto plugin = criu::find_plugins({"phos"}, criu::plugin_dirs(criu::self_dir()));
  if (plugin) candidates.push_back(plugin->front().dir + "/../../libexec/phos/phosd");
  candidates.emplace_back(PHOS_LIBEXECDIR "/phosd");
  for (const std::string& path : candidates) {
    if (access(path.c_str(), X_OK) == 0) return {"phosd", Verdict::kOk, path, ""};
  }
  return c;
}

}  // namespace

std::vector<Check> check_criu() {
  std::vector<Check> checks;
  auto path = criu::find_stock_criu(criu::self_dir());
  if (path) {
    checks.push_back(check_version(*path));
    checks.push_back(check_features(*path));
  } else {
    checks.push_back({"CRIU", Verdict::kMissing, path.error().message(), kInstallCriu});
  }
  check_plugin(checks);
  checks.push_back(check_daemon());
  return checks;
}

}  // namespace phos::cli
