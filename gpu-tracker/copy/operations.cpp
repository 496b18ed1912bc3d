// SPDX-License-Identifier: GPL-2.0-only
// What a CopyEngine does: hash, copy, load.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "gpu-tracker/copy/engine.h"

namespace phos {
namespace {

using Clock = std::chrono::steady_clock;
using Nanoseconds = std::chrono::duration<double, std::nano>;

// Assumed of a GPU until it has been measured: 330 GB/s.
constexpr double kFirstNsPerPage = 200;

Error cancelled(const char* what) {
  return Error(Domain::kErrno, ECANCELED, std::string(what) + " was cancelled");
}

// What a launch takes from a process that keeps the GPU busy, besides the kernel's own time: the
// change to phos's context and back. Measured as what an empty kernel costs such a process on an
// H200 (driver 580): 270 us, launched 200 or 1000 times a second. Events do not show it: they see
// no more than the time between them.
constexpr double kTurnNs = 300e3;

// The most in a launch when others do: 4 GiB, 1 ms of an H200.
constexpr size_t kPacedBatch = 65536;

// By the fastest of these the speed of the link is measured, 0.6 ms each.
constexpr int kLinkTimings = 2;

// What a piece may be late and the next ones make up for.
constexpr auto kCatchUp = std::chrono::microseconds(500);

// How often a transfer is asked for: 1 MiB of PCIe 5 x16.
constexpr auto kPollEvery = std::chrono::microseconds(20);

// The least that is worth a launch when nobody else needs the GPU.
constexpr size_t kSmallBatch = 4096;

// Pages that follow each other in memory and come first in `pages`.
struct Run {
  size_t pages;
  uint64_t bytes;
};
Run first_run(std::span<const PageRef> pages) {
  Run run = {1, pages[0].bytes};
  while (run.pages < pages.size() && run.bytes == run.pages * kPageBytes &&
         pages[run.pages].allocation == pages[0].allocation &&
         pages[run.pages].address == pages[0].address + run.bytes) {
    run.bytes += pages[run.pages++].bytes;
  }
  return run;
}

}  // namespace

void CopiedPages::hash(const PageHashKey& key) {
  if (!hashes.empty()) return;
  hashes.resize(count);
  for (size_t i = 0; i < count; i++) {
    hashes[i] = hash_page(key, buffer.data() + i * kPageBytes, kPageBytes);
  }
}

// Spaces kernel launches out so that they take no more than the allowed share of the GPU's time.
class CopyEngine::Pacer {
 public:
  Pacer(const Pace& pace, LastTurn& last, std::stop_token stop)
      : pace_(pace), last_(last), stop_(std::move(stop)) {}

  // Whether there is a limit, now.
  bool limited() const { return pace_.limited(); }

  // Returns when a kernel of `pages` may start, or when `stop` is requested.
  void wait_turn(uint32_t pages, double ns_per_page) {
    const double share = pace_.max_slowdown();
    if (share > 0 && share < 1) {
      const auto due = last_.start + std::chrono::duration_cast<Clock::duration>(
                                         Nanoseconds(last_.busy_ns / share));
      std::mutex mutex;
      std::unique_lock<std::mutex> hold(mutex);
      std::condition_variable_any never;
      never.wait_until(hold, stop_, due, [] { return false; });
    }
    last_.start = Clock::now();
    last_.busy_ns = kTurnNs + pages * (ns_per_page > 0 ? ns_per_page : kFirstNsPerPage);
  }

 private:
  const Pace& pace_;
  LastTurn& last_;
  const std::stop_token stop_;
};

// The lanes that the GPU works on, oldest first.
class CopyEngine::Flight {
 public:
  explicit Flight(std::vector<Lane>& lanes) : lanes_(lanes) {}
  bool empty() const { return !flying_; }
  bool full() const { return flying_ == lanes_.size(); }
  Lane& take_off() { return lanes_[(oldest_ + flying_++) % lanes_.size()]; }
  Lane& oldest() { return lanes_[oldest_]; }
  void land() {
    oldest_ = (oldest_ + 1) % lanes_.size();
    flying_--;
  }

