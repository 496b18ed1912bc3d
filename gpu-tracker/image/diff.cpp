// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/diff.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>

#include "gpu-tracker/image/page_walk.h"

namespace phos {
namespace {

// Allocations of both dumps that are compared, as indices into their lists, and where the result
// goes.
struct Pair {
  size_t first = 0, second = 0;
  size_t result = 0;
};

std::vector<size_t> by_place(const ProcessImage& image) {
  std::vector<size_t> order(image.allocations.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return image.allocations[a].address < image.allocations[b].address;
  });
  return order;
}

AllocationDiff describe(const AllocationInfo& a, Presence presence) {
  AllocationDiff d;
  d.presence = presence;
  d.address = a.address;
  d.size = a.size;
  d.kind = a.kind;
  return d;
}

bool same_gpu(const ProcessImage& first, const AllocationInfo& a, const ProcessImage& second,
              const AllocationInfo& b) {
  if (a.gpu < 0 || b.gpu < 0) return a.gpu < 0 && b.gpu < 0;
  return first.gpus[static_cast<size_t>(a.gpu)].uuid ==
         second.gpus[static_cast<size_t>(b.gpu)].uuid;
}

ProcessDiff new_diff(const ProcessImage& image, Presence presence) {
  ProcessDiff diff;
  diff.presence = presence;
  diff.pid = image.pid;
  diff.comm = image.comm;
  return diff;
}

ProcessDiff only_in_one(const ProcessImage& image, Presence presence) {
  ProcessDiff diff = new_diff(image, presence);
  for (size_t i : by_place(image)) {
    diff.allocations.push_back(describe(image.allocations[i], presence));
  }
  return diff;
}

// Which allocations are in both, which of them can be compared.
std::vector<Pair> match(const ProcessImage& first, const ProcessImage& second, ProcessDiff* diff) {
  const std::vector<size_t> before = by_place(first), after = by_place(second);
  std::vector<Pair> pairs;
  auto i = before.begin(), j = after.begin();
  while (i != before.end() || j != after.end()) {
    const AllocationInfo* a = i == before.end() ? nullptr : &first.allocations[*i];
    const AllocationInfo* b = j == after.end() ? nullptr : &second.allocations[*j];
    if (a && b && a->address == b->address && a->size == b->size) {
      AllocationDiff d = describe(*b, Presence::kBoth);
      d.other_gpu = !same_gpu(first, *a, second, *b);
      d.compared = !a->hashes.empty() && !b->hashes.empty();
      if (d.compared) {
        d.live_copy = a->path == MemoryPath::kDriver || b->path == MemoryPath::kDriver;
        d.pages = a->hashes.size();
        pairs.push_back({*i, *j, diff->allocations.size()});
      }
      diff->allocations.push_back(d);
      ++i;
      ++j;
    } else if (a && (!b || a->address <= b->address)) {
      diff->allocations.push_back(describe(*a, Presence::kWent));
      ++i;
    } else {
      diff->allocations.push_back(describe(*b, Presence::kAppeared));
      ++j;
    }
  }
  return pairs;
}

void compare_hashes(const ProcessImage& first, const ProcessImage& second,
                    const std::vector<Pair>& pairs, ProcessDiff* diff) {
  for (const Pair& p : pairs) {
    const auto& a = first.allocations[p.first].hashes;
    const auto& b = second.allocations[p.second].hashes;
    uint64_t& differing = diff->allocations[p.result].differing;
    for (size_t i = 0; i < a.size(); i++) differing += a[i] != b[i];
  }
}

// One dump's pages of a process, each checked when it is read.
struct Side {
  static Result<Side> open(int dir_fd, ProcessImage image, const MakePageHasher& make_hasher) {
    auto hash = make_hasher(image.hash_key);
    if (!hash) return hash.error().wrap("process " + std::to_string(image.pid));
    auto chain = PageChain::open(dir_fd, std::move(image), PageIo::kDirect);
    if (!chain) return chain.error();
    return Side{std::move(*chain), std::move(*hash)};
  }

