// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/repack.h"

#include <cerrno>
#include <memory>
#include <utility>

#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/process_repack.h"

namespace phos {
namespace {

// The directory that processes are put on top of: what is taken from it.
enum class Onto { kKeys, kPages };

// How the pages of a process are compressed, if this is known of any that is in its directory.
Result<std::optional<CompressionChoice>> compression_of(int dir_fd, const PageChain& chain) {
  for (size_t i = 0; i < chain.image().allocations.size(); i++) {
    for (const PageRun& run : chain.runs(i)) {
      if (!run.is_stored() || chain.level(run) != 0) continue;
      const PagesFileRef& ref = chain.file(run);
      auto file = PageFile::open(dir_fd, ref.pid, ref.gpu, ref.dump_id, PageIo::kCached);
      if (!file) return file.error();
      const Compression method = (*file)->format().compression;
      return std::optional(CompressionChoice{method, method == Compression::kZstd ? 1 : 0});
    }
  }
  return std::optional<CompressionChoice>();
}

class Repacker {
 public:
  // `onto_fd`: -1: nothing.
  Repacker(int dir_fd, int to_fd, int onto_fd, Onto onto, const MakePageHasher& make_hasher,
           const RepackOptions& options)
      : dir_fd_(dir_fd),
        to_fd_(to_fd),
        onto_fd_(onto_fd),
        onto_(onto),
        make_hasher_(make_hasher),
        options_(options) {}

  Result<RepackReport> run(ImageSet set) {
    const DumpId id = set.files.dump_id;
    std::vector<ProcessRepack::From> sources;
    for (ProcessImage& image : set.processes) {
      report_.processes++;
      for (const AllocationInfo& a : image.allocations) all_ += a.hashes.size();
      const std::string who = "process " + std::to_string(image.pid);
      if (image.hash_key.empty()) {
        // No pages, and so no parent.
        auto ok = is_in_place() ? Result<void>() : write_process_image(to_fd_, image);
        if (!ok) return ok.error();
        continue;
      }
      auto source = open(std::move(image));
      if (!source) return source.error().wrap(who);
      sources.push_back(std::move(*source));
    }
    if (auto ok = repack(id, std::move(sources)); !ok) return ok.error();
    if (!is_in_place() && !set.files.files.empty()) {
      if (auto ok = write_files_image(to_fd_, set.files); !ok) return ok.error();
    }
    return report_;
  }

 private:
  bool is_in_place() const { return to_fd_ == dir_fd_; }

  Result<ProcessRepack::From> open(ProcessImage image) const {
    auto chain = PageChain::open(dir_fd_, std::move(image), PageIo::kDirect);
    if (!chain) return chain.error();
    const std::vector<uint8_t>& old_key = chain->image().hash_key;
    auto hash = make_hasher_(old_key);
    if (!hash) return hash.error();
    auto onto = open_onto(chain->image().pid);
    if (!onto) return onto.error();
    std::optional<NewKey> new_key;
    if (*onto && (*onto)->image().hash_key != old_key) {
      auto other = make_hasher_((*onto)->image().hash_key);
      if (!other) return other.error();
      new_key = NewKey{(*onto)->image().hash_key, std::move(*other)};
    }
    if (onto_ == Onto::kKeys) onto->reset();
    return ProcessRepack::From{std::move(*chain), std::move(*hash), std::move(new_key),
                               std::move(*onto)};
  }

  // Nothing: there is none for this process.
  Result<std::optional<PageChain>> open_onto(int pid) const {
    if (onto_fd_ < 0) return std::optional<PageChain>();
    auto chain = PageChain::open(onto_fd_, pid, PageIo::kDirect);
    if (!chain && chain.error().domain() == Domain::kErrno && chain.error().code() == ENOENT) {
      return std::optional<PageChain>();
    }
    if (!chain) return chain.error();
    if (chain->image().hash_key.empty()) return std::optional<PageChain>();
    return std::optional<PageChain>(std::move(*chain));
  }

  Result<void> repack(const DumpId& id, std::vector<ProcessRepack::From> sources) {
    auto how = store_options(sources);
    if (!how) return how.error();
    auto store = PageStore::create(to_fd_, id, std::move(*how));
    if (!store) return store.error();
    std::vector<std::unique_ptr<ProcessRepack>> processes;
    const ProcessRepack::To to{store->get(), to_fd_, is_in_place()};
    uint64_t before = 0;
    auto progress = [&](uint64_t pages) {
      if (options_.progress) options_.progress(before + pages, all_);
    };
    for (ProcessRepack::From& source : sources) {
      const std::string who = "process " + std::to_string(source.chain.image().pid);
      uint64_t pages = 0;
      for (const AllocationInfo& a : source.chain.image().allocations) pages += a.hashes.size();
      processes.push_back(std::make_unique<ProcessRepack>(std::move(source), to));
      if (auto ok = processes.back()->copy(options_, progress); !ok) return ok.error().wrap(who);
      before += pages;
    }
    if (auto ok = (*store)->finish(); !ok) return ok;
    report_.bytes = (*store)->statistics().bytes;
    Result<void> written;
    for (size_t i = 0; written && i < processes.size(); i++)
      written = processes[i]->write(&report_);
    // Pages files that no image refers to now.
    if (!written && is_in_place()) (void)remove_leftovers(dir_fd_);
    return written;
  }

  // As the dump's own pages are stored.
  Result<PageStoreOptions> store_options(const std::vector<ProcessRepack::From>& sources) const {
    PageStoreOptions how;
    std::optional<CompressionChoice> compression = options_.compression;
    for (const ProcessRepack::From& source : sources) {
      const ProcessImage& image = source.chain.image();
      if (!compression) {
        auto found = compression_of(dir_fd_, source.chain);
        if (!found) return found.error();
        compression = *found;
      }
      if (image.key_id == KeyId{} || how.key) continue;
      how.key = find_image_key(image.key_id);
      if (!how.key) {
        return image_error(ImageError::kBadField, "the key of the images was not given");
      }
    }
    how.compression = compression.value_or(CompressionChoice());
    return how;
  }

  const int dir_fd_, to_fd_, onto_fd_;
  const Onto onto_;
  const MakePageHasher& make_hasher_;
  const RepackOptions& options_;
  uint64_t all_ = 0;
  RepackReport report_;
};

}  // namespace

Result<RepackReport> repack_to(int dir_fd, ImageSet set, int to_fd, int parent_fd,
                               const MakePageHasher& make_hasher, const RepackOptions& options) {
  return Repacker(dir_fd, to_fd, parent_fd, Onto::kPages, make_hasher, options).run(std::move(set));
}

Result<RepackReport> squash_in_place(int dir_fd, ImageSet set, int keys_fd,
                                     const MakePageHasher& make_hasher,
                                     const RepackOptions& options) {
  return Repacker(dir_fd, dir_fd, keys_fd, Onto::kKeys, make_hasher, options).run(std::move(set));
}

Result<RepackReport> build_in_place_on(int dir_fd, ImageSet set, int parent_fd,
                                       const MakePageHasher& make_hasher,
                                       const RepackOptions& options) {
  return Repacker(dir_fd, dir_fd, parent_fd, Onto::kPages, make_hasher, options)
      .run(std::move(set));
}

}  // namespace phos
