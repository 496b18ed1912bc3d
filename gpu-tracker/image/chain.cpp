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
#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/saved_index.h"

namespace phos {
namespace {

// In a run that is in a parent which was not reached yet.
constexpr uint32_t kUnresolved = PageRun::kDropped - 1;

using DirectoryId = std::pair<dev_t, ino_t>;

Error broken(const std::string& what) {
  return image_error(ImageError::kBrokenChain, what);
}

// Where the packed pages of an allocation are: for each, the unit in which it begins; and for each
// extent, the index of its first page among them.
struct PackedPlaces {
  PackedPlaces(const ProcessImage& image, const AllocationInfo& a) {
    if (a.packed.empty()) return;
    for (const PageExtent& e : a.extents) {
      first.push_back(units.size());
      if (!is_packed(image, e)) continue;
      uint32_t unit = e.slot;
      for (uint32_t i = 0; i < e.pages; i++) {
        const uint32_t bytes = a.packed[units.size()].bytes;
        units.push_back(unit);
        unit += units_of(bytes);
      }
    }
  }
  std::vector<uint32_t> units;
  std::vector<size_t> first;
};

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
    if (auto ok = begin(dir_fd); !ok) return ok;
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
    return check_files(dir_fd);
  }

  Result<void> build_on(const PageChain& parent, int dir_fd) {
    if (auto ok = begin(dir_fd); !ok) return ok;
    const std::string path = describe_file(dir_fd, name());
    if (parent.image_.dump_id != chain_.image_.parent_dump_id ||
        parent.image_.hash_key != chain_.image_.hash_key) {
      return broken(path + " does not build on dump " + format_dump_id(parent.image_.dump_id));
    }
    if (auto ok = check_still_there(parent, dir_fd); !ok) return ok;
    std::vector<Adopted> adopted;
    for (const File& file : parent.files_) {
      auto number = adopt(file, path);
      if (!number) return number.error();
      adopted.push_back(*number);
    }
    if (contradiction_) return contradiction(dir_fd);
    if (auto ok = resolve_on(parent, adopted); !ok) return ok;
    chain_.levels_.insert(chain_.levels_.end(), parent.levels_.begin(), parent.levels_.end());
    return check_files(dir_fd);
  }

 private:
  // A file of another chain in this one.
  struct Adopted {
    uint32_t file;
    uint32_t first;  // where its packed pages begin among those of the file
  };
  struct Parent {
    UniqueFd dir;
    DumpId next;  // its own parent, all zeros: none
  };

  std::string name() const { return process_name(chain_.image_.pid); }

  // With the first level.
  Result<void> begin(int dir_fd) {
    const ProcessImage& image = chain_.image_;
    for (const AllocationInfo& a : image.allocations) {
      const PackedPlaces packed(image, a);
      std::vector<PageRun>& runs = chain_.runs_.emplace_back();
      for (size_t i = 0; i < a.extents.size(); i++) {
        runs.push_back(to_run(image, a, packed, i, 0, a.extents[i].pages));
      }
    }
    return add_level(dir_fd, image);
  }

  Result<void> check_files(int dir_fd) const {
    for (const File& file : chain_.files_) {
      if (file.pages) continue;
      return broken(describe_file(dir_fd, name()) + " needs pages of dump " +
                    format_dump_id(file.ref.dump_id) + " (" +
                    page_file_name(file.ref.pid, file.ref.gpu) + "), which is none of its parents");
    }
    return {};
  }

  Error contradiction(int dir_fd) const {
    return image_error(ImageError::kBadField,
                       describe_file(dir_fd, name()) +
                           " and another image say different things of how a file's pages are "
                           "stored");
  }

  // What is open may have been removed since, or have been moved, perhaps by another dump: it can
  // be read all the same, but not by a restore.
  Result<void> check_still_there(const PageChain& parent, int dir_fd) const {
    auto dir = open_parent(dir_fd);
    if (!dir) return dir.error();
    const std::string gone = describe_file(dir_fd, name()) + " needs ";
    struct stat st;
    if (fstatat(dir->get(), name().c_str(), &st, AT_SYMLINK_NOFOLLOW) != 0) {
      return broken(gone + describe_file(dir->get(), name()) + ", which has been removed");
    }
    for (const File& file : parent.files_) {
      const std::string file_name = page_file_name(file.ref.pid, file.ref.gpu);
      if (!file.pages->is_named() ||
          (file.level == 0 && !file.pages->is_named_in(dir->get(), file_name))) {
        return broken(gone + file.pages->path() + ", which has been removed or replaced");
      }
    }
    return {};
  }

  // `path`: of the image, for the message.
  Result<Adopted> adopt(const File& from, const std::string& path) {
    const uint32_t number = file_number(from.ref);
    File& to = chain_.files_[number];
    const auto first = static_cast<uint32_t>(to.stored.size());
    to.stored.insert(to.stored.end(), from.stored.begin(), from.stored.end());
    to.slots = std::max(to.slots, from.slots);
    to.level = from.level + 1;
    to.pages = from.pages;
    to.codec = from.codec;
    if (auto ok = check_slots(to, path); !ok) return ok.error();
    return Adopted{number, first};
  }

