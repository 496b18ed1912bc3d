// SPDX-License-Identifier: GPL-2.0-only
#include "test/image/examine.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/codec.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_statistics.h"
#include "gpu-tracker/image/verify.h"

namespace phos::image_test {
namespace {

constexpr uint64_t kMostPages = 4096;  // that are read, in one image

bool is_one_line(const std::string& text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c <= 0x7e; });
}

// Of an error that the reader gave.
std::string check_error(const Error& error) {
  if (!is_one_line(error.message())) return "a message of more than one line of printable text";
  if (error.domain() == Domain::kErrno) return "";
  if (error.domain() != Domain::kFormat) return "an error of another domain: " + error.message();
  const bool known = error.code() >= static_cast<int>(ImageError::kNotAnImage) &&
                     error.code() <= static_cast<int>(ImageError::kNoKey);
  return known ? "" : "an error without a code: " + error.message();
}

// What is accepted obeys the rules, so that it can be written; and is read as it was written.
std::string check_round_trip(const ProcessImage& image) {
  auto payload = encode(image);
  if (!payload) return "accepted, but cannot be written: " + payload.error().message();
  auto back = decode_process(*payload);
  if (!back) return "cannot be read again: " + back.error().message();
  auto again = encode(*back);
  if (!again || *again != *payload) return "is not the same when it is read again";
  return "";
}

std::string check_runs(const PageChain& chain, size_t allocation, uint8_t* page) {
  const AllocationInfo& a = chain.image().allocations[allocation];
  uint64_t next = 0;
  for (const PageRun& run : chain.runs(allocation)) {
    if (run.first_page != next || run.pages == 0) return "runs with a gap";
    next += run.pages;
    if (run.is_stored() && chain.level(run) >= chain.levels().size()) return "no such level";
    for (uint64_t at : {uint64_t{run.first_page}, next - 1}) {
      auto found = chain.locate(allocation, at);
      if (!found || found->first_page != at || found->pages != 1) return "a page is not located";
      if (run.is_dropped()) continue;
      if (auto ok = chain.read_page(allocation, at, page); !ok) {
        // Of what is compressed or encrypted, only reading it shows whether it is sound.
        if (run.is_stored() && !chain.is_plain(run)) continue;
        return "accepted, but a page cannot be read: " + ok.error().message();
      }
    }
  }
  if (next != a.hashes.size()) return "runs that are not all pages";
  if (next && next != page_count(a)) return "a part of an allocation's pages";
  if (chain.locate(allocation, next) || chain.read_page(allocation, next, page)) {
    return "a page after the last one";
  }
  return "";
}

std::string check_process(int dir_fd, const ProcessImage& image) {
  if (auto wrong = check_round_trip(image); !wrong.empty()) return wrong;
  auto chain = PageChain::open(dir_fd, image.pid, PageIo::kCached);
  if (!chain) return "a set, but its chain is refused: " + chain.error().message();
  std::unique_ptr<uint8_t, decltype(&free)> page(
      static_cast<uint8_t*>(aligned_alloc(kPageIoAlignment, kImagePageSize)), free);
  for (size_t i = 0; i < image.allocations.size(); i++) {
    if (auto wrong = check_runs(*chain, i, page.get()); !wrong.empty()) return wrong;
  }
  auto previous = PreviousPages::open(dir_fd, image.pid);
  if (!previous && chain->levels().size() < kMaxChainLevels) return "a chain that ends here";
  if (!previous || !*previous) return "";
  for (const AllocationInfo& a : image.allocations) {
    const AllocationInfo* found = (*previous)->find(gpu_uuid_of(image, a), a.address, a.size);
    if (a.hashes.empty() ? found != nullptr : !found || found->hashes != a.hashes) {
      return "other hashes for the next dump";
    }
  }
  return "";
}

std::string check_set(int dir_fd, const ImageSet& set) {
  if (!is_utf8(to_json(set))) return "JSON that is not UTF-8";
  const std::string table = to_table(set);
  if (std::any_of(table.begin(), table.end(), [](char c) { return c < 0x20 && c != '\n'; })) {
    return "control characters in a table";
  }
  auto runs = page_runs(dir_fd, set);
  if (!runs) return "a set, but not where its pages are: " + runs.error().message();
  if (!is_utf8(to_json(set, &*runs)) || to_table(set, &*runs).size() < table.size()) {
    return "pages that are not shown";
  }
  uint64_t pages = 0;
  for (const ProcessImage& image : set.processes) {
    if (auto wrong = check_process(dir_fd, image); !wrong.empty()) return wrong;
    (void)check_driver(image, 13000).ok();
    (void)plan_gpu_mapping(image.gpus, image.gpus).ok();
    const PageCounts counts = count_pages(image);
    pages += counts.here + counts.parent + counts.zero;
  }
  (void)check_stage(set).ok();
  if (!set.files.files.empty() && !encode(set.files)) return "files that cannot be written";
  if (pages > kMostPages) return "";
  auto again = read_image_set(dir_fd);  // used up
  if (!again) return "a set that cannot be read a second time: " + again.error().message();
  const MakePageHasher no_hash = [](const std::vector<uint8_t>&) {
    return Result<PageHasher>([](const void*) { return SavedHash(); });
  };
  VerifyOptions options;
  options.jobs = 1;
  auto verified = verify_images(dir_fd, std::move(*again), no_hash, options);
  if (!verified) return "a set whose pages cannot be read: " + verified.error().message();
  for (const PageDamage& damage : verified->damage) {
    // Of packed pages, only reading one shows whether it is sound.
    if (damage.unreadable && damage.where.find(", unit ") == std::string::npos) {
      return "a set whose pages cannot be read: " + verified->read_error;
    }
    if (!is_one_line(describe(damage))) return "damage that is not described";
  }
  return "";
}

}  // namespace

Examination examine(int dir_fd) {
  auto set = read_image_set(dir_fd);
  if (set) return {"", 0, check_set(dir_fd, *set)};
  const Error& error = set.error();
  return {error.message(), error.domain() == Domain::kFormat ? error.code() : 0,
          check_error(error)};
}

}  // namespace phos::image_test
