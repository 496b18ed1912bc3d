// SPDX-License-Identifier: GPL-2.0-only
// What a chain is read for besides a restore: to build on it, and to check its pages.
#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/file.h"
#include "gpu-tracker/image/names.h"
#include "gpu-tracker/image/saved_index.h"

namespace phos {
namespace {

constexpr uint32_t kPagesAtOnce = 64;  // 4 MiB

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// `run`: at most kPagesAtOnce pages, which fit into `buffer`.
Result<void> verify_run(const PageChain& chain, const AllocationInfo& a, const PageRun& run,
                        const HashFunction& hash, uint8_t* buffer,
                        std::vector<PageDamage>* damages) {
  if (auto ok = chain.read(run, buffer); !ok) return ok;
  const ProcessImage& image = chain.image();
  for (uint32_t i = 0; i < run.pages; i++) {
    const uint32_t page = run.first_page + i;
    const uint8_t* data = buffer + uint64_t{i} * kImagePageSize;
    if (hash(image.hash_key, data, kImagePageSize) == a.hashes[page]) continue;
    PageRun one = run;
    one.slot += i;
    damages->push_back({image.pid, image.gpus[static_cast<size_t>(a.gpu)].uuid, a.address,
                        uint64_t{page} * kImagePageSize, chain.describe(one)});
  }
  return {};
}

Result<void> verify_process(const PageChain& chain, const HashFunction& hash, uint8_t* buffer,
                            std::vector<PageDamage>* damages) {
  for (size_t i = 0; i < chain.image().allocations.size(); i++) {
    for (const PageRun& run : chain.runs(i)) {
      for (uint32_t done = 0; done < run.pages;) {
        PageRun part = run;
        part.first_page += done;
        part.slot += done;
        part.pages = std::min(run.pages - done, kPagesAtOnce);
        auto ok = verify_run(chain, chain.image().allocations[i], part, hash, buffer, damages);
        if (!ok) return ok;
        done += part.pages;
      }
    }
  }
  return {};
}

}  // namespace

std::string describe(const PageDamage& damage) {
  char text[80];
  snprintf(text, sizeof text, ", allocation at 0x%" PRIx64 ", offset %" PRIu64 ": ", damage.address,
           damage.offset);
  return "process " + std::to_string(damage.pid) + ", " + format_gpu_uuid(damage.gpu) + text +
         "the page is not what was saved (" + damage.where + ")";
}

Result<std::vector<PageDamage>> verify_chain(int dir_fd, const HashFunction& hash) {
  std::unique_ptr<uint8_t, Free> buffer(static_cast<uint8_t*>(
      aligned_alloc(kPageIoAlignment, size_t{kPagesAtOnce} * kImagePageSize)));
  if (!buffer) return Error::from_errno(ENOMEM, "4 MiB for pages to verify");
  auto set = read_image_set(dir_fd);
  if (!set) return set.error();
  std::vector<PageDamage> damages;
  for (ProcessImage& image : set->processes) {
    auto chain = PageChain::open(dir_fd, std::move(image), PageIo::kDirect);
    if (!chain) return chain.error();
    if (auto ok = verify_process(*chain, hash, buffer.get(), &damages); !ok) return ok.error();
  }
  return damages;
}

// ---- the dump's side ----

struct PreviousPages::State {
  explicit State(ProcessImage previous) : image(std::move(previous)), index(image) {}
  ProcessImage image;
  SavedIndex index;  // of `image`
};

PreviousPages::PreviousPages(std::unique_ptr<State> state) : state_(std::move(state)) {}
PreviousPages::PreviousPages(PreviousPages&&) noexcept = default;
PreviousPages& PreviousPages::operator=(PreviousPages&&) noexcept = default;
PreviousPages::~PreviousPages() = default;

Result<std::optional<PreviousPages>> PreviousPages::open(int dir_fd, int pid) {
  auto image = read_process_image(dir_fd, pid);
  if (!image) {
    const Error& error = image.error();
    bool absent = error.domain() == Domain::kErrno && error.code() == ENOENT;
    return absent ? Result<std::optional<PreviousPages>>(std::nullopt) : error;
  }
  if (image->hash_key.empty()) return std::optional<PreviousPages>();
  auto chain = PageChain::open(dir_fd, std::move(*image), PageIo::kCached);
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
  auto state = std::make_unique<State>(std::move(*chain).take_image());
  return std::optional<PreviousPages>(PreviousPages(std::move(state)));
}

const DumpId& PreviousPages::dump_id() const {
  return state_->image.dump_id;
}

const std::vector<uint8_t>& PreviousPages::hash_key() const {
  return state_->image.hash_key;
}

const std::vector<SavedHash>* PreviousPages::find(const GpuUuid& gpu, uint64_t address,
                                                  uint64_t size) const {
  const AllocationInfo* a = state_->index.find(gpu, address, size);
  return a ? &a->hashes : nullptr;
}

}  // namespace phos
