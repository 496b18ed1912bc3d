// SPDX-License-Identifier: GPL-2.0-only
// image_bench write|read DIR [--mib N] [--hash]
//
// How fast phos writes and reads pages files, without a GPU: prints JSON. image_io.py compares it
// with fio. The hashes in DIR are made up.
//   write  writes buffers of the pool, which four threads fetch, through a PageStore to a pages
//   file
//          in DIR, until it is durable, as a dump does. --hash: the threads hash each page first,
//          which is what they do unless the GPU has.
//   read   reads that image into buffers of the pool, with the threads and in the pieces of a
//          restore
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/daemon/load_plan.h"
#include "gpu-tracker/daemon/page_prefetch.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/page_store.h"
#include "tools/bench/bench.h"

namespace {

using namespace phos;
using namespace bench;

constexpr int kPid = 1;
constexpr DumpId kDump = {1};
constexpr int kWriters = 4;  // as CopiedMemory has

struct Options {
  uint64_t mib = 4096;
  bool hash = false;
};

// One allocation of all pages, in order.
ProcessImage image_of(uint64_t pages) {
  ProcessImage image;
  image.dump_id = kDump;
  image.pid = kPid;
  image.comm = "image_bench";
  image.driver_api = 13000;
  image.stage = DumpStage::kPreDump;
  image.hash_key.assign(64, 1);
  image.gpus.push_back({});
  AllocationInfo a;
  a.address = 0x7f0000000000;
  a.size = pages * kImagePageSize;
  a.gpu = 0;
  a.path = MemoryPath::kReleased;
  a.hashes.assign(pages, SavedHash{1});
  a.extents.push_back({});
  a.extents[0].pages = static_cast<uint32_t>(pages);
  image.allocations.push_back(std::move(a));
  return image;
}

// Full of random bytes.
void fill(PinnedPool* pool) {
  std::vector<PinnedPool::Buffer> all;
  std::mt19937_64 random(1);
  while (auto buffer = pool->try_acquire()) {
    for (uint64_t i = 0; i < pool->buffer_bytes(); i += 8) {
      const uint64_t word = random();
      memcpy(buffer->data() + i, &word, 8);
    }
    all.push_back(std::move(*buffer));
  }
}

// Claims pages that nobody has yet, and stores them. Gives the buffer back when they are written.
void store_pages(PageStore* store, uint32_t file, uint32_t key, uint32_t first, uint32_t pages,
                 PinnedPool::Buffer buffer) {
  std::vector<PageStore::NewPage> fresh;
  for (uint32_t i = 0; i < pages; i++) {
    SavedHash hash{};
    const uint32_t number = first + i;
    memcpy(hash.data(), &number, sizeof number);
    const auto claim = need(store->claim(file, key, hash, nullptr));
    fresh.push_back({claim.page, buffer.data() + uint64_t{i} * kImagePageSize});
  }
  auto kept = std::make_shared<PinnedPool::Buffer>(std::move(buffer));
  store->store(file, std::move(fresh), [kept](const Result<void>& stored) {
    kept->reset();
    need(stored);
  });
}

void write_image(int dir, const Options& o) {
  PinnedPoolOptions pool_options;
  pool_options.max_bytes = 16 * pool_options.buffer_bytes;
  PinnedPool pool(pool_options);
  need(pool.reserve(pool_options.max_bytes));
  fill(&pool);
  const auto pages = static_cast<uint32_t>((o.mib << 20) / kImagePageSize);
  const auto batch = static_cast<uint32_t>(pool.buffer_bytes() / kImagePageSize);
  const PageHashKey hash_key = need(PageHashKey::generate());
  const auto begin = Clock::now();
  auto store = need(PageStore::create(dir, kDump, {}));
  const uint32_t file = need(store->add_file(kPid, 0));
  const uint32_t key = store->add_key({1});
  std::atomic<uint32_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kWriters; i++) {
    threads.emplace_back([&] {
      for (uint32_t first; (first = next.fetch_add(batch)) < pages;) {
        const uint32_t n = std::min(batch, pages - first);
        PinnedPool::Buffer buffer = need(pool.acquire({}));
        for (uint32_t page = 0; o.hash && page < n; page++) {
          hash_page(hash_key, buffer.data() + uint64_t{page} * kImagePageSize, kImagePageSize);
        }
        store_pages(store.get(), file, key, first, n, std::move(buffer));
      }
    });
  }
  for (auto& t : threads) t.join();
  // All buffers: all is written.
  std::vector<PinnedPool::Buffer> all;
  while (all.size() < pool.max_buffers()) all.push_back(need(pool.acquire({})));
  need(store->finish());
  const double seconds = seconds_since(begin);
  need(write_process_image(dir, image_of(pages)));
  printf("{\"bytes\": %llu, \"seconds\": %.4f}\n",
         static_cast<unsigned long long>(uint64_t{pages} * kImagePageSize), seconds);
}

void read_image(int dir) {
  const PageChain chain = need(PageChain::open(dir, kPid, PageIo::kDirect));
  PinnedPoolOptions pool_options;
  PinnedPool pool(pool_options);
  const unsigned readers = reader_threads();
  need(pool.reserve(readers * pool_options.buffer_bytes));
  LoadPlan plan(static_cast<uint32_t>(pool.buffer_bytes() / kImagePageSize));
  plan.add(chain, 0);
  std::vector<LoadBatch> batches = plan.take_saved();
  std::atomic<size_t> next{0};
  std::atomic<uint64_t> bytes{0};
  const auto begin = Clock::now();
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < readers; i++) {
    threads.emplace_back([&] {
      for (size_t at; (at = next++) < batches.size();) {
        batches[at].buffer = need(pool.acquire({}));
        bytes += need(read_batch(chain, &batches[at]));
        batches[at].buffer.reset();
      }
    });
  }
  for (auto& t : threads) t.join();
  printf("{\"bytes\": %llu, \"seconds\": %.4f, \"readers\": %u}\n",
         static_cast<unsigned long long>(bytes.load()), seconds_since(begin), readers);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  const std::string what = argc > 2 ? argv[1] : "";
  if (what != "write" && what != "read")
    die("usage: image_bench write|read DIR [--mib N] [--hash]");
  for (int i = 3; i < argc; i++) {
    const std::string name = argv[i];
    if (name == "--hash") {
      o.hash = true;
    } else if (i + 1 < argc && name == "--mib") {
      o.mib = strtoull(argv[++i], nullptr, 10);
    } else {
      die("what is " + name + "?");
    }
  }
  const UniqueFd dir(open(argv[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir) die(std::string(argv[2]) + ": " + strerror(errno));
  if (what == "read") {
    read_image(dir.get());
  } else {
    write_image(dir.get(), o);
  }
}
