// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/page_walk.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>

#include "gpu-tracker/image/file.h"

namespace phos {
namespace {

constexpr std::chrono::milliseconds kTick{200};
// Fewer leave a disk idle while they hash; more only cost memory.
constexpr unsigned kLeastJobs = 4, kMostJobs = 64;

unsigned default_jobs() {
  cpu_set_t cpus;
  const int mine = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  return std::clamp(static_cast<unsigned>(mine), kLeastJobs, kMostJobs);
}

class Walk {
 public:
  Walk(const std::vector<uint64_t>& pages, const SpanWork& work) : pages_(pages), work_(work) {}

  Result<void> run(unsigned jobs, size_t buffer_pages, const std::function<void()>& tick) {
    std::vector<PageBuffer> buffers;
    for (unsigned i = 0; i < jobs; i++) {
      buffers.push_back(make_page_buffer(buffer_pages));
      if (!buffers.back()) return Error::from_errno(ENOMEM, "buffers for pages");
    }
    std::vector<std::jthread> threads;
    for (PageBuffer& buffer : buffers) {
      {
        std::lock_guard<std::mutex> hold(mutex_);
        running_++;
      }
      try {
        threads.emplace_back([this, to = buffer.get()] { work(to); });
      } catch (const std::system_error& e) {
        end(Error::from_errno(e.code().value(), "starting a thread"));
        break;
      }
    }
    std::unique_lock<std::mutex> hold(mutex_);
    while (!ended_.wait_for(hold, kTick, [this] { return running_ == 0; })) {
      if (!tick) continue;
      hold.unlock();
      tick();
      hold.lock();
    }
    if (error_) return *error_;
    return {};
  }

 private:
  // False: there are none left.
  bool take(PageSpan* span) {
    std::lock_guard<std::mutex> hold(mutex_);
    while (item_ < pages_.size() && next_ == pages_[item_]) {
      item_++;
      next_ = 0;
    }
    if (error_ || item_ == pages_.size()) return false;
    const uint64_t left = pages_[item_] - next_;
    *span = {item_, static_cast<uint32_t>(next_),
             static_cast<uint32_t>(std::min<uint64_t>(left, kSpanPages))};
    next_ += span->pages;
    return true;
  }

  void work(uint8_t* buffer) {
    PageSpan span;
    Result<void> done;
    while (done && take(&span)) done = work_(span, buffer);
    end(done);
  }

  void end(const Result<void>& done) {
    std::lock_guard<std::mutex> hold(mutex_);
    if (!done && !error_) error_ = done.error();
    running_--;
    ended_.notify_all();
  }

  const std::vector<uint64_t>& pages_;
  const SpanWork& work_;
  std::mutex mutex_;
  std::condition_variable ended_;
  size_t item_ = 0;  // where the next span begins
  uint64_t next_ = 0;
  unsigned running_ = 0;
  std::optional<Error> error_;
};

}  // namespace

PageBuffer make_page_buffer(size_t pages) {
  return PageBuffer(static_cast<uint8_t*>(aligned_alloc(kPageIoAlignment, pages * kImagePageSize)));
}

Result<void> walk_pages(const std::vector<uint64_t>& pages, unsigned jobs, size_t buffer_pages,
                        const SpanWork& work, const std::function<void()>& tick) {
  uint64_t spans = 0;
  for (uint64_t n : pages) spans += (n + kSpanPages - 1) / kSpanPages;
  if (spans == 0) return {};
  const uint64_t threads = std::min<uint64_t>(jobs ? jobs : default_jobs(), spans);
  return Walk(pages, work).run(static_cast<unsigned>(threads), buffer_pages, tick);
}

std::vector<PageRun> parts_of(const PageChain& chain, size_t allocation, uint32_t first,
                              uint32_t pages) {
  const std::vector<PageRun>& runs = chain.runs(allocation);
  auto run = std::upper_bound(runs.begin(), runs.end(), first,
                              [](uint32_t page, const PageRun& r) { return page < r.first_page; });
  std::vector<PageRun> parts;
  for (--run; pages; ++run) {
    const uint32_t skip = first - run->first_page, n = std::min(pages, run->pages - skip);
    parts.push_back(run->part(first, n));
    first += n;
    pages -= n;
  }
  return parts;
}

Result<void> read_checked(const PageChain& chain, size_t allocation, uint32_t first, uint32_t pages,
                          const PageHasher& hash, uint8_t* buffer) {
  const AllocationInfo& a = chain.image().allocations[allocation];
  for (const PageRun& part : parts_of(chain, allocation, first, pages)) {
    if (auto ok = chain.read(part, buffer); !ok) return ok;
    for (uint32_t i = 0; i < part.pages; i++, buffer += kImagePageSize) {
      const PageRun one = part.part(part.first_page + i, 1);
      if (hash(buffer) == a.hashes[one.first_page]) continue;
      return image_error(
          ImageError::kDamagedPage,
          describe(damage_of(chain, allocation, one, false)) + ": use another copy of the images");
    }
  }
  return {};
}

}  // namespace phos
