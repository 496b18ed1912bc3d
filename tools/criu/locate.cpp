// SPDX-License-Identifier: GPL-2.0-only
#include "tools/criu/locate.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "gpu-tracker/base/unique_fd.h"
#include "tools/criu/split.h"

namespace phos::criu {
namespace {

// Each copy of the front end holds this text. Two different copies in PATH would otherwise start
// each other for ever: comparing inodes only finds the running one.
const char kMarker[] __attribute__((used)) = "phos criu front end: not stock criu";

bool is_executable_file(const std::string& path) {
  struct stat st;
  return stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode) && access(path.c_str(), X_OK) == 0;
}

bool is_front_end(const std::string& path) {
  struct stat st, self;
  if (stat(path.c_str(), &st) != 0) return false;
  if (stat("/proc/self/exe", &self) == 0 && st.st_dev == self.st_dev && st.st_ino == self.st_ino) {
    return true;
  }
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd || st.st_size == 0) return false;
  size_t size = static_cast<size_t>(st.st_size);
  void* p = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (p == MAP_FAILED) return false;
  bool found = memmem(p, size, kMarker, sizeof kMarker) != nullptr;
  munmap(p, size);
  return found;
}

bool usable(const std::string& path) {
  return is_executable_file(path) && !is_front_end(path);
}

}  // namespace

std::string self_dir() {
  char path[PATH_MAX];
  ssize_t n = readlink("/proc/self/exe", path, sizeof path);
  if (n <= 0 || n == static_cast<ssize_t>(sizeof path)) return "";
  std::string self(path, static_cast<size_t>(n));
  return self.substr(0, self.rfind('/'));
}

Result<std::string> find_stock_criu(const std::string& self_dir) {
  // secure_getenv: a criu with file capabilities must not run what its caller names.
  if (const char* named = secure_getenv("PHOS_CRIU"); named && *named) {
    if (!is_executable_file(named)) {
      return Error(Domain::kCriu, ENOENT,
                   std::string("PHOS_CRIU names ") + named +
                       ", which is no executable file; set it to stock criu's path or unset it");
    }
    if (is_front_end(named)) {
      return Error(Domain::kCriu, ELOOP,
                   std::string("PHOS_CRIU names ") + named +
                       ", which is phos's front end; set it to stock criu's path or unset it");
    }
    return std::string(named);
  }
  std::vector<std::string> dirs;
  if (!self_dir.empty()) dirs.push_back(self_dir + "/../libexec/phos");
  const char* path = secure_getenv("PATH");
  for (const std::string& dir : split(path ? path : "", ':')) {
    if (dir[0] == '/') dirs.push_back(dir);  // relative entries: not for a root tool
  }
  for (const char* dir : {"/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin", PHOS_LIBEXECDIR}) {
    dirs.emplace_back(dir);
  }
  // In the build directory: what `make criu` made.
  if (!self_dir.empty()) dirs.push_back(self_dir + "/../criu");
  for (const std::string& dir : dirs) {
    if (usable(dir + "/criu")) return dir + "/criu";
  }
  return Error(Domain::kCriu, ENOENT,
               "stock criu was not found in PATH; install CRIU 4.0 or newer (4.2 recommended), or "
               "set PHOS_CRIU to its path");
}

}  // namespace phos::criu
