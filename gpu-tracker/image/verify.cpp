// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/verify.h"

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <utility>

#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

enum class Mark : uint8_t { kGood = 0, kWrong, kUnreadable };

// All pages of one process.
class ProcessPages {
 public:
  ProcessPages(const PageChain& chain, PageHasher hash)
      : chain_(chain), hash_(std::move(hash)), marks_(chain.image().allocations.size()) {}

  // `progress` is told how many pages are done.
  Result<void> verify(unsigned jobs, const std::function<void(uint64_t)>& progress) {
    PageBuffer zeros = make_page_buffer(1);
    if (!zeros) return Error::from_errno(ENOMEM, "64 KiB for a page");
    memset(zeros.get(), 0, kImagePageSize);
    zero_hash_ = hash_(zeros.get());
    std::vector<uint64_t> pages;
    for (const AllocationInfo& a : chain_.image().allocations) pages.push_back(a.hashes.size());
    auto work = [this](const PageSpan& span, uint8_t* buffer) {
      for (const PageRun& part : parts_of(chain_, span.item, span.first_page, span.pages)) {
        verify_part(span.item, part, buffer);
      }
      return Result<void>();
    };
    return walk_pages(pages, jobs, kSpanPages, work, [&] { progress(pages_); });
  }

  void add_to(VerifyReport* report, size_t max_damage) const {
    report->pages += pages_;
    report->zero_pages += zero_pages_;
    report->dropped_pages += dropped_pages_;
    report->bytes += bytes_;
    if (report->read_error.empty()) report->read_error = read_error_;
    for (size_t i = 0; i < marks_.size(); i++) {
      if (marks_[i].empty()) continue;
      for (const PageRun& run : chain_.runs(i)) add_run(i, run, report, max_damage);
    }
  }

 private:
  void verify_part(size_t allocation, const PageRun& part, uint8_t* buffer) {
    pages_ += part.pages;
    if (part.is_dropped()) {
      dropped_pages_ += part.pages;
      return;
    }
    if (part.is_zero()) {
      zero_pages_ += part.pages;
      const SavedHash* saved = &chain_.image().allocations[allocation].hashes[part.first_page];
      for (uint32_t i = 0; i < part.pages; i++) {
        if (saved[i] != zero_hash_) mark(allocation, part.first_page + i, Mark::kWrong);
      }
      return;
    }
    if (chain_.read(part, buffer)) {
      check(allocation, part, buffer);
      return;
    }
    // Which of them is it?
    for (uint32_t i = 0; i < part.pages; i++) {
      const PageRun one = part.part(part.first_page + i, 1);
      if (auto ok = chain_.read(one, buffer)) {
        check(allocation, one, buffer);
      } else {
        mark(allocation, one.first_page, Mark::kUnreadable, ok.error().message());
      }
    }
  }

  void check(size_t allocation, const PageRun& part, const uint8_t* data) {
    const SavedHash* saved = &chain_.image().allocations[allocation].hashes[part.first_page];
    for (uint32_t i = 0; i < part.pages; i++, data += kImagePageSize) {
      if (hash_(data) != saved[i]) mark(allocation, part.first_page + i, Mark::kWrong);
    }
    bytes_ += uint64_t{part.pages} * kImagePageSize;
  }

  void mark(size_t allocation, uint32_t page, Mark what, const std::string& error = "") {
    std::lock_guard<std::mutex> hold(mutex_);
    std::vector<Mark>& marks = marks_[allocation];
    if (marks.empty()) marks.resize(chain_.image().allocations[allocation].hashes.size());
    marks[page] = what;
    if (read_error_.empty()) read_error_ = error;
  }

  void add_run(size_t allocation, const PageRun& run, VerifyReport* report,
               size_t max_damage) const {
    const Mark* marks = &marks_[allocation][run.first_page];
    for (uint32_t i = 0, end; i < run.pages; i = end) {
      for (end = i + 1; end < run.pages && marks[end] == marks[i];) end++;
      if (marks[i] == Mark::kGood) continue;
      report->damaged_pages += end - i;
      report->damaged_runs++;
      if (report->damage.size() >= max_damage) continue;
      const PageRun part = run.part(run.first_page + i, end - i);
      report->damage.push_back(damage_of(chain_, allocation, part, marks[i] == Mark::kUnreadable));
    }
  }

  const PageChain& chain_;
  const PageHasher hash_;
  SavedHash zero_hash_{};
  std::atomic<uint64_t> pages_{0}, zero_pages_{0}, dropped_pages_{0}, bytes_{0};
  std::mutex mutex_;
  std::vector<std::vector<Mark>> marks_;  // by allocation; empty: all its pages are good
  std::string read_error_;
};

void count(const ProcessImage& image, VerifyReport* report) {
  report->processes++;
  for (const AllocationInfo& a : image.allocations) {
    report->allocations += !a.hashes.empty();
    if (a.path != MemoryPath::kDriver || a.gpu < 0) continue;
    report->driver_allocations++;
    report->driver_bytes += a.size;
    report->driver_copied += !a.hashes.empty();
  }
}

}  // namespace

PageDamage damage_of(const PageChain& chain, size_t allocation, const PageRun& run,
                     bool unreadable) {
  const ProcessImage& image = chain.image();
  const AllocationInfo& a = image.allocations[allocation];
  return {image.pid,
          gpu_uuid_of(image, a),
          a.address,
          a.size,
          uint64_t{run.first_page} * kImagePageSize,
          run.pages,
          unreadable,
          chain.describe(run)};
}

std::string describe(const PageDamage& damage) {
  char text[160];
  snprintf(text, sizeof text,
           ", allocation at 0x%" PRIx64 " (%" PRIu64 " bytes), offset %" PRIu64 ": %" PRIu64,
           damage.address, damage.size, damage.offset, damage.pages);
  const char* const what = damage.unreadable   ? " cannot be read ("
                           : damage.pages == 1 ? " is not what was saved ("
                                               : " are not what was saved (";
  return "process " + std::to_string(damage.pid) + ", " +
         (damage.gpu == GpuUuid{} ? "host" : format_gpu_uuid(damage.gpu)) + text +
         (damage.pages == 1 ? " page" : " pages") + what + damage.where + ")";
}

Result<VerifyReport> verify_images(int dir_fd, ImageSet set, const MakePageHasher& make_hasher,
                                   const VerifyOptions& options) {
  uint64_t all = 0;
  for (const ProcessImage& image : set.processes) {
    for (const AllocationInfo& a : image.allocations) all += a.hashes.size();
  }
  VerifyReport report;
  for (ProcessImage& image : set.processes) {
    count(image, &report);
    if (image.hash_key.empty()) continue;
    const std::string who = "process " + std::to_string(image.pid);
    auto hash = make_hasher(image.hash_key);
    if (!hash) return hash.error().wrap(who);
    // Nothing is kept of a process that is done.
    auto chain = PageChain::open(dir_fd, std::exchange(image, {}), PageIo::kDirect);
    if (!chain) return chain.error();
    ProcessPages pages(*chain, std::move(*hash));
    auto done = pages.verify(options.jobs, [&](uint64_t n) {
      if (options.progress) options.progress(report.pages + n, all);
    });
    if (!done) return done.error().wrap(who);
    pages.add_to(&report, options.max_damage);
  }
  return report;
}

}  // namespace phos
