// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/image_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "gpu-tracker/image/image.h"

namespace phos::cli {
namespace {

// phosd lets go of a parent's directory a moment after the dump that builds on it has ended.
constexpr int kLockTries = 40;
constexpr useconds_t kLockPauseUs = 50'000;

constexpr char kInventory[] = "inventory.img";
constexpr char kParent[] = "parent";  // CR_PARENT_LINK in criu/include/image.h

// First words of inventory.img (criu/include/magic.h): IMG_COMMON_MAGIC, then INVENTORY_MAGIC.
// Images up to CRIU 1.x start with the latter.
constexpr uint32_t kCommonMagic = 0x54564319;
constexpr uint32_t kInventoryMagic = 0x58313116;

Error directory_error(const std::string& path, int code) {
  if (code == ENOENT) return Error(Domain::kErrno, code, "there is no directory " + path);
  if (code == ENOTDIR) return Error(Domain::kErrno, code, path + " is not a directory");
  return Error::from_errno(code, "opening " + path);
}

Result<std::string> absolute(const std::string& path) {
  std::unique_ptr<char, decltype(&free)> real(realpath(path.c_str(), nullptr), free);
  if (!real) return Error::from_errno(errno, "resolving " + path);
  return std::string(real.get());
}

}  // namespace

Result<void> DumpDir::start() {
  for (const char* name : {kInventory, "dump.log", "pre-dump.log", kParent}) {
    if (unlinkat(fd.get(), name, 0) != 0 && errno != ENOENT) {
      return Error::from_errno(errno, "removing " + path + "/" + name);
    }
  }
  return remove_all_images(fd.get());
}

Result<void> DumpDir::link(const ParentLink& parent) {
  if (symlinkat(parent.path.c_str(), fd.get(), kParent) == 0) {
    linked = true;
    return {};
  }
  return Error::from_errno(errno, "making the link " + path + "/" + kParent);
}

Result<ParentLink> find_parent(const DumpDir& dir, const std::string& previous) {
  auto fd = open_existing(previous);
  if (!fd) return fd.error();
  auto real = absolute(previous);
  if (!real) return real.error();
  if (*real == dir.path) {
    return Error(Domain::kUsage, EINVAL,
                 previous + " is the directory of the new images; a pre-dump needs one of its own");
  }
  ParentLink link;
  link.path = std::filesystem::path(*real).lexically_relative(dir.path);
  link.has_cpu_memory = faccessat(fd->get(), kInventory, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
  auto images = read_image_set(fd->get());
  if (!images) return images.error();
  if (!link.has_cpu_memory && images->processes.empty()) {
    return Error(Domain::kUsage, ENOENT, previous + " holds no images; give one of a pre-dump");
  }
  return link;
}

void DumpDir::undo() {
  if (linked) unlinkat(fd.get(), kParent, 0);
  if (created) rmdir(path.c_str());
}

Result<DumpDir> open_for_dump(const std::string& path, bool force) {
  DumpDir dir;
  if (mkdir(path.c_str(), 0700) == 0) {
    dir.created = true;
  } else if (errno == ENOENT) {
    return Error(Domain::kErrno, ENOENT,
                 "cannot make " + path + ": the directory above it does not exist; make it first");
  } else if (errno != EEXIST) {
    return Error::from_errno(errno, "making " + path);
  }
  auto fd = open_existing(path);
  if (!fd) return fd.error();
  dir.fd = std::move(*fd);
  if (dir.created) {  // it is to be as durable as what will be in it
    UniqueFd above(openat(dir.fd.get(), "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (!above) return Error::from_errno(errno, "opening the directory above " + path);
    if (auto r = sync_directory(above.get(), path + "/.."); !r) return r.error();
  }
  auto real = absolute(path);
  if (!real) return real.error();
  dir.path = std::move(*real);
  if (force) return dir;
  if (faccessat(dir.fd.get(), kInventory, F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
    return Error(Domain::kUsage, EEXIST,
                 path +
                     " already holds a dump (inventory.img); choose another directory, or "
                     "replace that dump with --force");
  }
  // A pre-dump of GPU memory alone has no inventory.
  auto images = has_images(dir.fd.get());
  if (!images) return images.error();
  if (*images) {
    return Error(Domain::kUsage, EEXIST,
                 path +
                     " already holds GPU images (phos-*.img); choose another directory, or "
                     "replace them with --force");
  }
  return dir;
}

Result<UniqueFd> open_existing(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  if (!fd) return directory_error(path, errno);
  return fd;
}

Result<void> check_inventory(int fd, const std::string& path) {
  UniqueFd file(openat(fd, kInventory, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  if (!file && errno == ENOENT) {
    return Error(Domain::kFormat, ENOENT,
                 path + " holds no complete dump: inventory.img is missing");
  }
  if (!file) return Error::from_errno(errno, "opening " + path + "/" + kInventory);
  uint32_t magic[2] = {};
  ssize_t n = read(file.get(), magic, sizeof magic);
  bool good =
      n == static_cast<ssize_t>(sizeof magic) &&
      (magic[0] == kInventoryMagic || (magic[0] == kCommonMagic && magic[1] == kInventoryMagic));
  if (!good) {
    return Error(Domain::kFormat, EINVAL,
                 path + "/inventory.img is not an image of CRIU's; give the directory of a dump");
  }
  return {};
}

Result<void> lock_directory(int fd, const std::string& path) {
  // Where there are no locks on directories (NFS may have none), nobody is kept from anything.
  for (int tries = 0; tries <= kLockTries; tries++) {
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK) return {};
    usleep(kLockPauseUs);
  }
  return Error(Domain::kUsage, EBUSY,
               path + " is being changed by another phos command, or a dump is building on it");
}

Result<std::vector<std::string>> list_directory(int fd, const std::string& path) {
  UniqueFd copy(openat(fd, ".", O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> dir(copy ? fdopendir(copy.get()) : nullptr, closedir);
  if (!dir) return Error::from_errno(errno, "cannot list " + path);
  copy.release();
  std::vector<std::string> names;
  errno = 0;
  while (dirent* entry = readdir(dir.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno) return Error::from_errno(errno, "cannot list " + path);
  std::sort(names.begin(), names.end());
  return names;
}

Result<void> sync_directory(int fd, const std::string& path) {
  // EINVAL: a file system without directories to sync.
  if (fsync(fd) == 0 || errno == EINVAL) return {};
  return Error::from_errno(errno, "cannot sync " + path);
}

uint64_t image_bytes(int fd, time_t since) {
  uint64_t total = 0;
  auto names = list_directory(fd, "");
  if (!names) return 0;
  for (const std::string& name : *names) {
    if (name.size() < 4 || name.compare(name.size() - 4, 4, ".img") != 0) continue;
    struct stat st;
    if (fstatat(fd, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(st.st_mode)) continue;
    if (st.st_mtime >= since) total += static_cast<uint64_t>(st.st_size);
  }
  return total;
}

}  // namespace phos::cli
