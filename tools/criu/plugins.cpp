// SPDX-License-Identifier: GPL-2.0-only
#include "tools/criu/plugins.h"

#include <dirent.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstdlib>
#include <memory>
#include <set>

#include "tools/criu/split.h"

namespace phos::criu {
namespace {

constexpr char kSuffix[] = "_plugin.so";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

std::string without(const std::string& text, const std::string& end) {
  return ends_with(text, end) ? text.substr(0, text.size() - end.size()) : text;
}

std::string short_name(const std::string& file) {
  return ends_with(file, kSuffix) ? without(file, kSuffix) : without(file, ".so");
}

std::vector<std::string> file_names(const std::string& name) {
  if (ends_with(name, ".so")) return {name};
  std::vector<std::string> files = {name + kSuffix};
  if (ends_with(name, "_plugin")) files.push_back(name + ".so");
  return files;
}

bool is_file(const std::string& path) {
  struct stat st;
  return stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode);
}

Error unknown_plugin(const std::string& name, const std::vector<std::string>& dirs) {
  std::set<std::string> known;
  for (const std::string& dir : dirs) {
    for (const std::string& file : shared_objects(dir)) known.insert(short_name(file));
  }
  std::string list;
  for (const std::string& k : known) list += (list.empty() ? "" : ", ") + k;
  if (!list.empty()) {
    return Error(Domain::kUsage, ENOENT,
                 "there is no plugin named '" + name + "'; the installed plugins are: " + list);
  }
  std::string searched;
  for (const std::string& dir : dirs) searched += (searched.empty() ? "" : ", ") + dir;
  return Error(Domain::kUsage, ENOENT,
               "there is no plugin named '" + name + "', nor any other plugin, in " + searched +
                   "; install it there or set PHOS_PLUGIN_PATH");
}

}  // namespace

std::vector<std::string> plugin_dirs(const std::string& self_dir) {
  const char* env = secure_getenv("PHOS_PLUGIN_PATH");
  std::vector<std::string> all = split(env ? env : "", ':');
  if (!self_dir.empty()) all.push_back(self_dir + "/../lib/criu");
  for (const char* dir : {PHOS_PLUGINDIR, "/usr/lib/criu", "/usr/local/lib/criu", "/usr/lib64/criu",
                          "/usr/lib/x86_64-linux-gnu/criu"}) {
    all.emplace_back(dir);
  }
  // Resolved: criu changes its directory before it opens the plugin directory.
  std::vector<std::string> dirs;
  std::set<std::string> seen;
  for (const std::string& dir : all) {
    std::unique_ptr<char, decltype(&free)> real(realpath(dir.c_str(), nullptr), free);
    std::string path = real ? real.get() : dir;
    if (seen.insert(path).second) dirs.push_back(path);
  }
  return dirs;
}

std::vector<std::string> shared_objects(const std::string& dir) {
  std::set<std::string> files;
  std::unique_ptr<DIR, int (*)(DIR*)> d(opendir(dir.c_str()), closedir);
  while (d) {
    dirent* entry = readdir(d.get());
    if (!entry) break;
    // criu's own rule: whatever ends so, be it only ".so".
    std::string name = entry->d_name;
    if (name == ".so" || ends_with(name, ".so")) files.insert(name);
  }
  return {files.begin(), files.end()};
}

Result<std::vector<Plugin>> find_plugins(const std::vector<std::string>& names,
                                         const std::vector<std::string>& dirs) {
  std::vector<Plugin> plugins;
  std::set<std::string> taken;
  for (const std::string& name : names) {
    Plugin plugin;
    // A slash would reach outside the plugin directories.
    if (name.find('/') == std::string::npos) {
      for (const std::string& dir : dirs) {
        for (const std::string& file : file_names(name)) {
          // NOLINTNEXTLINE(performance-inefficient-string-concatenation): a few, once
          if (plugin.file.empty() && is_file(dir + "/" + file)) {
            plugin = {short_name(file), dir, file};
          }
        }
      }
    }
    if (plugin.file.empty()) return unknown_plugin(name, dirs);
    if (taken.insert(plugin.file).second) plugins.push_back(plugin);
  }
  return plugins;
}

}  // namespace phos::criu