  // The number of a pages file in this chain.
  uint32_t file_number(const PagesFileRef& ref) {
    auto [it, is_new] = numbers_.try_emplace({ref.dump_id, ref.pid, ref.gpu},
                                             static_cast<uint32_t>(chain_.files_.size()));
    if (is_new) chain_.files_.emplace_back().ref = ref;
    contradiction_ = contradiction_ || chain_.files_[it->second].ref.layout != ref.layout;
    return it->second;
  }

  // Pages [skip, skip + count) of extent `i` of an image's allocation.
  PageRun to_run(const ProcessImage& image, const AllocationInfo& a, const PackedPlaces& packed,
                 size_t i, uint32_t skip, uint32_t count) {
    const PageExtent& e = a.extents[i];
    PageRun run{e.first_page + skip, count, kUnresolved, 0};
    if (e.source == PageSource::kParent) return run;
    if (e.source == PageSource::kZero || e.source == PageSource::kDropped) {
      run.file = e.source == PageSource::kZero ? PageRun::kZero : PageRun::kDropped;
      return run;
    }
    run.file = file_number(e.source == PageSource::kOther ? image.other_files[e.file]
                                                          : own_pages_file(image, a));
    File& file = chain_.files_[run.file];
    if (!is_packed(image, e)) {
      run.place = e.slot + skip;
      file.slots = std::max(file.slots, uint64_t{run.place} + count);
      return run;
    }
    run.place = static_cast<uint32_t>(file.stored.size());
    for (size_t k = packed.first[i] + skip; k < packed.first[i] + skip + count; k++) {
      file.stored.push_back({packed.units[k], a.packed[k]});
      file.slots = std::max(file.slots, uint64_t{packed.units[k]} + units_of(a.packed[k].bytes));
    }
    return run;
  }

  // Opens the pages files of a level: those that `image` has, and those that others have and that
  // were found to be needed.
  Result<void> add_level(int dir_fd, const ProcessImage& image) {
    struct stat st;
    if (fstat(dir_fd, &st) != 0) {
      return Error::from_errno(errno, "cannot stat " + describe_file(dir_fd, "."));
    }
    if (!visited_.insert({st.st_dev, st.st_ino}).second) {
      return broken("its parent links lead in a circle, back to " +
                    printable(directory_path(dir_fd)));
    }
    // What is not needed must be there all the same: whoever made the image may not have.
    for (const AllocationInfo& a : image.allocations) {
      auto how = a.packed.begin();
      for (const PageExtent& e : a.extents) {
        uint64_t end = uint64_t{e.slot} + e.pages;
        if (is_packed(image, e)) {
          end = e.slot;
          for (uint32_t i = 0; i < e.pages; i++) end += units_of((how++)->bytes);
        }
        if (e.source != PageSource::kHere) continue;
        File& file = chain_.files_[file_number(own_pages_file(image, a))];
        file.slots = std::max(file.slots, end);
      }
    }
    if (contradiction_) return contradiction(dir_fd);
    std::optional<SecretKey> key;
    for (File& file : chain_.files_) {
      if (file.ref.dump_id != image.dump_id || file.pages) continue;
      if (file.ref.layout.sealed && !key) {
        auto found = pages_key(dir_fd, image);
        if (!found) return found.error();
        key = *found;
      }
      file.level = chain_.levels_.size();
      if (auto ok = open_pages(dir_fd, key, &file); !ok) return ok;
    }
    chain_.levels_.push_back({directory_path(dir_fd), image.dump_id, image.stage, image.created_us,
                              count_pages(image), st.st_mode, image.key_id});
    return {};
  }

  Result<SecretKey> pages_key(int dir_fd, const ProcessImage& image) const {
    auto key = find_image_key(image.key_id);
    if (!key) {
      return image_error(
          ImageError::kBadField,
          describe_file(dir_fd, name()) + " has encrypted pages, but does not say with which key");
    }
    auto keys = key->derive(image.dump_id);
    if (!keys) return keys.error();
    return keys->pages;
  }

  Result<void> open_pages(int dir_fd, const std::optional<SecretKey>& key, File* file) {
    const PagesFileRef& ref = file->ref;
    auto pages = PageFile::open(dir_fd, ref.pid, ref.gpu, ref.dump_id, io_);
    const std::string refers = describe_file(dir_fd, name()) + " refers to ";
    const std::string file_name = page_file_name(ref.pid, ref.gpu);
    if (!pages && pages.error().domain() == Domain::kErrno && pages.error().code() == ENOENT) {
      return image_error(ImageError::kIncomplete,
                         refers + "pages in " + file_name +
                             ", which is missing: copy it from where it was dumped");
    }
    if (!pages) return pages.error();
    file->pages = std::move(*pages);
    const PageFileFormat& format = file->pages->format();
    if (format.layout != ref.layout) {
      return image_error(ImageError::kBadField,
                         refers + file_name + ", whose pages are stored in another way");
    }
    if (auto ok = check_slots(*file, describe_file(dir_fd, name())); !ok) return ok;
    if (format.layout.packed) {
      file->codec.emplace(CompressionChoice{format.compression},
                          ref.layout.sealed ? key : std::nullopt);
    }
    return {};
  }