  PageChain chain;
  PageHasher hash;
};

// `progress` is told how many pages were compared.
Result<void> compare_contents(const Side& first, const Side& second, const std::vector<Pair>& pairs,
                              unsigned jobs, const std::function<void(uint64_t)>& progress,
                              ProcessDiff* diff) {
  std::vector<uint64_t> pages;
  for (const Pair& p : pairs) pages.push_back(diff->allocations[p.result].pages);
  std::vector<std::atomic<uint64_t>> differing(pairs.size());
  std::atomic<uint64_t> done{0};
  auto work = [&](const PageSpan& span, uint8_t* buffer) -> Result<void> {
    uint8_t* const other = buffer + size_t{kSpanPages} * kImagePageSize;
    const Pair& p = pairs[span.item];
    auto ok = read_checked(first.chain, p.first, span.first_page, span.pages, first.hash, buffer);
    if (ok) {
      ok = read_checked(second.chain, p.second, span.first_page, span.pages, second.hash, other);
    }
    if (!ok) return ok;
    for (size_t i = 0; i < span.pages; i++) {
      const size_t at = i * kImagePageSize;
      differing[span.item] += memcmp(buffer + at, other + at, kImagePageSize) != 0;
    }
    done += span.pages;
    return {};
  };
  auto ok = walk_pages(pages, jobs, size_t{2} * kSpanPages, work, [&] { progress(done); });
  if (!ok) return ok;
  for (size_t i = 0; i < pairs.size(); i++) {
    diff->allocations[pairs[i].result].differing = differing[i];
  }
  return {};
}

}  // namespace

const char* to_string(Presence presence) {
  return presence == Presence::kBoth ? "both" : presence == Presence::kWent ? "went" : "appeared";
}

Result<std::vector<ProcessDiff>> diff_images(int first_fd, ImageSet first, int second_fd,
                                             ImageSet second, const MakePageHasher& make_hasher,
                                             const DiffOptions& options) {
  std::vector<ProcessDiff> diffs;
  // What is compared by its contents, afterwards, so that all of it is known to `progress`.
  struct Read {
    size_t diff;
    ProcessImage *first, *second;
    std::vector<Pair> pairs;
  };
  std::vector<Read> reads;
  uint64_t to_read = 0;
  auto i = first.processes.begin(), j = second.processes.begin();
  while (i != first.processes.end() || j != second.processes.end()) {
    if (j == second.processes.end() || (i != first.processes.end() && i->pid < j->pid)) {
      diffs.push_back(only_in_one(*i++, Presence::kWent));
      continue;
    }
    if (i == first.processes.end() || j->pid < i->pid) {
      diffs.push_back(only_in_one(*j++, Presence::kAppeared));
      continue;
    }
    ProcessDiff& diff = diffs.emplace_back(new_diff(*j, Presence::kBoth));
    std::vector<Pair> pairs = match(*i, *j, &diff);
    diff.by_hashes = i->hash_key == j->hash_key;
    if (diff.by_hashes) {
      compare_hashes(*i, *j, pairs, &diff);
    } else {
      for (const Pair& p : pairs) to_read += diff.allocations[p.result].pages;
      reads.push_back({diffs.size() - 1, &*i, &*j, std::move(pairs)});
    }
    ++i;
    ++j;
  }
  uint64_t read = 0;
  for (const Read& r : reads) {
    if (r.pairs.empty()) continue;
    auto a = Side::open(first_fd, std::move(*r.first), make_hasher);
    if (!a) return a.error();
    auto b = Side::open(second_fd, std::move(*r.second), make_hasher);
    if (!b) return b.error();
    auto progress = [&](uint64_t n) {
      if (options.progress) options.progress(read + n, to_read);
    };
    auto ok = compare_contents(*a, *b, r.pairs, options.jobs, progress, &diffs[r.diff]);
    if (!ok) return ok.error();
    for (const Pair& p : r.pairs) read += diffs[r.diff].allocations[p.result].pages;
  }
  return diffs;
}

}  // namespace phos
