// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/free_pages.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/image/used_pages.h"

namespace phos {
namespace {

// Bytes of [first, end) that take disk space.
uint64_t data_bytes(int fd, off_t first, off_t end) {
  uint64_t bytes = 0;
  while (first < end) {
    const off_t data = lseek(fd, first, SEEK_DATA);
    if (data < 0 || data >= end) break;
    const off_t hole = lseek(fd, data, SEEK_HOLE);
    if (hole < 0) break;
    bytes += static_cast<uint64_t>(std::min(hole, end) - data);
    first = hole;
  }
  return bytes;
}

// False: errno says why not.
bool punch_hole(int fd, off_t first, off_t bytes) {
  int r;
  do {
    r = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first, bytes);
  } while (r != 0 && errno == EINTR);
  return r == 0;
}

// Makes holes of what is not used in a pages file.
Result<void> free_in(int dir_fd, const PageFileName& file, const DumpId& dump,
                     const UsedPages& used, bool dry_run, FreedSpace* freed) {
  const std::string name = page_file_name(file.pid, file.gpu);
  auto pages = PageFile::open(dir_fd, file.pid, file.gpu, dump, PageIo::kCached);
  if (!pages) return pages.error();
  uint64_t size = 0;
  auto fd = open_image(dir_fd, name, dry_run ? 0 : O_RDWR, &size);
  if (!fd) return fd.error();
  const uint64_t slot_bytes = (*pages)->format().slot_bytes();
  for (const auto& [first, end] : used.unused(dump, file.pid, file.gpu, (*pages)->slots())) {
    // The header's block comes before the slots.
    const auto from = static_cast<off_t>(kImagePageSize + first * slot_bytes);
    const auto bytes = static_cast<off_t>((end - first) * slot_bytes);
    const uint64_t data = data_bytes(fd->get(), from, from + bytes);
    if (data == 0) continue;
    const bool punched = dry_run || punch_hole(fd->get(), from, bytes);
    if (!punched && (errno == EOPNOTSUPP || errno == ENOSYS)) return {};
    if (!punched) {
      return Error::from_errno(errno, "cannot free pages of " + describe_file(dir_fd, name));
    }
    freed->bytes += data;
  }
  if (!dry_run && fsync(fd->get()) != 0) {
    return Error::from_errno(errno, "cannot sync " + describe_file(dir_fd, name));
  }
  return {};
}

Result<void> remove(int dir_fd, const std::string& name, bool dry_run, FreedSpace* freed) {
  struct stat st;
  const bool gone = fstatat(dir_fd, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0 ||
                    (!dry_run && unlinkat(dir_fd, name.c_str(), 0) != 0);
  if (gone && errno == ENOENT) return {};
  if (gone) return Error::from_errno(errno, "cannot remove " + describe_file(dir_fd, name));
  freed->files++;
  freed->bytes += static_cast<uint64_t>(st.st_blocks) * 512;
  return {};
}

UsedPages used_by(const std::vector<ProcessImage>& images) {
  UsedPages used;
  for (const ProcessImage& image : images) used.add(image);
  used.sort();
  return used;
}

}  // namespace

Result<int> free_page_file_number(int dir_fd, const ProcessImage& image) {
  for (auto number = static_cast<int>(image.gpus.size());; number++) {
    const std::string name = page_file_name(image.pid, number);
    if (faccessat(dir_fd, name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0) continue;
    if (errno == ENOENT) return number;
    return Error::from_errno(errno, "cannot look for " + describe_file(dir_fd, name));
  }
}

Result<std::vector<ProcessImage>> read_process_images(int dir_fd) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  std::vector<ProcessImage> images;
  for (const std::string& name : *names) {
    const int pid = pid_in_name(name);
    if (!pid) continue;
    auto image = read_process_image(dir_fd, pid);
    if (!image) return image.error();
    if (!images.empty() && images.front().dump_id != image->dump_id) {
      return image_error(ImageError::kMixedDumps, "images of two different dumps are mixed in " +
                                                      describe_file(dir_fd, "."));
    }
    images.push_back(std::move(*image));
  }
  return images;
}

Result<void> free_pages(int dir_fd, const DumpId& dump, const UsedPages& used, bool dry_run,
                        FreedSpace* freed) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    const PageFileName file = parse_page_file_name(name);
    if (!file.pid) continue;
    auto ok = used.has(dump, file.pid, file.gpu) ? free_in(dir_fd, file, dump, used, dry_run, freed)
                                                 : remove(dir_fd, name, dry_run, freed);
    if (!ok) return ok;
  }
  return dry_run || freed->files == 0 ? Result<void>() : sync_directory(dir_fd);
}

Result<void> remove_temporary(int dir_fd, bool dry_run, FreedSpace* freed) {
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    if (!name.ends_with(".tmp") || !is_image_name(name.substr(0, name.size() - 4))) continue;
    if (is_in_use(dir_fd, name)) continue;
    if (auto ok = remove(dir_fd, name, dry_run, freed); !ok) return ok;
  }
  return {};
}

Result<FreedSpace> free_unused_pages(int dir_fd) {
  auto images = read_process_images(dir_fd);
  if (!images) return images.error();
  FreedSpace freed;
  if (images->empty()) return freed;
  auto done = free_pages(dir_fd, images->front().dump_id, used_by(*images), false, &freed);
  if (!done) return done.error();
  return freed;
}

Result<FreedSpace> remove_leftovers(int dir_fd) {
  auto images = read_process_images(dir_fd);
  if (!images) return images.error();
  FreedSpace freed;
  if (auto ok = remove_temporary(dir_fd, false, &freed); !ok) return ok.error();
  if (images->empty()) return freed;
  const UsedPages used = used_by(*images);
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    const PageFileName file = parse_page_file_name(name);
    if (!file.pid || used.has(images->front().dump_id, file.pid, file.gpu)) continue;
    if (auto ok = remove(dir_fd, name, false, &freed); !ok) return ok.error();
  }
  return freed;
}

}  // namespace phos
