// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/collect.h"

#include <optional>
#include <utility>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image_dirs.h"
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/saved_index.h"
#include "gpu-tracker/image/used_pages.h"

namespace phos {
namespace {

using Keeps = CollectedLevel::Keeps;

class Collector {
 public:
  Collector(ImageDirs set, const CollectOptions& options)
      : set_(std::move(set)), options_(options), marks_(dirs().size()) {}

  Result<std::vector<CollectedLevel>> run() {
    if (auto ok = find_used(); !ok) return ok.error();
    std::vector<CollectedLevel> report(dirs().size());
    for (size_t k = dirs().size(); k-- > 0;) {
      report[k].directory = dirs()[k].path;
      report[k].stage = dirs()[k].stage();
      report[k].keeps = keeps(dirs()[k]);
      mark(k, &report[k]);
    }
    if (!options_.dry_run) {
      if (auto ok = set_.check_unused(); !ok) return ok.error();
    }
    // The newest first: a page is gone before the one that it was in the parent is.
    for (size_t k = 0; !options_.dry_run && k < dirs().size(); k++) {
      tell("writing the images of ", k);
      if (auto ok = write(k); !ok) return ok.error();
    }
    for (size_t k = 0; k < dirs().size(); k++) {
      tell("freeing pages of ", k);
      const ImageDirs::Dir& dir = dirs()[k];
      auto ok = remove_temporary(dir.fd.get(), options_.dry_run, &report[k].freed);
      if (ok && gives(dir)) {
        ok = free_pages(dir.fd.get(), dir.dump_id(), used_, options_.dry_run, &report[k].freed);
      }
      if (!ok) return ok.error();
    }
    return report;
  }

 private:
  // By process and allocation, of each page: is gone, or is to go.
  using Marks = std::vector<std::vector<std::vector<bool>>>;

  const std::vector<ImageDirs::Dir>& dirs() const { return set_.dirs(); }

  void tell(const char* what, size_t k) const {
    if (options_.progress) options_.progress(what + dirs()[k].path);
  }

  static Keeps keeps(const ImageDirs::Dir& dir) {
    return dir.stage() == DumpStage::kDump ? Keeps::kAllOfADump
           : dir.has_children              ? Keeps::kWhatIsNeeded
                                           : Keeps::kAllOfTheNewest;
  }
  static bool gives(const ImageDirs::Dir& dir) { return keeps(dir) == Keeps::kWhatIsNeeded; }

  // All pages of those that do not give any.
  Result<void> find_used() {
    for (size_t k = 0; k < dirs().size(); k++) {
      if (gives(dirs()[k])) continue;
      tell("reading ", k);
      for (const ProcessImage& image : dirs()[k].images) {
        auto chain = PageChain::open(dirs()[k].fd.get(), image, PageIo::kCached);
        if (!chain) return chain.error();
        used_.add(*chain);
      }
    }
    used_.sort();
    return {};
  }

  // What the directory builds on is marked already.
  void mark(size_t k, CollectedLevel* report) {
    const ImageDirs::Dir& dir = dirs()[k];
    for (const ProcessImage& image : dir.images) {
      auto& allocations = marks_[k].emplace_back();
      const std::optional<Above> parent = in_parent(dir, image);
      for (const AllocationInfo& a : image.allocations) {
        std::vector<bool>& marks = allocations.emplace_back(a.hashes.size());
        const std::vector<bool>* const above = marks_of(parent, image, a);
        for_each_page(image, a, [&](uint32_t page, PageSource source, const PagePlace* place) {
          if (source == PageSource::kZero) return;
          report->pages++;
          if (source == PageSource::kDropped) {
            marks[page] = true;
            report->gone++;
          } else if (gives(dir)) {
            marks[page] = place ? !used_.has(*place) && is_freed(place->file.dump_id)
                                : above && (*above)[page];
            report->dropped += marks[page];
          }
        });
      }
    }
  }

  // Do unused pages in files of this dump go?
  bool is_freed(const DumpId& id) const {
    for (const ImageDirs::Dir& dir : dirs()) {
      if (!dir.images.empty() && dir.dump_id() == id) return gives(dir);
    }
    return false;
  }

  // The same process in the parent, with its marks.
  struct Above {
    SavedIndex index;
    const ProcessImage* image;
    const std::vector<std::vector<bool>>* marks;
  };
  std::optional<Above> in_parent(const ImageDirs::Dir& dir, const ProcessImage& image) const {
    if (image.parent_dump_id == DumpId{} || dir.parent < 0) return {};
    const auto k = static_cast<size_t>(dir.parent);
    const std::vector<ProcessImage>& parents = dirs()[k].images;
    for (size_t i = 0; i < parents.size(); i++) {
      if (parents[i].pid != image.pid || parents[i].dump_id != image.parent_dump_id) continue;
      return Above{SavedIndex(parents[i]), &parents[i], &marks_[k][i]};
    }
    return {};
  }
  // Of the same allocation; null: it has no such.
  static const std::vector<bool>* marks_of(const std::optional<Above>& above,
                                           const ProcessImage& image, const AllocationInfo& a) {
    if (!above || a.hashes.empty()) return nullptr;
    const auto* there = above->index.find(gpu_uuid_of(image, a), a.address, a.size);
    if (!there) return nullptr;
    return &(*above->marks)[static_cast<size_t>(there - above->image->allocations.data())];
  }

  // Those images of the directory that lose pages.
  Result<void> write(size_t k) const {
    for (size_t i = 0; i < dirs()[k].images.size(); i++) {
      bool changed = false;
      const ProcessImage image = move_pages(
          dirs()[k].images[i],
          [&](size_t allocation, uint32_t page, PageSource source) -> std::optional<NewPlace> {
            if (!marks_[k][i][allocation][page]) return {};
            changed = changed || source != PageSource::kDropped;
            return NewPlace{PageSource::kDropped, {}};
          });
      if (!changed) continue;
      if (auto ok = write_process_image(dirs()[k].fd.get(), image); !ok) return ok;
    }
    return {};
  }

  const ImageDirs set_;
  const CollectOptions& options_;
  UsedPages used_;
  std::vector<Marks> marks_;  // by directory
};

}  // namespace

Result<std::vector<CollectedLevel>> collect_pages(const std::vector<int>& dir_fds,
                                                  const CollectOptions& options) {
  auto set = ImageDirs::open(dir_fds, options.dry_run ? nullptr : options.lock);
  if (!set) return set.error();
  if (auto ok = set->check_complete(); !ok) return ok.error();
  return Collector(std::move(*set), options).run();
}

}  // namespace phos
