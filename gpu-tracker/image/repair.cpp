// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/repair.h"

#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

// One process with damage.
class Patient {
 public:
  Patient(ProcessImage image, PageHasher hash) : image_(std::move(image)), hash_(std::move(hash)) {}

  void add(const PageDamage& damage) {
    const auto first = static_cast<uint32_t>(damage.offset / kImagePageSize);
    for (size_t i = 0; i < image_.allocations.size(); i++) {
      const AllocationInfo& a = image_.allocations[i];
      if (a.address != damage.address || a.hashes.empty()) continue;  // no two overlap
      for (uint32_t page = first; page < first + damage.pages; page++) {
        damaged_.emplace(i, page);
        wanted_.try_emplace(a.hashes[page]);
      }
    }
  }

  const ProcessImage& image() const { return image_; }
  uint64_t wanted() const { return wanted_.size(); }
  uint64_t found() const { return found_; }

  // Stores what the chain has of what is still wanted. `tick` is called in between.
  Result<void> take_from(const PageChain& chain, int dir_fd, PageStore* store, uint8_t* buffer,
                         const std::function<void()>& tick) {
    for (size_t i = 0; i < chain.image().allocations.size(); i++) {
      const AllocationInfo& a = chain.image().allocations[i];
      for (const PageRun& run : chain.runs(i)) {
        for (uint32_t page = run.first_page; page < run.first_page + run.pages; page++) {
          auto wanted = wanted_.find(a.hashes[page]);
          if (wanted == wanted_.end() || wanted->second || run.is_dropped()) continue;
          const PageRun one = run.part(page, 1);
          if (!chain.read(one, buffer) || hash_(buffer) != wanted->first) continue;
          wanted->second.emplace();
          found_++;
          if (!run.is_zero()) {
            auto id = put(wanted->first, dir_fd, store, buffer);
            if (!id) return id.error();
            wanted->second->page = *id;
          }
          tick();
        }
      }
    }
    return {};
  }

  // Once the store is complete. Returns how many pages have been repaired.
  Result<uint64_t> write(int dir_fd, const PageStore& store, uint8_t* buffer) const {
    uint64_t repaired = 0;
    const ProcessImage image = move_pages(
        image_, [&](size_t allocation, uint32_t page, PageSource) -> std::optional<NewPlace> {
          const SavedHash& hash = image_.allocations[allocation].hashes[page];
          if (!damaged_.contains({allocation, page}) || !wanted_.at(hash)) return {};
          repaired++;
          const auto& id = wanted_.at(hash)->page;
          return id ? NewPlace{PageSource::kHere, store.place(*id)}
                    : NewPlace{PageSource::kZero, {}};
        });
    if (repaired == 0) return repaired;
    if (auto ok = read_back(dir_fd, image, buffer); !ok) return ok.error();
    if (auto ok = write_process_image(dir_fd, image); !ok) return ok.error();
    return repaired;
  }

 private:
  Result<PageStore::PageId> put(const SavedHash& hash, int dir_fd, PageStore* store,
                                const uint8_t* page) {
    if (!file_) {
      auto number = free_page_file_number(dir_fd, image_);
      if (!number) return number.error();
      auto file = store->add_file(image_.pid, *number);
      if (!file) return file.error();
      file_ = *file;
    }
    auto claim = store->claim(*file_, store->add_key(image_.hash_key), hash, nullptr);
    if (!claim) return claim.error();
    const PageStore::NewPage one{claim->page, page};
    auto ok = claim->is_new ? store->store(*file_, {&one, 1}) : Result<void>();
    if (!ok) return ok.error();
    return claim->page;
  }

  // Does the new image have the pages, as they are on the disk?
  Result<void> read_back(int dir_fd, const ProcessImage& image, uint8_t* buffer) const {
    auto chain = PageChain::open(dir_fd, image, PageIo::kDirect);
    if (!chain) return chain.error();
    for (const auto& [allocation, page] : damaged_) {
      if (!wanted_.at(image_.allocations[allocation].hashes[page])) continue;
      if (auto ok = read_checked(*chain, allocation, page, 1, hash_, buffer); !ok) return ok;
    }
    return {};
  }

