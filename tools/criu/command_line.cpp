// SPDX-License-Identifier: GPL-2.0-only
#include "tools/criu/command_line.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace phos::criu {
namespace {

enum class Value { kNone, kRequired, kOptional };

struct Option {
  const char* name;
  char letter;  // 0: long form only
  Value value;
};

constexpr Value kNone = Value::kNone, kReq = Value::kRequired, kOpt = Value::kOptional;

// CRIU's options (4.2, criu/config.c). Only values matter here; options without one are listed
// because an abbreviation is valid only if no other option starts the same way.
constexpr Option kOptions[] = {
    {"tree", 't', kReq},
    {"images-dir", 'D', kReq},
    {"work-dir", 'W', kReq},
    {"log-file", 'o', kReq},
    {"join-ns", 'J', kReq},
    {"root", 'r', kReq},
    {"libdir", 'L', kReq},
    {"ext-mount-map", 'M', kReq},
    {"ext-unix-sk", 'x', kOpt},
    {"verbosity", 'v', kOpt},
    {"action-script", 0, kReq},
    {"address", 0, kReq},
    {"cgroup-dump-controller", 0, kReq},
    {"cgroup-props", 0, kReq},
    {"cgroup-props-file", 0, kReq},
    {"cgroup-root", 0, kReq},
    {"cgroup-yard", 0, kReq},
    {"close", 0, kReq},
    {"config", 0, kReq},
    {"cpu-cap", 0, kOpt},
    {"empty-ns", 0, kReq},
    {"enable-fs", 0, kReq},
    {"external", 0, kReq},
    {"feature", 0, kReq},
    {"file-validation", 0, kReq},
    {"freeze-cgroup", 0, kReq},
    {"ghost-limit", 0, kReq},
    {"inherit-fd", 0, kReq},
    {"irmap-scan-path", 0, kReq},
    {"lsm-mount-context", 0, kReq},
    {"lsm-profile", 0, kReq},
    {"manage-cgroups", 0, kOpt},
    {"network-lock", 0, kReq},
    {"pidfile", 0, kReq},
    {"port", 0, kReq},
    {"pre-dump-mode", 0, kReq},
    {"prev-images-dir", 0, kReq},
    {"ps-socket", 0, kReq},
    {"skip-mnt", 0, kReq},
    {"status-fd", 0, kReq},
    {"timeout", 0, kReq},
    {"tls-cacert", 0, kReq},
    {"tls-cacrl", 0, kReq},
    {"tls-cert", 0, kReq},
    {"tls-key", 0, kReq},
    {"veth-pair", 0, kReq},
    {"all", 0, kNone},
    {"allow-uprobes", 0, kNone},
    {"auto-dedup", 0, kNone},
    {"daemon", 0, kNone},
    {"deprecated", 0, kNone},
    {"display-stats", 0, kNone},
    {"enable-external-masters", 0, kNone},
    {"enable-external-sharing", 0, kNone},
    {"evasive-devices", 0, kNone},
    {"exec-cmd", 0, kNone},
    {"experimental", 0, kNone},
    {"extra", 0, kNone},
    {"file-locks", 'l', kNone},
    {"force-irmap", 0, kNone},
    {"ghost-fiemap", 0, kNone},
    {"help", 'h', kNone},
    {"lazy-pages", 0, kNone},
    {"leave-running", 'R', kNone},
    {"leave-stopped", 's', kNone},
    {"link-remap", 0, kNone},
    {"log-pid", 0, kNone},
    {"mntns-compat-mode", 0, kNone},
    {"ms", 0, kNone},
    {"no-default-config", 0, kNone},
    {"page-server", 0, kNone},
    {"restore-detached", 'd', kNone},
    {"restore-sibling", 'S', kNone},
    {"shell-job", 'j', kNone},
    {"skip-file-rwx-check", 0, kNone},
    {"skip-in-flight", 0, kNone},
    {"stream", 0, kNone},
    {"tcp-close", 0, kNone},
    {"tcp-established", 0, kNone},
    {"tls", 0, kNone},
    {"tls-no-cn-verify", 0, kNone},
    {"track-mem", 0, kNone},
    {"unprivileged", 0, kNone},
    {"version", 'V', kNone},
    {"weak-sysctls", 0, kNone},
};

constexpr char kEnablePlugin[] = "--enable-plugin";
constexpr char kEnablePluginIs[] = "--enable-plugin=";

// The option that getopt_long takes `name` for: an exact name, or the only one it abbreviates.
const Option* find_long(const std::string& name) {
  const Option* found = nullptr;
  for (const Option& o : kOptions) {
    if (name == o.name) return &o;
    if (strncmp(o.name, name.c_str(), name.size()) != 0) continue;
    if (found) return nullptr;  // ambiguous: criu will say so
    found = &o;
  }
  return found;
}

const Option* find_letter(char letter) {
  for (const Option& o : kOptions) {
    if (o.letter == letter) return &o;
  }
  return nullptr;
}

struct Seen {
  bool libdir = false;
  bool takes_next = false;  // the next argument is this option's value
};

Seen read_option(const std::string& arg) {
  Seen seen;
  if (arg.compare(0, 2, "--") == 0) {
    size_t equals = arg.find('=');
    const Option* o = find_long(arg.substr(2, equals == std::string::npos ? equals : equals - 2));
    if (!o) return seen;
    seen.libdir = o->letter == 'L';
    seen.takes_next = o->value == kReq && equals == std::string::npos;
    return seen;
  }
  for (size_t i = 1; i < arg.size(); i++) {
    const Option* o = find_letter(arg[i]);
    if (!o) continue;
    seen.libdir |= o->letter == 'L';
    if (o->value == kNone) continue;
    // The rest of the cluster is the value.
    seen.takes_next = o->value == kReq && i + 1 == arg.size();
    break;
  }
  return seen;
}

}  // namespace

