// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/image_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <memory>

#include "gpu-tracker/image/image.h"

namespace phos::cli {
namespace {

constexpr char kInventory[] = "inventory.img";

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
  for (const char* name : {kInventory, "dump.log"}) {
    if (unlinkat(fd.get(), name, 0) != 0 && errno != ENOENT) {
      return Error::from_errno(errno, "removing " + path + "/" + name);
    }
  }
  return remove_all_images(fd.get());
}

void DumpDir::undo() {
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
  auto real = absolute(path);
  if (!real) return real.error();
  dir.path = std::move(*real);
  if (!force && faccessat(dir.fd.get(), kInventory, F_OK, AT_SYMLINK_NOFOLLOW) == 0) {
    return Error(Domain::kUsage, EEXIST,
                 path +
                     " already holds a dump (inventory.img); choose another directory, or "
                     "replace that dump with --force");
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

uint64_t image_bytes(int fd, time_t since) {
  uint64_t total = 0;
  UniqueFd copy(openat(fd, ".", O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> dir(fdopendir(copy.get()), closedir);
  if (!dir) return 0;
  copy.release();
  while (dirent* entry = readdir(dir.get())) {
    std::string name = entry->d_name;
    if (name.size() < 4 || name.compare(name.size() - 4, 4, ".img") != 0) continue;
    struct stat st;
    if (fstatat(fd, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(st.st_mode)) continue;
    if (st.st_mtime >= since) total += static_cast<uint64_t>(st.st_size);
  }
  return total;
}

}  // namespace phos::cli