  const ProcessImage image_;
  const PageHasher hash_;
  std::set<std::pair<size_t, uint32_t>> damaged_;  // allocation, page
  struct Found {
    std::optional<PageStore::PageId> page = {};  // nothing: it is zero
  };
  std::map<SavedHash, std::optional<Found>> wanted_;
  std::optional<uint32_t> file_;  // the store's number of it
  uint64_t found_ = 0;
};

class Repair {
 public:
  Repair(int dir_fd, const std::function<void(uint64_t, uint64_t)>& progress)
      : dir_fd_(dir_fd), progress_(progress), buffer_(make_page_buffer(1)) {}

  Result<void> open(const std::vector<PageDamage>& damage, const MakePageHasher& make_hasher) {
    if (!buffer_) return Error::from_errno(ENOMEM, "64 KiB for a page");
    for (const PageDamage& one : damage) {
      auto it = patients_.find(one.pid);
      if (it == patients_.end()) {
        auto image = read_process_image(dir_fd_, one.pid);
        if (!image) return image.error();
        auto hash = make_hasher(image->hash_key);
        if (!hash) return hash.error();
        auto patient = std::make_unique<Patient>(std::move(*image), std::move(*hash));
        it = patients_.emplace(one.pid, std::move(patient)).first;
      }
      it->second->add(one);
    }
    const ProcessImage& image = patients_.begin()->second->image();
    PageStoreOptions how;
    if (image.key_id != KeyId{}) how.key = find_image_key(image.key_id);
    auto store = PageStore::create(dir_fd_, image.dump_id, std::move(how));
    if (!store) return store.error();
    store_ = std::move(*store);
    return {};
  }

  Result<void> take_from(int source_fd) {
    auto names = directory_names(source_fd);
    if (!names) return names.error();
    for (const std::string& name : *names) {
      const int pid = pid_in_name(name);
      if (!pid) continue;
      auto chain = PageChain::open(source_fd, pid, PageIo::kDirect);
      if (!chain) {
        report_.unusable.push_back(chain.error().message());
        continue;
      }
      for (auto& [unused, patient] : patients_) {
        if (chain->image().hash_key != patient->image().hash_key) continue;
        auto ok = patient->take_from(*chain, dir_fd_, store_.get(), buffer_.get(), [&] { tell(); });
        if (!ok) return ok;
      }
    }
    return {};
  }

  Result<RepairReport> finish() {
    auto ok = store_->finish();
    for (auto& [unused, patient] : patients_) {
      if (!ok) break;
      auto repaired = patient->write(dir_fd_, *store_, buffer_.get());
      if (!repaired) ok = repaired.error();
      if (repaired) report_.repaired_pages += *repaired;
    }
    if (!ok) {
      (void)remove_leftovers(dir_fd_);  // pages files that no image refers to
      return ok.error();
    }
    report_.bytes = store_->statistics().bytes;
    return report_;
  }

 private:
  void tell() const {
    if (!progress_) return;
    uint64_t found = 0, of = 0;
    for (const auto& [unused, patient] : patients_) {
      found += patient->found();
      of += patient->wanted();
    }
    progress_(found, of);
  }

  const int dir_fd_;
  const std::function<void(uint64_t, uint64_t)>& progress_;
  const PageBuffer buffer_;
  std::map<int, std::unique_ptr<Patient>> patients_;  // by pid
  std::unique_ptr<PageStore> store_;
  RepairReport report_;
};

}  // namespace

Result<RepairReport> repair_pages(int dir_fd, const std::vector<PageDamage>& damage,
                                  const std::vector<int>& sources,
                                  const MakePageHasher& make_hasher,
                                  const std::function<void(uint64_t, uint64_t)>& progress) {
  if (damage.empty()) return RepairReport();
  Repair repair(dir_fd, progress);
  if (auto ok = repair.open(damage, make_hasher); !ok) return ok.error();
  for (int source : sources) {
    if (auto ok = repair.take_from(source); !ok) return ok.error();
  }
  return repair.finish();
}

}  // namespace phos
