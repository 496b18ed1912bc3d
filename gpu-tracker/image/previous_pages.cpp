// SPDX-License-Identifier: GPL-2.0-only
// A chain as a dump that builds on it sees it.
#include <fcntl.h>
#include <sys/file.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <utility>
#include <vector>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/saved_index.h"

namespace phos {

namespace {

// Keeps `phos gc`, `squash` and `rebase`, which lock what they change (flock), away from pages that
// a new dump is about to refer to. Where directories cannot be locked, nobody is kept away.
Result<UniqueFd> share_directory(int dir_fd) {
  UniqueFd fd(openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Error::from_errno(errno, "opening " + describe_file(dir_fd, "."));
  if (flock(fd.get(), LOCK_SH | LOCK_NB) == 0 || errno != EWOULDBLOCK) return fd;
  return Error(Domain::kUsage, EBUSY,
               printable(directory_path(dir_fd)) + " is being changed by another phos command");
}

}  // namespace

struct PreviousPages::State {
  State(PageChain previous, UniqueFd shared)
      : lock(std::move(shared)), chain(std::move(previous)), index(chain.image()) {
    const auto& all = chain.image().allocations;
    for (size_t i = 0; i < all.size(); i++) {
      for (const PageRun& run : chain.runs(i)) {
        if (!run.is_stored()) continue;
        for (uint32_t page = run.first_page; page < run.first_page + run.pages; page++) {
          places.emplace_back(all[i].hashes[page], run.part(page, 1));
        }
      }
    }
    std::sort(places.begin(), places.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
  }

  UniqueFd lock;
  PageChain chain;
  SavedIndex index;                                   // of its image
  std::vector<std::pair<SavedHash, PageRun>> places;  // by hash
};

PreviousPages::PreviousPages(std::unique_ptr<State> state) : state_(std::move(state)) {}
PreviousPages::PreviousPages(PreviousPages&&) noexcept = default;
PreviousPages& PreviousPages::operator=(PreviousPages&&) noexcept = default;
PreviousPages::~PreviousPages() = default;

Result<std::optional<PreviousPages>> PreviousPages::open(int dir_fd, int pid) {
  auto lock = share_directory(dir_fd);
  if (!lock) return lock.error();
  auto image = read_process_image(dir_fd, pid);
  if (!image) {
    const Error& error = image.error();
    bool absent = error.domain() == Domain::kErrno && error.code() == ENOENT;
    return absent ? Result<std::optional<PreviousPages>>(std::nullopt) : error;
  }
  if (image->hash_key.empty()) return std::optional<PreviousPages>();
  auto chain = PageChain::open(dir_fd, std::move(*image), PageIo::kDirect);
  if (!chain) return chain.error();
  for (const ChainLevel& level : chain->levels()) {
    auto ok = check_directory_mode(level.directory_mode, printable(level.directory));
    if (!ok) return ok.error();
  }
  if (chain->levels().size() >= kMaxChainLevels) {
    return image_error(ImageError::kBrokenChain,
                       "the chain of " + describe_file(dir_fd, process_name(pid)) + " has " +
                           std::to_string(kMaxChainLevels) +
                           " directories, as many as there can be: start a new one (a dump "
                           "without --prev-images-dir)");
  }
  auto state = std::make_unique<State>(std::move(*chain), std::move(*lock));
  return std::optional<PreviousPages>(PreviousPages(std::move(state)));
}

const DumpId& PreviousPages::dump_id() const {
  return state_->chain.image().dump_id;
}

const std::vector<uint8_t>& PreviousPages::hash_key() const {
  return state_->chain.image().hash_key;
}

const std::vector<ChainLevel>& PreviousPages::levels() const {
  return state_->chain.levels();
}

const PageChain& PreviousPages::chain() const {
  return state_->chain;
}

const AllocationInfo* PreviousPages::find(const GpuUuid& gpu, uint64_t address,
                                          uint64_t size) const {
  return state_->index.find(gpu, address, size);
}

std::optional<PagePlace> PreviousPages::find(const SavedHash& hash) const {
  const auto& places = state_->places;
  auto it = std::lower_bound(places.begin(), places.end(), hash,
                             [](const auto& place, const SavedHash& h) { return place.first < h; });
  if (it == places.end() || it->first != hash) return std::nullopt;
  return state_->chain.place(it->second);
}

}  // namespace phos
