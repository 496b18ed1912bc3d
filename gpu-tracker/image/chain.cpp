// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/chain.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <set>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/saved_index.h"

namespace phos {
namespace {

// In a run whose level is not known yet.
constexpr uint16_t kUnresolved = PageRun::kZero - 1;
static_assert(kMaxChainLevels < kUnresolved);

using DirectoryId = std::pair<dev_t, ino_t>;

Error broken(const std::string& what) {
  return image_error(ImageError::kBrokenChain, what);
}

PageRun to_run(const PageExtent& e, uint16_t level, int gpu) {
  PageRun run{e.first_page, e.pages, e.slot, level, static_cast<uint16_t>(gpu)};
  if (e.source == PageSource::kHere) return run;
  run.level = e.source == PageSource::kZero ? PageRun::kZero : kUnresolved;
  run.gpu = 0;
  return run;
}

}  // namespace

Result<UniqueFd> open_parent(int dir_fd) {
  const std::string path = describe_file(dir_fd, kParentName);
  char target[PATH_MAX];
  ssize_t n = readlinkat(dir_fd, kParentName, target, sizeof target);
  std::string name = n > 0 ? std::string(target, static_cast<size_t>(n)) : kParentName;
  // EINVAL: no link.
  if (n < 0 && errno != EINVAL) return Error::from_errno(errno, "cannot read the link " + path);
  if (name[0] == '/') {
    return image_error(ImageError::kUntrusted,
                       path + " is a link to the absolute path " + printable(name) +
                           ", which may be another directory on another machine: make it relative "
                           "(criu: --prev-images-dir ../NAME)");
  }
  // The name that was read, not the link once more: it may be another one by now.
  UniqueFd fd(openat(dir_fd, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) {
    // ENOENT is for the absent name alone.
    const int code = errno == ENOENT ? ENOTDIR : errno;
    return Error(Domain::kErrno, code,
                 path + " cannot be followed: " + printable(name) + ": " + strerror(errno));
  }
  return fd;
}

// One walk down a chain. Only the first image and the one of the current level are in memory.
class PageChain::Builder {
 public:
  Builder(PageChain& chain, PageIo io) : chain_(chain), io_(io) {}

  Result<void> build(int dir_fd) {
    if (auto ok = add_level(dir_fd, chain_.image_); !ok) return ok;
    for (const AllocationInfo& a : chain_.image_.allocations) {
      std::vector<PageRun>& runs = chain_.runs_.emplace_back();
      for (const PageExtent& e : a.extents) runs.push_back(to_run(e, 0, a.gpu));
    }
    DumpId wanted = chain_.image_.parent_dump_id;
    UniqueFd dir;
    while (wanted != DumpId{}) {
      auto parent = add_parent(dir ? dir.get() : dir_fd, wanted);
      if (!parent) {
        return parent.error().wrap("the chain of " + describe_file(dir_fd, name()) +
                                   " is broken at level " + std::to_string(depth_));
      }
      dir = std::move(parent->dir);
      wanted = parent->next;
    }
    return {};
  }

 private:
  struct Parent {
    UniqueFd dir;
    DumpId next;  // its own parent, all zeros: none
  };

  std::string name() const { return process_name(chain_.image_.pid); }

  // Opens the pages files that `image` refers to.
  Result<void> add_level(int dir_fd, const ProcessImage& image) {
    struct stat st;
    if (fstat(dir_fd, &st) != 0) {
      return Error::from_errno(errno, "cannot stat " + describe_file(dir_fd, "."));
    }
    if (!visited_.insert({st.st_dev, st.st_ino}).second) {
      return broken("its parent links lead in a circle, back to " +
                    printable(directory_path(dir_fd)));
    }
    std::vector<uint64_t> slots(image.gpus.size());
    for (const AllocationInfo& a : image.allocations) {
      for (const PageExtent& e : a.extents) {
        if (e.source != PageSource::kHere) continue;
        uint64_t& needed = slots[static_cast<size_t>(a.gpu)];
        needed = std::max(needed, uint64_t{e.slot} + e.pages);
      }
    }
    auto& files = chain_.files_.emplace_back(image.gpus.size());
    for (size_t gpu = 0; gpu < slots.size(); gpu++) {
      if (slots[gpu] == 0) continue;
      auto file = open_pages(dir_fd, image, static_cast<int>(gpu), slots[gpu]);
      if (!file) return file.error();
      files[gpu] = std::move(*file);
    }
    chain_.levels_.push_back({directory_path(dir_fd), image.dump_id, image.stage, image.created_us,
                              count_pages(image), st.st_mode});
    return {};
  }

  Result<std::unique_ptr<PageFile>> open_pages(int dir_fd, const ProcessImage& image, int gpu,
                                               uint64_t slots) {
    auto file = PageFile::open(dir_fd, image.pid, gpu, image.dump_id, io_);
    if (!file && file.error().domain() == Domain::kErrno && file.error().code() == ENOENT) {
      return image_error(ImageError::kIncomplete,
                         describe_file(dir_fd, name()) + " refers to pages in " +
                             page_file_name(image.pid, gpu) +
                             ", which is missing: copy it from where it was dumped");
    }
    if (file && (*file)->slots() < slots) {
      return image_error(ImageError::kIncomplete,
                         describe_file(dir_fd, name()) + " refers to slot " +
                             std::to_string(slots - 1) + " of " + page_file_name(image.pid, gpu) +
                             ", which has " + std::to_string((*file)->slots()) + " pages");
    }
    return file;
  }

  Result<Parent> add_parent(int child_fd, const DumpId& wanted) {
    depth_++;
    const std::string need = describe_file(child_fd, name()) + " needs pages of parent dump " +
                             format_dump_id(wanted) + ", but ";
    if (chain_.levels_.size() >= kMaxChainLevels) {
      return broken("it has more than " + std::to_string(kMaxChainLevels) + " directories");
    }
    auto dir = open_parent(child_fd);
    if (!dir && dir.error().domain() == Domain::kErrno && dir.error().code() == ENOENT) {
      return broken(need +
                    "there is no link `parent` beside it: make it lead to the directory "
                    "with that dump");
    }
    if (!dir) return dir.error();
    auto image = read_process_image(dir->get(), chain_.image_.pid);
    if (!image && image.error().domain() == Domain::kErrno && image.error().code() == ENOENT) {
      return broken(need + describe_file(dir->get(), name()) +
                    " does not exist: copy the whole parent directory");
    }
    if (!image) return image.error();
    const std::string where = printable(directory_path(dir->get()));
    if (image->dump_id != wanted) {
      return broken(need + where + " holds dump " + format_dump_id(image->dump_id) +
                    ": the parent was dumped again, or the link `parent` leads to another one");
    }
    if (image->hash_key != chain_.image_.hash_key) {
      return broken(need + "the hashes in " + where + " were made with another key");
    }
    if (auto ok = add_level(dir->get(), *image); !ok) return ok.error();
    if (auto ok = resolve(*image, where); !ok) return ok.error();
    return Parent{std::move(*dir), image->parent_dump_id};
  }

  // Pages that were not found so far are in `parent`, or it says where to go on.
  Result<void> resolve(const ProcessImage& parent, const std::string& where) {
    const ProcessImage& image = chain_.image_;
    const SavedIndex index(parent);
    for (size_t i = 0; i < image.allocations.size(); i++) {
      std::vector<PageRun>& runs = chain_.runs_[i];
      auto is_open = [](const PageRun& run) { return run.level == kUnresolved; };
      if (std::none_of(runs.begin(), runs.end(), is_open)) continue;
      const AllocationInfo& a = image.allocations[i];
      const AllocationInfo* from =
          index.find(image.gpus[static_cast<size_t>(a.gpu)].uuid, a.address, a.size);
      if (!from) {
        return broken(describe(a) + " has pages in its parent, but " + where +
                      " has none of that memory");
      }
      std::vector<PageRun> found;
      for (const PageRun& run : runs) {
        if (!is_open(run)) {
          found.push_back(run);
          continue;
        }
        if (auto ok = resolve_run(run, a, *from, where, &found); !ok) return ok;
      }
      runs = std::move(found);
    }
    return {};
  }

  Result<void> resolve_run(const PageRun& run, const AllocationInfo& a, const AllocationInfo& from,
                           const std::string& where, std::vector<PageRun>* found) {
    // The last extent that begins at or before the run; they have no gaps.
    auto extent =
        std::upper_bound(from.extents.begin(), from.extents.end(), run.first_page,
                         [](uint32_t page, const auto& e) { return page < e.first_page; });
    --extent;
    for (uint32_t done = 0; done < run.pages; ++extent) {
      const uint32_t page = run.first_page + done;
      const uint32_t skip = page - extent->first_page;
      PageRun piece = to_run(*extent, static_cast<uint16_t>(depth_), from.gpu);
      piece.first_page = page;
      piece.pages = std::min(extent->pages - skip, run.pages - done);
      if (extent->source == PageSource::kHere) piece.slot += skip;
      auto begin = a.hashes.begin() + page, end = begin + piece.pages;
      auto differs = std::mismatch(begin, end, from.hashes.begin() + page).first;
      if (differs != end) {
        return broken(describe(a) + " takes page " + std::to_string(differs - a.hashes.begin()) +
                      " from its parent, but " + where + " has another page there");
      }
      found->push_back(piece);
      done += piece.pages;
    }
    return {};
  }

  std::string describe(const AllocationInfo& a) const {
    char text[40];
    snprintf(text, sizeof text, "the allocation at 0x%llx",
             static_cast<unsigned long long>(a.address));
    return text;
  }

  PageChain& chain_;
  PageIo io_;
  size_t depth_ = 0;  // of the level at hand
  std::set<DirectoryId> visited_;
};

Result<PageChain> PageChain::open(int dir_fd, int pid, PageIo io) {
  auto image = read_process_image(dir_fd, pid);
  if (!image) return image.error();
  return open(dir_fd, std::move(*image), io);
}

Result<PageChain> PageChain::open(int dir_fd, ProcessImage image, PageIo io) {
  PageChain chain;
  chain.image_ = std::move(image);
  if (auto ok = Builder(chain, io).build(dir_fd); !ok) return ok.error();
  return chain;
}

std::optional<PageRun> PageChain::locate(size_t allocation, uint64_t page) const {
  const std::vector<PageRun>& runs = runs_[allocation];
  if (runs.empty() || page >= uint64_t{runs.back().first_page} + runs.back().pages) return {};
  auto run = std::upper_bound(runs.begin(), runs.end(), page,
                              [](uint64_t p, const PageRun& r) { return p < r.first_page; });
  PageRun one = *--run;
  if (one.level != PageRun::kZero) one.slot += static_cast<uint32_t>(page - one.first_page);
  one.first_page = static_cast<uint32_t>(page);
  one.pages = 1;
  return one;
}

Result<void> PageChain::read(const PageRun& run, void* data) const {
  if (run.level == PageRun::kZero) {
    memset(data, 0, uint64_t{run.pages} * kImagePageSize);
    return {};
  }
  return files_[run.level][run.gpu]->read(run.slot, data, run.pages);
}

Result<void> PageChain::read_page(size_t allocation, uint64_t page, void* data) const {
  auto run = locate(allocation, page);
  if (run) return read(*run, data);
  return image_error(ImageError::kIncomplete, process_name(image_.pid) + " has no page " +
                                                  std::to_string(page) + " of allocation " +
                                                  std::to_string(allocation));
}

std::string PageChain::describe(const PageRun& run) const {
  if (run.level == PageRun::kZero) return "recorded as zero";
  return files_[run.level][run.gpu]->path() + ", slot " + std::to_string(run.slot);
}

}  // namespace phos
