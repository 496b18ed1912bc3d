// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/image_dirs.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <set>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/names.h"

namespace phos {
namespace {

Result<std::pair<dev_t, ino_t>> directory_id(int dir_fd) {
  struct stat st;
  if (fstat(dir_fd, &st) == 0) return std::pair(st.st_dev, st.st_ino);
  return Error::from_errno(errno, "cannot stat " + describe_file(dir_fd, "."));
}

// An invalid one: it has none.
Result<UniqueFd> parent_of(int dir_fd) {
  auto parent = open_parent(dir_fd);
  const bool absent =
      !parent && parent.error().domain() == Domain::kErrno && parent.error().code() == ENOENT;
  return absent ? Result<UniqueFd>(UniqueFd()) : std::move(parent);
}

Error busy(const std::string& what) {
  return Error(Domain::kUsage, EBUSY, what);
}

}  // namespace

ptrdiff_t ImageDirs::find(const std::pair<dev_t, ino_t>& id) const {
  auto it = std::find_if(dirs_.begin(), dirs_.end(), [&](const Dir& d) { return d.id == id; });
  return it == dirs_.end() ? -1 : it - dirs_.begin();
}

Result<ImageDirs> ImageDirs::open(const std::vector<int>& dir_fds, const LockDirectory& lock) {
  ImageDirs set;
  for (int fd : dir_fds) {
    if (auto ok = set.add(fd, lock); !ok) return ok.error();
  }
  std::map<DumpId, const Dir*> dumps;
  for (const Dir& dir : set.dirs_) {
    if (dir.images.empty()) continue;
    auto [it, is_new] = dumps.try_emplace(dir.dump_id(), &dir);
    if (is_new) continue;
    return image_error(ImageError::kMixedDumps, printable(it->second->path) + " and " +
                                                    printable(dir.path) +
                                                    " hold the same dump: leave one copy out");
  }
  // Parents are known by index.
  std::vector<size_t> order(set.dirs_.size()), place(order.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return set.dirs_[a].depth > set.dirs_[b].depth; });
  ImageDirs sorted;
  for (size_t i : order) {
    place[i] = sorted.dirs_.size();
    sorted.dirs_.push_back(std::move(set.dirs_[i]));
  }
  for (Dir& dir : sorted.dirs_) {
    if (dir.parent >= 0)
      dir.parent = static_cast<ptrdiff_t>(place[static_cast<size_t>(dir.parent)]);
  }
  return sorted;
}

// With what it builds on.
Result<void> ImageDirs::add(int dir_fd, const LockDirectory& lock) {
  UniqueFd fd(fcntl(dir_fd, F_DUPFD_CLOEXEC, 0));
  if (!fd) return Error::from_errno(errno, "cannot use the image directory");
  const auto first = static_cast<ptrdiff_t>(dirs_.size());
  size_t depth = 0;  // of the last one that is known
  while (fd) {
    auto id = directory_id(fd.get());
    if (!id) return id.error();
    const ptrdiff_t known = find(*id);
    const auto next = static_cast<ptrdiff_t>(dirs_.size());
    if (next > first) {
      dirs_.back().parent = known < 0 ? next : known;
      if (known >= 0) dirs_[static_cast<size_t>(known)].has_children = true;
    }
    if (known >= first) {
      return image_error(ImageError::kBrokenChain,
                         "parent links lead in a circle, back to " + describe_file(fd.get(), "."));
    }
    if (known >= 0) {
      depth = dirs_[static_cast<size_t>(known)].depth + 1;
      break;
    }
    Dir dir;
    dir.id = *id;
    dir.path = directory_path(fd.get());
    if (lock) {
      if (auto ok = lock(fd.get(), dir.path); !ok) return ok;
    }
    auto images = read_process_images(fd.get());
    if (!images) return images.error();
    dir.images = std::move(*images);
    dir.has_children = next > first;
    auto parent = parent_of(fd.get());
    if (!parent) return parent.error();
    dir.fd = std::move(fd);
    fd = std::move(*parent);
    dirs_.push_back(std::move(dir));
  }
  for (auto i = static_cast<ptrdiff_t>(dirs_.size()); i-- > first;) {
    dirs_[static_cast<size_t>(i)].depth = depth++;
  }
  return {};
}

Result<bool> ImageDirs::builds_on_these(int dir_fd) const {
  std::set<std::pair<dev_t, ino_t>> visited;
  UniqueFd fd;
  for (;;) {
    auto parent = parent_of(fd ? fd.get() : dir_fd);
    if (!parent) return parent.error();
    if (!*parent) return false;
    auto id = directory_id(parent->get());
    if (!id) return id.error();
    if (find(*id) >= 0) return true;
    if (!visited.insert(*id).second) return false;
    fd = std::move(*parent);
  }
}

Result<void> ImageDirs::check_beside(const Dir& dir) const {
  UniqueFd above(openat(dir.fd.get(), "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!above) return Error::from_errno(errno, "cannot open what is above " + printable(dir.path));
  auto names = directory_names(above.get());
  if (!names) return names.error();
  for (const std::string& name : *names) {
    if (name == "." || name == "..") continue;
    UniqueFd fd(openat(above.get(), name.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd) continue;  // no directory, or one that the user has nothing to do with
    auto id = directory_id(fd.get());
    if (!id) return id.error();
    if (find(*id) >= 0) continue;
    const std::string path = describe_file(above.get(), name);
    auto builds = builds_on_these(fd.get());
    if (!builds) {
      return builds.error().wrap("cannot tell what " + path + ", which is not given, builds on");
    }
    if (!*builds) continue;
    return busy(path +
                " builds on these images and may need their pages: give it, too, or remove it");
  }
  return {};
}

Result<void> ImageDirs::check_complete() const {
  for (const Dir& dir : dirs_) {
    if (auto ok = check_beside(dir); !ok) return ok;
  }
  return {};
}

Result<void> ImageDirs::check_unused() const {
  for (const Dir& dir : dirs_) {
    auto names = directory_names(dir.fd.get());
    if (!names) return names.error();
    for (const std::string& name : *names) {
      const bool temporary = name.ends_with(".tmp");
      if (!is_image_name(temporary ? name.substr(0, name.size() - 4) : name)) continue;
      const std::string path = describe_file(dir.fd.get(), name);
      struct stat st;
      if (fstatat(dir.fd.get(), name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
        if (errno == ENOENT) continue;
        return Error::from_errno(errno, "cannot stat " + path);
      }
      if (st.st_nlink > 1 && parse_page_file_name(name).pid) {
        return busy(path +
                    " has another name (a hard link), under which it would lose pages, too: "
                    "make a copy of it there");
      }
      if (!is_in_use(dir.fd.get(), name)) continue;
      return busy(path + " is in use, by a dump or a restore: wait for its end");
    }
  }
  return {};
}

}  // namespace phos