 private:
  std::vector<Lane>& lanes_;
  size_t oldest_ = 0, flying_ = 0;
};

Result<void> CopyEngine::hash(std::span<const PageRef> pages, std::span<PageHash> hashes,
                              const Pace& pace, std::stop_token stop) {
  if (hashes.size() != pages.size()) {
    return Error(Domain::kUsage, EINVAL, "hashing GPU memory: not as many hashes as pages");
  }
  if (auto r = begin(); !r) return r.error().wrap("hashing GPU memory");
  return end(run_hash(pages, hashes, pace, std::move(stop)));
}

Result<void> CopyEngine::copy(std::span<const PageRef> pages, const CopySink& sink,
                              const Pace& pace, std::stop_token stop) {
  if (auto r = begin(); !r) return r.error().wrap("copying GPU memory");
  return end(run_copy(pages, sink, pace, std::move(stop)));
}

Result<void> CopyEngine::load(const LoadSource& source, std::stop_token stop) {
  wrong_page_.reset();
  if (auto r = begin(); !r) return r.error().wrap("loading GPU memory");
  return end(run_load(source, std::move(stop)));
}

Result<void> CopyEngine::run_hash(std::span<const PageRef> pages, std::span<PageHash> hashes,
                                  const Pace& pace, std::stop_token stop) {
  Flight flight(batches_);
  Pacer pacer(pace, last_turn_, stop);
  // Small batches first and last: the GPU is idle while the CPU makes the first table, and while it
  // takes the last hashes. But each launch is a turn, so not where turns are scarce.
  size_t most = std::min<size_t>(kSmallBatch, options_.hash_batch_pages);
  hash_kernels_ms_ = 0;
  for (size_t next = 0; next < pages.size() || !flight.empty();) {
    if (stop.stop_requested()) return cancelled("hashing GPU memory");
    if (next < pages.size() && !flight.full()) {
      const size_t left = pages.size() - next;
      if (pacer.limited()) most = std::min<size_t>(kPacedBatch, options_.hash_batch_pages);
      size_t n = std::min(left, most);
      if (!pacer.limited()) n = std::min(n, std::max(left / 4 * 3, kSmallBatch));
      // Twice as large: its table is made while the GPU is at the last one, at a third of the time.
      most = std::min<size_t>(2 * most, options_.hash_batch_pages);
      const auto batch = pages.subspan(next, n);
      if (auto r = check(batch); !r) return r.error().wrap("hashing GPU memory");
      pacer.wait_turn(static_cast<uint32_t>(n), hash_ns_);
      if (auto r = start_hash(flight.take_off(), next, batch); !r) return r;
      next += n;
      continue;
    }
    Lane& lane = flight.oldest();
    if (auto r = finish_hash(lane); !r) return r;
    std::copy_n(lane.host_hashes, lane.count, hashes.begin() + static_cast<ptrdiff_t>(lane.first));
    flight.land();
  }
  return {};
}

Result<void> CopyEngine::run_copy(std::span<const PageRef> pages, const CopySink& sink,
                                  const Pace& pace, std::stop_token stop) {
  Flight flight(slots_);
  for (size_t next = 0; next < pages.size() || !flight.empty();) {
    if (stop.stop_requested()) return cancelled("copying GPU memory");
    if (next < pages.size() && !flight.full()) {
      auto buffer = pool_.try_acquire();
      // To wait for a buffer while holding some that nobody has seen yet could take for ever.
      if (!buffer && flight.empty()) {
        auto acquired = pool_.acquire(stop);
        if (!acquired) return acquired.error();
        buffer = std::move(*acquired);
      }
      if (buffer) {
        const auto n = std::min<size_t>(pages.size() - next, slot_pages_);
        const auto batch = pages.subspan(next, n);
        if (auto r = check(batch); !r) return r.error().wrap("copying GPU memory");
        const bool limited = pace.limited();
        if (limited && next == 0 && options_.link_share < 1) {
          if (auto r = measure_link(*buffer); !r) return r;
        }
        const auto start = limited ? &CopyEngine::start_transfer : &CopyEngine::start_copy;
        auto r = (this->*start)(flight.take_off(), next, batch, std::move(*buffer));
        if (!r) return r;
        next += n;
        continue;
      }
    }
    auto copied = finish_copy(flight.oldest());
    if (!copied) return copied.error();
    flight.land();
    if (auto r = sink(std::move(*copied)); !r) return r;
  }
  return {};
}

Result<CopiedPages> CopyEngine::finish_copy(Lane& lane) {
  if (auto r = lane.hash_on_host ? poll(lane.arrived) : context_.synchronize(lane.done); !r)
    return r.error();
  CopiedPages copied;
  copied.first = lane.first;
  copied.count = lane.count;
  if (!lane.hash_on_host) {
    copied.hashes.assign(lane.host_hashes, lane.host_hashes + lane.count);
  }
  copied.buffer = std::move(lane.buffer);
  return copied;
}

Result<void> CopyEngine::run_load(const LoadSource& source, std::stop_token stop) {
  Flight flight(slots_);
  hash_kernels_ms_ = transfers_ms_ = 0;
  for (bool more = true; more || !flight.empty();) {
    if (stop.stop_requested()) return cancelled("loading GPU memory");
    if (more && !flight.full()) {
      PagesToLoad work;
      // To wait while lanes hold buffers that could be given back could take for ever.
      auto state = source(flight.empty(), &work);
      if (!state) return state.error();
      if (*state == LoadState::kPages) {
        if (auto r = check(work.pages); !r) return r.error().wrap("loading GPU memory");
        if (work.pages.empty() || work.pages.size() > slot_pages_ ||
            work.hashes.size() != work.pages.size()) {
          return Error(Domain::kUsage, EINVAL, "loading GPU memory: no buffer full of pages");
        }
        if (auto r = start_load(flight.take_off(), std::move(work)); !r) return r;
        continue;
      }
      more = *state != LoadState::kEnd;
      if (flight.empty()) {
        if (!more) break;
        return Error(Domain::kUsage, EINVAL, "loading GPU memory: no pages although it may wait");
      }
    }
    if (auto r = finish_load(flight.oldest()); !r) return r;
    flight.land();
  }
  return {};
}

Result<void> CopyEngine::finish_load(Lane& lane) {
  if (auto r = finish_hash(lane); !r) return r;
  if (lane.buffer) {
    auto ms = context_.elapsed_ms(lane.sending, lane.sent);
    if (!ms) return ms.error();
    transfers_ms_ += *ms;
  }
  lane.buffer.reset();
  const auto wrong = std::mismatch(lane.expected.begin(), lane.expected.end(), lane.host_hashes);
  if (wrong.first == lane.expected.end()) return {};
  wrong_page_ = lane.host_table[wrong.first - lane.expected.begin()].address;
  char text[120];
  snprintf(text, sizeof text, "GPU memory at 0x%llx is not what was saved: its hash differs",
           static_cast<unsigned long long>(*wrong_page_));
  return Error(Domain::kFormat, EBADMSG, text);
}

Result<void> CopyEngine::send_table(Lane& lane, size_t first, std::span<const PageRef> pages) {
  lane.first = first;
  lane.count = static_cast<uint32_t>(pages.size());
  for (size_t i = 0; i < pages.size(); i++) {
    lane.host_table[i] = {pages[i].address, pages[i].bytes, 0};
  }
  auto r = context_.copy_to_device(lane.table, lane.host_table, lane.count * sizeof(PageEntry),
                                   uploads_);
  if (r) r = context_.record(lane.ready, uploads_);
  return r;
}

Result<void> CopyEngine::launch(Lane& lane, GpuKernel kernel) {
  HashArguments arguments = arguments_;
  arguments.pages = lane.table;
  arguments.hashes = lane.hashes;
  arguments.staging = lane.staging;
  arguments.count = lane.count;
  const unsigned blocks = std::min(blocks_, lane.count);
  auto r = context_.wait(kernels_, lane.ready);
  if (r) r = context_.record(lane.begin, kernels_);
  if (r) r = context_.launch(kernel, blocks, kHashThreads, &arguments, kernels_);
  if (r) r = context_.record(lane.hashed, kernels_);
  return r;
}

Result<void> CopyEngine::fetch_hashes(Lane& lane, GpuStream stream) {
  auto r =
      context_.copy_to_host(lane.host_hashes, lane.hashes, lane.count * sizeof(PageHash), stream);
  if (r) r = context_.record(lane.done, stream);
  return r;
}

Result<void> CopyEngine::start_hash(Lane& lane, size_t first, std::span<const PageRef> pages) {
  auto r = send_table(lane, first, pages);
  if (r) r = launch(lane, hash_kernel_);
  if (r) r = context_.wait(transfers_, lane.hashed);
  if (r) r = fetch_hashes(lane, transfers_);
  return r;
}

Result<void> CopyEngine::start_copy(Lane& lane, size_t first, std::span<const PageRef> pages,
                                    PinnedPool::Buffer buffer) {
  lane.buffer = std::move(buffer);
  lane.hash_on_host = false;
  auto r = send_table(lane, first, pages);
  if (r) r = launch(lane, copy_kernel_);
  if (r) r = context_.wait(transfers_, lane.hashed);
  if (r) {
    r = context_.copy_to_host(lane.buffer.data(), lane.staging, uint64_t{lane.count} * kPageBytes,
                              transfers_);
  }
  if (r) r = fetch_hashes(lane, transfers_);
  return r;
}

Result<void> CopyEngine::start_transfer(Lane& lane, size_t first, std::span<const PageRef> pages,
                                        PinnedPool::Buffer buffer) {
  lane.buffer = std::move(buffer);
  lane.hash_on_host = true;
  lane.first = first;
  lane.count = static_cast<uint32_t>(pages.size());
  uint8_t* to = lane.buffer.data();
  while (!pages.empty()) {
    const Run run = first_run(pages);
    for (uint64_t done = 0; done < run.bytes;) {
      const uint64_t bytes = std::min<uint64_t>(run.bytes - done, options_.piece_bytes);
      if (auto r = transfer_piece(to + done, pages[0].address + done, bytes); !r) return r;
      done += bytes;
    }
    memset(to + run.bytes, 0, run.pages * kPageBytes - run.bytes);
    to += run.pages * kPageBytes;
    pages = pages.subspan(run.pages);
  }
  return context_.record(lane.arrived, transfers_);
}

// How fast memory that nobody needs comes into a buffer whose contents nobody needs yet.
Result<void> CopyEngine::measure_link(const PinnedPool::Buffer& buffer) {
  const Lane& lane = slots_[0];
  const uint64_t bytes = uint64_t{slot_pages_} * kPageBytes;
  transfer_ns_per_byte_ = 0;
  for (int i = 0; i < kLinkTimings; i++) {
    auto r = context_.record(lane.begin, transfers_);
    if (r) r = context_.copy_to_host(buffer.data(), lane.staging, bytes, transfers_);
    if (r) r = context_.record(lane.hashed, transfers_);
    if (r) r = context_.synchronize(lane.hashed);
    if (!r) return r;
    auto ms = context_.elapsed_ms(lane.begin, lane.hashed);
    if (!ms) return ms.error();
    const double ns = *ms * 1e6 / static_cast<double>(bytes);
    if (i == 0 || ns < transfer_ns_per_byte_) transfer_ns_per_byte_ = ns;
  }
  return {};
}

// Returns when the next piece may be queued.
Result<void> CopyEngine::end_piece() {
  if (auto r = context_.record(pieces_[piece_], transfers_); !r) return r;
  const auto time = std::chrono::duration_cast<Clock::duration>(
      Nanoseconds(static_cast<double>(queued_) * transfer_ns_per_byte_ / options_.link_share));
  next_piece_ = std::max(next_piece_ + time, Clock::now() - kCatchUp);
  queued_ = 0;
  piece_ = (piece_ + 1) % pieces_.size();
  if (options_.link_share < 1) std::this_thread::sleep_until(next_piece_);
  return poll(pieces_[piece_]);
}

Result<void> CopyEngine::poll(GpuEvent event) {
  while (true) {
    auto done = context_.query(event);
    if (!done) return done.error();
    if (*done) return {};
    std::this_thread::sleep_for(kPollEvery);
  }
}

Result<void> CopyEngine::transfer_piece(uint8_t* to, uint64_t from, uint64_t bytes) {
  if (queued_ + bytes > options_.piece_bytes) {
    if (auto r = end_piece(); !r) return r;
  }
  queued_ += bytes;
  return context_.copy_to_host(to, from, bytes, transfers_);
}

Result<void> CopyEngine::transfer(const PinnedPool::Buffer& buffer,
                                  std::span<const PageRef> pages) {
  for (size_t i = 0; i < pages.size();) {
    const Run run = first_run(pages.subspan(i));
    auto r = context_.copy_to_device(pages[i].address, buffer.data() + i * kPageBytes, run.bytes,
                                     transfers_);
    if (!r) return r;
    i += run.pages;
  }
  return {};
}

Result<void> CopyEngine::copy_staged(uint64_t from, std::span<const PageRef> pages) {
  for (size_t i = 0; i < pages.size();) {
    const Run run = first_run(pages.subspan(i));
    auto r = context_.copy_on_device(pages[i].address, from + i * kPageBytes, run.bytes, kernels_);
    if (!r) return r;
    i += run.pages;
  }
  return {};
}

Result<void> CopyEngine::clear(std::span<const PageRef> pages) {
  while (!pages.empty()) {
    const Run run = first_run(pages);
    if (auto r = context_.clear(pages[0].address, run.bytes, kernels_); !r) return r;
    pages = pages.subspan(run.pages);
  }
  return {};
}

// The table goes first, so that it need not wait behind a buffer on the same DMA engine. The hashes
// come back on the kernels' stream: the next buffer's DMA need not wait for them.
Result<void> CopyEngine::start_load(Lane& lane, PagesToLoad work) {
  lane.buffer = std::move(work.buffer);
  lane.expected = std::move(work.hashes);
  auto r = send_table(lane, 0, work.pages);
  if (work.in_place) {
    // Nothing is to be sent.
  } else if (work.staged_at) {
    if (r) r = copy_staged(work.staged_at, work.pages);
  } else if (!lane.buffer) {
    if (r) r = clear(work.pages);
  } else {
    if (r) r = context_.record(lane.sending, transfers_);
    if (r) r = transfer(lane.buffer, work.pages);
    if (r) r = context_.record(lane.sent, transfers_);
    if (r) r = context_.wait(kernels_, lane.sent);
  }
  if (r) r = launch(lane, hash_kernel_);
  if (r) r = fetch_hashes(lane, kernels_);
  return r;
}

Result<void> CopyEngine::finish_hash(Lane& lane) {
  if (auto r = context_.synchronize(lane.done); !r) return r;
  auto ms = context_.elapsed_ms(lane.begin, lane.hashed);
  if (!ms) return ms.error();
  hash_kernels_ms_ += *ms;
  const double ns = *ms * 1e6 / lane.count;
  if (hash_ns_ == 0 || ns < hash_ns_) hash_ns_ = ns;
  return {};
}

}  // namespace phos
