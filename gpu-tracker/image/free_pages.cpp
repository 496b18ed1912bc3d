// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/free_pages.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <string>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_file.h"

namespace phos {
namespace {

// [first, end) of slots or units.
using Slots = std::pair<uint64_t, uint64_t>;
using FileId = std::pair<int, int>;  // pid, GPU
using UsedSlots = std::map<FileId, std::vector<Slots>>;

void add_used(const ProcessImage& image, UsedSlots* used) {
  for (const AllocationInfo& a : image.allocations) {
    size_t packed = 0;
    for (const PageExtent& e : a.extents) {
      uint64_t slots = e.pages;
      if (is_packed(image, e)) {
        slots = 0;
        for (uint32_t i = 0; i < e.pages; i++) slots += units_of(a.packed[packed++].bytes);
      }
      const Slots range{e.slot, e.slot + slots};
      if (e.source == PageSource::kHere) (*used)[{image.pid, a.gpu}].push_back(range);
      if (e.source != PageSource::kOther) continue;
      const PagesFileRef& file = image.other_files[e.file];
      if (file.dump_id == image.dump_id) (*used)[{file.pid, file.gpu}].push_back(range);
    }
  }
}

// What lies between them.
std::vector<Slots> gaps(std::vector<Slots> used, uint64_t slots) {
  std::sort(used.begin(), used.end());
  std::vector<Slots> found;
  uint64_t next = 0;
  for (const auto& [first, end] : used) {
    if (first > next) found.emplace_back(next, first);
    next = std::max(next, end);
  }
  if (slots > next) found.emplace_back(next, slots);
  return found;
}

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

Result<void> free_in(int dir_fd, const FileId& id, const DumpId& dump, std::vector<Slots> used,
                     bool dry_run, FreedSpace* freed) {
  const std::string name = page_file_name(id.first, id.second);
  auto pages = PageFile::open(dir_fd, id.first, id.second, dump, PageIo::kCached);
  if (!pages) return pages.error();
  uint64_t size = 0;
  auto fd = open_image(dir_fd, name, dry_run ? 0 : O_RDWR, &size);
  if (!fd) return fd.error();
  const uint64_t slot_bytes = (*pages)->format().slot_bytes();
  for (const auto& [first, end] : gaps(std::move(used), (*pages)->slots())) {
    // The header's block comes before the slots.
    const auto from = static_cast<off_t>(kImagePageSize + first * slot_bytes);
    const auto bytes = static_cast<off_t>((end - first) * slot_bytes);
    const uint64_t data = data_bytes(fd->get(), from, from + bytes);
    if (data == 0) continue;
    if (!dry_run) {
      int r;
      do {
        r = fallocate(fd->get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from, bytes);
      } while (r != 0 && errno == EINTR);
      if (r != 0 && (errno == EOPNOTSUPP || errno == ENOSYS)) return {};
      if (r != 0) {
        return Error::from_errno(errno, "cannot free pages of " + describe_file(dir_fd, name));
      }
    }
    freed->bytes += data;
  }
  if (!dry_run && fsync(fd->get()) != 0) {
    return Error::from_errno(errno, "cannot sync " + describe_file(dir_fd, name));
  }
  return {};
}

// Has anybody the file open, or could it be so? A lease for writing is given for a file that nobody
// else has open.
bool is_in_use(int dir_fd, const std::string& name) {
  UniqueFd fd(openat(dir_fd, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  return !fd || fcntl(fd.get(), F_SETLEASE, F_WRLCK) != 0;
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

// Goes through the pages files of the directory: `unused` is called for those that no image refers
// to, `used` for the others.
template <typename Unused, typename Used>
Result<void> for_page_files(int dir_fd, const std::vector<ProcessImage>& images,
                            const Unused& on_unused, const Used& on_used) {
  UsedSlots used;
  for (const ProcessImage& image : images) add_used(image, &used);
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    const PageFileName parsed = parse_page_file_name(name);
    if (!parsed.pid) continue;
    auto it = used.find({parsed.pid, parsed.gpu});
    auto ok = it == used.end() ? on_unused(name) : on_used(it->first, std::move(it->second));
    if (!ok) return ok;
  }
  return {};
}

}  // namespace

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

Result<FreedSpace> free_unused_pages(int dir_fd, const std::vector<ProcessImage>& images,
                                     bool dry_run) {
  FreedSpace freed;
  auto done = for_page_files(
      dir_fd, images,
      [&](const std::string& name) { return remove(dir_fd, name, dry_run, &freed); },
      [&](const FileId& id, std::vector<Slots> used) {
        return free_in(dir_fd, id, images.front().dump_id, std::move(used), dry_run, &freed);
      });
  if (done && !dry_run && freed.files) done = sync_directory(dir_fd);
  if (!done) return done.error();
  return freed;
}

Result<FreedSpace> remove_leftovers(int dir_fd, bool dry_run) {
  auto images = read_process_images(dir_fd);
  if (!images) return images.error();
  FreedSpace freed;
  auto names = directory_names(dir_fd);
  if (!names) return names.error();
  for (const std::string& name : *names) {
    if (!name.ends_with(".tmp") || !is_image_name(name.substr(0, name.size() - 4))) continue;
    if (is_in_use(dir_fd, name)) continue;
    if (auto ok = remove(dir_fd, name, dry_run, &freed); !ok) return ok.error();
  }
  auto done = for_page_files(
      dir_fd, *images,
      [&](const std::string& name) { return remove(dir_fd, name, dry_run, &freed); },
      [](const FileId&, const std::vector<Slots>&) { return Result<void>(); });
  if (!done) return done.error();
  return freed;
}

}  // namespace phos