  // `path`: of the image that says which there are.
  static Result<void> check_slots(const File& file, const std::string& path) {
    if (file.pages->slots() >= file.slots) return {};
    return image_error(ImageError::kIncomplete,
                       path + " refers to slot " + std::to_string(file.slots - 1) + " of " +
                           page_file_name(file.ref.pid, file.ref.gpu) + ", which has " +
                           std::to_string(file.pages->slots()) + " slots");
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
    if (auto ok = resolve(*image, where); !ok) return ok.error();
    if (auto ok = add_level(dir->get(), *image); !ok) return ok.error();
    return Parent{std::move(*dir), image->parent_dump_id};
  }

  // Pages that were not found so far are in `parent`, or it says where to go on.
  Result<void> resolve(const ProcessImage& parent, const std::string& where) {
    return resolve(parent, where, [&](const AllocationInfo& from, const auto& run) {
      const PackedPlaces packed(parent, from);
      return run(from.extents, [&](size_t i, uint32_t page, uint32_t count) {
        return to_run(parent, from, packed, i, page - from.extents[i].first_page, count);
      });
    });
  }

  // The same where it is known already.
  Result<void> resolve_on(const PageChain& parent, const std::vector<Adopted>& adopted) {
    const ProcessImage& image = parent.image_;
    return resolve(image, printable(parent.levels_.front().directory),
                   [&](const AllocationInfo& from, const auto& run) {
                     const auto& runs =
                         parent.runs_[static_cast<size_t>(&from - image.allocations.data())];
                     return run(runs, [&](size_t i, uint32_t page, uint32_t count) {
                       PageRun piece = runs[i].part(page, count);
                       if (!piece.is_stored()) return piece;
                       if (!parent.files_[piece.file].stored.empty())
                         piece.place += adopted[piece.file].first;
                       piece.file = adopted[piece.file].file;
                       return piece;
                     });
                   });
  }

  // `with`: calls what it is given with the parts in which the parent has an allocation, and with
  // what makes a run of pages of one of them.
  template <typename With>
  Result<void> resolve(const ProcessImage& parent, const std::string& where, const With& with) {
    const ProcessImage& image = chain_.image_;
    const SavedIndex index(parent);
    for (size_t i = 0; i < image.allocations.size(); i++) {
      std::vector<PageRun>& runs = chain_.runs_[i];
      auto is_open = [](const PageRun& run) { return run.file == kUnresolved; };
      if (std::none_of(runs.begin(), runs.end(), is_open)) continue;
      const AllocationInfo& a = image.allocations[i];
      const AllocationInfo* from = index.find(gpu_uuid_of(image, a), a.address, a.size);
      if (!from) {
        return broken(describe(a) + " has pages in its parent, but " + where +
                      " has none of that memory");
      }
      std::vector<PageRun> found;
      auto ok = with(*from, [&](const auto& parts, const auto& make_run) -> Result<void> {
        for (const PageRun& run : runs) {
          if (!is_open(run)) {
            found.push_back(run);
            continue;
          }
          auto done = resolve_run(run, a, *from, parts, make_run, where, &found);
          if (!done) return done;
        }
        return {};
      });
      if (!ok) return ok;
      runs = std::move(found);
    }
    return {};
  }

  template <typename Parts, typename MakeRun>
  Result<void> resolve_run(const PageRun& run, const AllocationInfo& a, const AllocationInfo& from,
                           const Parts& parts, const MakeRun& make_run, const std::string& where,
                           std::vector<PageRun>* found) {
    // The last part that begins at or before the run; they have no gaps.
    auto part = std::upper_bound(parts.begin(), parts.end(), run.first_page,
                                 [](uint32_t page, const auto& p) { return page < p.first_page; });
    --part;
    for (uint32_t done = 0; done < run.pages; ++part) {
      const uint32_t page = run.first_page + done;
      const uint32_t left = part->pages - (page - part->first_page);
      const PageRun piece = make_run(static_cast<size_t>(part - parts.begin()), page,
                                     std::min(left, run.pages - done));
      if (piece.is_dropped()) {
        return broken(describe(a) + " takes page " + std::to_string(page) +
                      " from its parent, but `phos gc` has dropped it from " + where);
      }
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
  size_t depth_ = 0;            // of the level at hand
  bool contradiction_ = false;  // two images say different things of a file
  std::set<DirectoryId> visited_;
  std::map<std::tuple<DumpId, int, int>, uint32_t> numbers_;  // of files: dump, pid, GPU
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

Result<PageChain> PageChain::open_on(const PageChain& parent, int dir_fd, ProcessImage image,
                                     PageIo io) {
  PageChain chain;
  chain.image_ = std::move(image);
  if (auto ok = Builder(chain, io).build_on(parent, dir_fd); !ok) return ok.error();
  return chain;
}

}  // namespace phos