Result<CommandLine> parse_command_line(const std::vector<std::string>& argv) {
  CommandLine line;
  if (argv.empty()) return line;
  line.args.push_back(argv[0]);
  bool placed = false;
  size_t i = 1;
  for (; i < argv.size(); i++) {
    const std::string& arg = argv[i];
    if (arg == "--") break;
    std::string plugin;
    bool ours = false;
    if (arg == kEnablePlugin) {
      ours = true;
      if (i + 1 < argv.size()) plugin = argv[++i];
    } else if (arg.rfind(kEnablePluginIs, 0) == 0) {
      ours = true;
      plugin = arg.substr(strlen(kEnablePluginIs));
    }
    if (ours) {
      if (plugin.empty()) {
        return Error(Domain::kUsage, EINVAL,
                     "--enable-plugin needs the name of a plugin, for example: "
                     "--enable-plugin phos");
      }
      auto& list = line.plugins;
      if (std::find(list.begin(), list.end(), plugin) == list.end()) list.push_back(plugin);
      continue;
    }
    line.args.push_back(arg);
    if (arg == "--help" || arg == "-h") line.help = true;
    if (arg.size() > 1 && arg[0] == '-') {
      Seen seen = read_option(arg);
      line.has_libdir |= seen.libdir;
      if (seen.takes_next && i + 1 < argv.size()) line.args.push_back(argv[++i]);
    } else if (!placed) {
      placed = true;
      line.command = arg;
      line.libdir_at = line.args.size();
    }
  }
  // A command may also follow "--"; options may not, so -L goes before it.
  if (!placed) {
    line.libdir_at = line.args.size();
    if (i + 1 < argv.size()) line.command = argv[i + 1];
  }
  line.args.insert(line.args.end(), argv.begin() + static_cast<long>(i), argv.end());
  return line;
}

}  // namespace phos::criu
