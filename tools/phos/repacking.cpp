// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/repacking.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "gpu-tracker/image/free_pages.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/interrupt.h"

namespace phos::cli {

uint64_t ImagesDir::criu_pages_in_parents() const {
  uint64_t pages = 0;
  for (const CriuPagemap& map : pagemaps) pages += map.parent_pages;
  return pages;
}

Result<ImagesDir> open_images(const std::string& path, Access access) {
  auto fd = open_existing(path);
  if (!fd) return fd.error();
  if (access == Access::kChange) {
    if (auto ok = lock_directory(fd->get(), path); !ok) return ok.error();
  }
  ImagesDir dir;
  dir.path = path;
  dir.fd = std::move(*fd);
  auto set = read_image_set(dir.fd.get());
  if (!set) return set.error();
  dir.set = std::move(*set);
  const auto& processes = dir.set.processes;
  if (processes.empty() || processes.front().stage == DumpStage::kDump) {
    if (auto ok = check_inventory(dir.fd.get(), path); !ok) return ok.error();
  }
  auto pagemaps = list_criu_pagemaps(dir.fd.get(), path);
  if (!pagemaps) return pagemaps.error();
  dir.pagemaps = std::move(*pagemaps);
  return dir;
}

Repacking::Repacking(const std::string& what, unsigned jobs,
                     const std::optional<CompressionChoice>& compression)
    : what_(what) {
  options_.compression = compression;
  options_.jobs = jobs;
  options_.check = check_interrupted;
  options_.progress = [this](uint64_t pages, uint64_t of) {
    line_.draw(what_ + ": " + format_bytes(pages * kImagePageSize) + " of " +
               format_bytes(of * kImagePageSize) + " of GPU memory");
  };
}

Result<void> Repacking::tick(uint64_t bytes) {
  criu_bytes_ += bytes;
  line_.draw(what_ + ": " + format_bytes(criu_bytes_) + " of CRIU's images");
  return check_interrupted();
}

Result<void> Repacking::copy_others(const ImagesDir& from, const NewDirectory& to) {
  auto names = list_directory(from.fd.get(), from.path);
  if (!names) return names.error();
  const CopyTick tick = [this](uint64_t bytes) { return this->tick(bytes); };
  std::vector<std::string> folded;
  for (const CriuPagemap& map : from.pagemaps) {
    if (map.parent_pages == 0) continue;
    auto ok =
        fold_criu_pagemap(from.fd.get(), from.path, map, to.fd(), to.path(), map.pages_id, tick);
    if (!ok) return ok;
    folded.push_back(map.name);
    folded.push_back(criu_pages_name(map.pages_id));
  }
  for (const std::string& name : *names) {
    if (is_image_name(name) || name == "parent" || name.ends_with(".tmp") ||
        std::find(folded.begin(), folded.end(), name) != folded.end()) {
      continue;
    }
    const std::string file = from.path + "/" + name;
    struct stat st;
    if (fstatat(from.fd.get(), name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
      return Error::from_errno(errno, "cannot stat " + file);
    }
    if (!S_ISREG(st.st_mode)) {
      fprintf(stderr, "phos: %s is not a regular file, and is not copied\n", file.c_str());
      continue;
    }
    auto ok = copy_file(from.fd.get(), name, file, to.fd(), to.path() + "/" + name, tick);
    if (!ok) return ok;
  }
  return {};
}

Result<void> Repacking::fold_criu_memory(ImagesDir* dir) {
  const CopyTick tick = [this](uint64_t bytes) { return this->tick(bytes); };
  uint32_t next = 0;  // a number that no pagemap names
  for (const CriuPagemap& map : dir->pagemaps) next = std::max(next, map.pages_id + 1);
  for (CriuPagemap& map : dir->pagemaps) {
    if (map.parent_pages == 0) continue;
    const int fd = dir->fd.get();
    if (auto ok = fold_criu_pagemap(fd, dir->path, map, fd, dir->path, next, tick); !ok) return ok;
    map.parent_pages = 0;
    map.pages_id = next++;
  }
  return remove_unused_criu_pages(dir->fd.get(), dir->path, dir->pagemaps);
}

}  // namespace phos::cli
