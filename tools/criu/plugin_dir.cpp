// SPDX-License-Identifier: GPL-2.0-only
#include "tools/criu/plugin_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "gpu-tracker/base/unique_fd.h"

namespace phos::criu {
namespace {

using Links = std::map<std::string, std::string>;  // file name -> target

// FNV-1a: tells directories apart; what lies in one is compared link by link.
std::string short_hash(const Links& links) {
  uint64_t h = 14695981039346656037u;
  for (const auto& [file, target] : links) {
    for (const std::string* text : {&file, &target}) {
      // With the final NUL, which ends each.
      for (size_t i = 0; i <= text->size(); i++) {
        h = (h ^ static_cast<unsigned char>(text->c_str()[i])) * 1099511628211u;
      }
    }
  }
  char text[9];
  snprintf(text, sizeof text, "%08x", static_cast<unsigned>(h ^ (h >> 32)));
  return text;
}

// Opens a directory that nobody but this user (or root) can have put anything into.
Result<UniqueFd> open_trusted(int at, const std::string& name) {
  UniqueFd fd(openat(at, name.c_str(), O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC));
  struct stat st;
  if (!fd || fstat(fd.get(), &st) != 0) return Error::from_errno(errno, "opening " + name);
  if ((st.st_uid != geteuid() && st.st_uid != 0) || (st.st_mode & (S_IWGRP | S_IWOTH))) {
    return Error(Domain::kUsage, EPERM, name + " belongs to another user or others may write it");
  }
  return fd;
}

Result<UniqueFd> make_trusted(int at, const std::string& name) {
  if (mkdirat(at, name.c_str(), 0755) != 0 && errno != EEXIST) {
    return Error::from_errno(errno, "making " + name);
  }
  return open_trusted(at, name);
}

std::vector<std::string> entries(int dir_fd) {
  std::vector<std::string> names;
  UniqueFd fd(openat(dir_fd, ".", O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> dir(fdopendir(fd.get()), closedir);
  if (!dir) return names;
  fd.release();
  while (dirent* entry = readdir(dir.get())) {
    std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  return names;
}

bool holds_exactly(int dir_fd, const Links& links) {
  if (entries(dir_fd).size() != links.size()) return false;
  return std::all_of(links.begin(), links.end(), [&](const auto& link) {
    char target[PATH_MAX];
    ssize_t n = readlinkat(dir_fd, link.first.c_str(), target, sizeof target);
    return n >= 0 && std::string(target, static_cast<size_t>(n)) == link.second;
  });
}

Result<void> fill(int dir_fd, const Links& links) {
  for (const auto& [file, target] : links) {
    if (symlinkat(target.c_str(), dir_fd, file.c_str()) != 0) {
      return Error::from_errno(errno, "linking " + file);
    }
  }
  return {};
}

void remove_dir(int at, const std::string& name) {
  UniqueFd fd(openat(at, name.c_str(), O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC));
  if (fd) {
    for (const std::string& entry : entries(fd.get())) unlinkat(fd.get(), entry.c_str(), 0);
  }
  unlinkat(at, name.c_str(), AT_REMOVEDIR);
}

// Builds the directory under a private name and renames it into place, so that a criu that starts
// meanwhile sees all of it or nothing.
Result<void> install(int at, const std::string& name, const Links& links) {
  auto present = open_trusted(at, name);
  if (present && holds_exactly(present->get(), links)) return {};
  std::string fresh = "." + name + "." + std::to_string(getpid());
  remove_dir(at, fresh);
  if (mkdirat(at, fresh.c_str(), 0755) != 0) return Error::from_errno(errno, "making " + fresh);
  auto dir = open_trusted(at, fresh);
  if (!dir) return dir.error();
  if (fchmod(dir->get(), 0755) != 0) return Error::from_errno(errno, "setting modes of " + fresh);
  auto filled = fill(dir->get(), links);
  if (!filled) {
    remove_dir(at, fresh);
    return filled.error();
  }
  if (renameat2(at, fresh.c_str(), at, name.c_str(), RENAME_NOREPLACE) == 0) return {};
  // Somebody was faster, or what is there is damaged: in the latter case take its place.
  present = open_trusted(at, name);
  bool good = present && holds_exactly(present->get(), links);
  int failed = 0;
  if (!good && renameat2(at, fresh.c_str(), at, name.c_str(), RENAME_EXCHANGE) != 0) failed = errno;
  remove_dir(at, fresh);
  if (failed) return Error::from_errno(failed, "replacing " + name);
  return {};
}

Result<std::string> install_under(const std::string& state_dir, const std::string& name,
                                  const Links& links) {
  auto state = make_trusted(AT_FDCWD, state_dir);
  if (!state) return state.error();
  auto plugins = make_trusted(state->get(), "plugins");
  if (!plugins) return plugins.error();
  if (auto done = install(plugins->get(), name, links); !done) return done.error();
  return state_dir + "/plugins/" + name;
}

Result<std::string> install_private(const Links& links) {
  char path[] = "/tmp/phos-plugins-XXXXXX";
  if (!mkdtemp(path)) return Error::from_errno(errno, "making a plugin directory under /tmp");
  UniqueFd dir(open(path, O_DIRECTORY | O_NOFOLLOW | O_RDONLY | O_CLOEXEC));
  if (!dir) return Error::from_errno(errno, std::string("opening ") + path);
  if (auto done = fill(dir.get(), links); !done) return done.error().wrap(path);
  return std::string(path);
}

}  // namespace

Result<std::string> plugin_dir_for(const std::vector<Plugin>& plugins,
                                   const std::string& state_dir) {
  if (plugins.empty()) return Error(Domain::kUsage, EINVAL, "no plugin was chosen");
  Links links;
  std::vector<std::string> names, files;
  bool one_dir = true;
  for (const Plugin& p : plugins) {
    links[p.file] = p.dir + "/" + p.file;
    names.push_back(p.name);
    files.push_back(p.file);
    one_dir &= p.dir == plugins[0].dir;
  }
  std::sort(names.begin(), names.end());
  std::sort(files.begin(), files.end());
  if (one_dir && files == shared_objects(plugins[0].dir)) return plugins[0].dir;

  std::string name;
  for (const std::string& n : names) name += (name.empty() ? "" : "+") + n;
  name += "-" + short_hash(links);
  mode_t mask = umask(022);
  auto made = install_under(state_dir, name, links);
  umask(mask);
  if (made) return made;
  return install_private(links);
}

}  // namespace phos::criu
