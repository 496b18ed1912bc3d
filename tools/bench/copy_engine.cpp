// SPDX-License-Identifier: GPL-2.0-only
// usage: copy_bench [--mib N] [--rounds N] [--pool-mib N] [--slots N] [--slowdown SHARE]
// [--load NAMES] [--no-load] [--hash-batch PAGES] [--buffer-mib N] [--piece-kib N]
// [--pieces N] [--link-share SHARE] [--serve]
//
// How fast the copy engine is on the first GPU, against what the hardware can do: prints JSON. The
// kinds of run take turns, so that clocks and neighbours are the same for all:
//   dma    cuMemcpyDtoHAsync into pinned buffers, nothing else
//   copy   CopyEngine::copy into a sink that throws the buffers away, without a limit
//   paced  the same with a limit (--slowdown, 0.03): nothing but DMA on the GPU, hashed later
//   read   a kernel that only reads memory
//   hash   CopyEngine::hash, without a limit
//   h2d    cuMemcpyHtoDAsync from pinned buffers, nothing else
//   load   CopyEngine::load of pages that are in pinned buffers, each hashed on the GPU
//   zero   CopyEngine::load of zeros, which the GPU writes
// --serve: no such runs. For each line `SECONDS` of standard input, copies (paced) for that long
// and prints `copied BYTES`.
//
// Unless --no-load, a second process then keeps the GPU busy (--load: in which ways), and the runs
// say how fast the engine is then, and what that process loses (by windows of half a second with
// and without, in turns; the median of the pairs). It stands for
//   reader   one long kernel after the other that only reads memory: the worst case
//   decode   generating: 60 kernels of some 20 us in a row, a pause for the CPU
//   train    kernels long and short, queued ahead
//   storm    launches of kernels that do nothing
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "gpu-tracker/copy/engine.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "tools/bench/bench.h"
#include "tools/bench/read_arguments.h"

extern "C" const char phos_bench_read_ptx[];

namespace {

using namespace phos;
using namespace bench;

struct Options {
  uint64_t mib = 8192;
  int rounds = 7;
  uint64_t pool_mib = 8192;
  unsigned slots = CopyEngineOptions().slots;
  uint32_t piece_kib = CopyEngineOptions().piece_bytes >> 10;
  unsigned pieces = CopyEngineOptions().pieces;
  double link_share = CopyEngineOptions().link_share;
  double slowdown = 0.03;
  uint32_t hash_batch = CopyEngineOptions().hash_batch_pages;
  bool serve = false;
  uint64_t buffer_mib = PinnedPoolOptions().buffer_bytes >> 20;
  std::string load = "reader,decode,train,storm";
};

struct Summary {
  double median, least, most;
};
Summary summarize(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return {v[v.size() / 2], v.front(), v.back()};
}

// One GPU, its memory full of random bytes, and the ways to read it.
class Bench {
 public:
  Bench(GpuDriver& driver, const Options& options) : options_(options) {
    const auto gpus = need(driver.gpus());
    if (gpus.empty()) die("there is no GPU");
    name_ = gpus[0].name;
    const auto begin = Clock::now();
    context_ = need(driver.open_context(gpus[0].uuid));
    context_seconds_ = seconds_since(begin);
    blocks_ = 4 * static_cast<unsigned>(need(context_->multiprocessors()));
    stream_ = need(context_->create_stream());
    read_ =
        need(context_->kernel(need(context_->load_module(phos_bench_read_ptx)), "phos_bench_read"));
    out_ = need(context_->allocate(4096));
    bytes_ = options.mib << 20;
    source_ = need(context_->allocate(bytes_));
  }

  GpuContext& context() { return *context_; }
  const std::string& name() const { return name_; }

  void open_engine(PinnedPool& pool) {
    pool_ = &pool;
    need(pool.attach(*context_));
    CopyEngineOptions options;
    options.slots = options_.slots;
    options.hash_batch_pages = options_.hash_batch;
    options.piece_bytes = options_.piece_kib << 10;
    options.pieces = options_.pieces;
    options.link_share = options_.link_share;
    const auto begin = Clock::now();
    engine_ = need(CopyEngine::create(*context_, pool, key_, options));
    engine_seconds_ = seconds_since(begin);
    limit_.set_max_slowdown(options_.slowdown);
    for (uint64_t at = 0; at < bytes_; at += kPageBytes) {
      pages_.push_back({source_ + at, kPageBytes});
    }
    hashes_.resize(pages_.size());
    fill();
  }
  CopyEngine& engine() { return *engine_; }
  double context_seconds() const { return context_seconds_; }
  double engine_seconds() const { return engine_seconds_; }  // compiles the kernels

  void start_read(uint64_t bytes) {
    const phos_bench::ReadArguments arguments = {source_, bytes / 16, out_};
    need(context_->launch(read_, bytes < 1 << 20 ? 1 : blocks_, 512, &arguments, stream_));
  }
  void wait() { need(context_->synchronize(stream_)); }
  void read() {
    start_read(bytes_);
    wait();
  }
  void hash(bool limited = false) {
    need(engine_->hash(pages_, hashes_, limited ? limit_ : none_));
  }
  void copy(bool limited = false) {
    need(engine_->copy(
        pages_, [](CopiedPages) -> Result<void> { return {}; }, limited ? limit_ : none_));
  }
  // As many transfers in flight as the engine has.
  void dma() {
    std::vector<PinnedPool::Buffer> buffers;
    for (unsigned i = 0; i < options_.slots; i++) buffers.push_back(need(pool_->acquire({})));
    size_t next = 0;
    for (uint64_t at = 0; at < bytes_; at += pool_->buffer_bytes()) {
      auto& buffer = buffers[next++ % buffers.size()];
      need(context_->copy_to_host(buffer.data(), source_ + at, pool_->buffer_bytes(), stream_));
    }
    need(context_->synchronize(stream_));
  }

  // The same to the GPU, and what is there already: the memory stays as it is.
  void dma_to_device() {
    std::vector<PinnedPool::Buffer> buffers;
    for (unsigned i = 0; i < options_.slots; i++) buffers.push_back(need(pool_->acquire({})));
    size_t next = 0;
    for (uint64_t at = 0; at < bytes_; at += pool_->buffer_bytes()) {
      auto& buffer = buffers[next++ % buffers.size()];
      need(context_->copy_to_device(source_ + at, buffer.data(), pool_->buffer_bytes(), stream_));
    }
    need(context_->synchronize(stream_));
  }
  void load() { load_from(block_hashes_, true); }
  void load_zeros() {
    load_from({pool_->buffer_bytes() / kPageBytes, hash_page(key_, "", 1)}, false);
  }
  // Every buffer of the pool with what the memory is full of.
  void warm_up() {
    std::vector<PinnedPool::Buffer> buffers;
    while (auto buffer = pool_->acquire_spare({}, {})) {
      memcpy(buffer->data(), block_.data(), block_.size());
      buffers.push_back(std::move(*buffer));
    }
  }

  // Hashes in place, and those that came with copied bytes, against the CPU's.
  bool verify() {
    hash();
    size_t wrong = 0, seen = 0;
    for (const Pace* pace : {&none_, &limit_}) {
      need(engine_->copy(
          pages_,
          [&](CopiedPages copied) -> Result<void> {
            copied.hash(key_);
            for (size_t i = 0; i < copied.hashes.size(); i += 61) {
              const auto expected =
                  hash_page(key_, copied.buffer.data() + i * kPageBytes, kPageBytes);
              wrong += copied.hashes[i] != expected || hashes_[copied.first + i] != expected;
              seen++;
            }
            return {};
          },
          *pace));
    }
    return !wrong && seen;
  }

  // Of the last hash(), as if its kernels had followed each other at once.
  double hash_kernels_rate() const {
    return static_cast<double>(bytes_) / 1e6 / engine_->last_hash_kernels_ms();
  }

  // Gigabytes a second.
  double rate(const std::function<void()>& run) {
    const auto begin = Clock::now();
    run();
    return static_cast<double>(bytes_) / 1e9 / seconds_since(begin);
  }

 private:
  // Loads all memory, each buffer full with the pages of these hashes.
  void load_from(const std::vector<PageHash>& hashes, bool with_buffer) {
    size_t next = 0;
    need(engine_->load([&](bool may_wait, PagesToLoad* work) -> Result<LoadState> {
      if (next == pages_.size()) return LoadState::kEnd;
      if (with_buffer) {
        auto buffer = pool_->try_acquire();
        if (!buffer && !may_wait) return LoadState::kLater;
        work->buffer = buffer ? std::move(*buffer) : need(pool_->acquire({}));
      }
      const auto first = pages_.begin() + static_cast<ptrdiff_t>(next);
      const size_t n = std::min(hashes.size(), pages_.size() - next);
      work->pages.assign(first, first + static_cast<ptrdiff_t>(n));
      work->hashes.assign(hashes.begin(), hashes.begin() + static_cast<ptrdiff_t>(n));
      next += n;
      return LoadState::kPages;
    }));
  }

  void fill() {
    auto buffer = need(pool_->acquire({}));
    std::mt19937_64 random(1);
    auto* words = reinterpret_cast<uint64_t*>(buffer.data());
    for (size_t i = 0; i < pool_->buffer_bytes() / 8; i++) words[i] = random();
    block_.assign(buffer.data(), buffer.data() + pool_->buffer_bytes());
    for (size_t at = 0; at < block_.size(); at += kPageBytes) {
      block_hashes_.push_back(hash_page(key_, &block_[at], kPageBytes));
    }
    for (uint64_t at = 0; at < bytes_; at += pool_->buffer_bytes()) {
      need(context_->copy_to_device(source_ + at, words, pool_->buffer_bytes(), stream_));
    }
    need(context_->synchronize(stream_));
  }

  const Options options_;
  std::string name_;
  const PageHashKey key_ = need(PageHashKey::generate());
  Pace none_, limit_;
  std::unique_ptr<GpuContext> context_;
  std::unique_ptr<CopyEngine> engine_;
  PinnedPool* pool_ = nullptr;
  GpuStream stream_ = nullptr;
  GpuKernel read_ = nullptr;
  unsigned blocks_ = 0;
  uint64_t bytes_ = 0, source_ = 0, out_ = 0;
  double context_seconds_ = 0, engine_seconds_ = 0;
  std::vector<PageRef> pages_;
  std::vector<PageHash> hashes_;
  std::vector<uint8_t> block_;  // what the memory holds, again and again
  std::vector<PageHash> block_hashes_;
};

// A process that keeps the GPU busy in one of several ways, and counts.
class Neighbour {
 public:
  enum Kind { kNone, kReader, kDecode, kTrain, kStorm };
  struct Shared {
    std::atomic<uint64_t> steps{0};
    std::atomic<Kind> kind{kNone};
  };

  // Before this process has called CUDA: a forked child of a CUDA process cannot.
  explicit Neighbour(uint64_t mib) {
    void* p =
        mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap failed");
    shared_ = new (p) Shared;
    pid_ = fork();
    if (pid_ == 0) run(mib);
  }
  ~Neighbour() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Neighbour(const Neighbour&) = delete;
  Neighbour& operator=(const Neighbour&) = delete;

  void start(Kind kind) {
    const uint64_t before = shared_->steps;
    shared_->kind = kind;
    while (shared_->steps < before + 10) usleep(10000);
  }
  void stop() { shared_->kind = kNone; }
  // Steps a second while `work` runs; repeated for half a second at least.
  double rate(const std::function<void()>& work) {
    const uint64_t before = shared_->steps;
    const auto begin = Clock::now();
    do {
      work();
    } while (seconds_since(begin) < 0.5);
    return static_cast<double>(shared_->steps - before) / seconds_since(begin);
  }

 private:
  [[noreturn]] void run(uint64_t mib) {
    while (shared_->kind == kNone) usleep(10000);
    Options options;
    options.mib = std::min<uint64_t>(mib, 1024);
    auto driver = need(open_cuda_driver());
    Bench bench(*driver, options);
    while (getppid() != 1) {
      step(bench, options.mib << 20);
      shared_->steps++;
    }
    _exit(0);
  }

  void step(Bench& bench, uint64_t most) {
    auto read = [&](uint64_t mib) { bench.start_read(std::min(mib << 20, most)); };
    switch (shared_->kind) {
      case kNone:
        usleep(10000);
        return;
      case kReader:
        bench.read();
        return;
      case kDecode:
        for (int i = 0; i < 60; i++) read(96);
        bench.wait();
        usleep(200);
        return;
      case kTrain:
        for (uint64_t i = 0; i < 40; i++) {
          read(64 + i % 3 * 64);
          read(i % 5);
          bench.start_read(16);
        }
        bench.wait();
        usleep(50);
        return;
      case kStorm:
        for (int i = 0; i < 200; i++) bench.start_read(16);
        bench.wait();
    }
  }

  Shared* shared_ = nullptr;
  pid_t pid_ = -1;
};

// Time to make a pool of this size, alone and with pinning.
void bench_pool(GpuContext& context, uint64_t bytes, bool huge) {
  PinnedPoolOptions options;
  options.max_bytes = bytes;
  options.huge_pages = huge;
  PinnedPool pool(options);
  auto begin = Clock::now();
  need(pool.reserve(bytes));
  const double make = seconds_since(begin);
  begin = Clock::now();
  need(pool.attach(context));
  const double pin = seconds_since(begin);
  const auto s = pool.statistics();
  printf("  \"pool_%s\": {\"mib\": %llu, \"huge_mib\": %llu, \"make_s\": %.3f, \"pin_s\": %.3f},\n",
         huge ? "huge" : "small",
         static_cast<unsigned long long>(s.buffers * options.buffer_bytes >> 20),
         static_cast<unsigned long long>(s.huge_bytes >> 20), make, pin);
}

using Runs = std::map<std::string, std::vector<double>>;

double median(const Runs& runs, const char* name) {
  return summarize(runs.at(name)).median;
}

void print(const Runs& runs, const char* title) {
  printf("  \"%s\": {\n", title);
  for (const auto& [name, values] : runs) {
    const Summary s = summarize(values);
    printf("    \"%s\": {\"median\": %.1f, \"min\": %.1f, \"max\": %.1f},\n", name.c_str(),
           s.median, s.least, s.most);
  }
}

void bench_alone(Bench& bench, int rounds) {
  Runs runs;
  std::vector<double> kernels;
  bench.warm_up();
  for (int i = 0; i <= rounds; i++) {
    const std::pair<const char*, double> results[] = {
        {"dma", bench.rate([&] { bench.dma(); })},
        {"copy", bench.rate([&] { bench.copy(); })},
        {"paced", bench.rate([&] { bench.copy(true); })},
        {"read", bench.rate([&] { bench.read(); })},
        {"hash", bench.rate([&] { bench.hash(); })},
        // Zeros last but for what makes the memory what it was.
        {"zero", bench.rate([&] { bench.load_zeros(); })},
        {"h2d", bench.rate([&] { bench.dma_to_device(); })},
        {"load", bench.rate([&] { bench.load(); })}};
    if (i == 0) continue;  // to warm up
    for (const auto& [name, rate] : results) runs[name].push_back(rate);
    kernels.push_back(bench.hash_kernels_rate());
  }
  print(runs, "alone_gb_per_s");
  printf("    \"hash_kernel_best\": %.1f, \"hash_kernels\": %.1f,\n",
         kPageBytes / bench.engine().hash_ns_per_page(), summarize(kernels).median);
  printf(
      "    \"copy_to_dma\": %.3f, \"paced_to_dma\": %.3f, \"hash_to_read\": %.3f, "
      "\"load_to_h2d\": %.3f\n  },\n",
      median(runs, "copy") / median(runs, "dma"), median(runs, "paced") / median(runs, "dma"),
      median(runs, "hash") / median(runs, "read"), median(runs, "load") / median(runs, "h2d"));
}

void bench_loaded(Bench& bench, Neighbour& neighbour, const char* name, Neighbour::Kind kind,
                  int rounds) {
  neighbour.start(kind);
  const std::map<std::string, std::function<void()>> kinds = {
      {"dma", [&] { bench.dma(); }},
      {"copy", [&] { bench.copy(); }},
      {"paced", [&] { bench.copy(true); }},
      {"paced_hash", [&] { bench.hash(true); }}};
  Runs runs, lost;
  for (int i = 0; i < rounds; i++) {
    for (const auto& [run_name, run] : kinds) {
      std::vector<double> rates;
      const double alone = neighbour.rate([] { usleep(100000); });
      const double beside = neighbour.rate([&] { rates.push_back(bench.rate(run)); });
      lost[run_name].push_back(100 * (1 - beside / alone));
      runs[run_name].push_back(summarize(rates).median);
    }
  }
  neighbour.stop();
  print(runs, (std::string("beside_") + name + "_gb_per_s").c_str());
  printf("    \"copy_to_dma\": %.3f, \"paced_to_dma\": %.3f\n  },\n",
         median(runs, "copy") / median(runs, "dma"), median(runs, "paced") / median(runs, "dma"));
  print(lost, (std::string(name) + "_loses_percent").c_str());
  printf("    \"rounds\": %d\n  },\n", rounds);
}

void serve(Bench& bench, uint64_t bytes) {
  printf("ready\n");
  for (double seconds; scanf("%lf", &seconds) == 1;) {
    const auto begin = Clock::now();
    uint64_t copied = 0;
    for (; seconds_since(begin) < seconds; copied += bytes) bench.copy(true);
    printf("copied %llu\n", static_cast<unsigned long long>(copied));
  }
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (name == "--no-load" || name == "--serve") {
      o.load.clear();
      o.serve = o.serve || name == "--serve";
      continue;
    }
    if (++i == argc) die("usage: see the top of tools/bench/copy_engine.cpp");
    if (name == "--load") {
      o.load = argv[i];
      continue;
    }
    const double value = atof(argv[i]);
    if (name == "--mib") {
      o.mib = static_cast<uint64_t>(value);
    } else if (name == "--rounds") {
      o.rounds = static_cast<int>(value);
    } else if (name == "--pool-mib") {
      o.pool_mib = static_cast<uint64_t>(value);
    } else if (name == "--slots") {
      o.slots = static_cast<unsigned>(value);
    } else if (name == "--piece-kib") {
      o.piece_kib = static_cast<uint32_t>(value);
    } else if (name == "--link-share") {
      o.link_share = value;
    } else if (name == "--pieces") {
      o.pieces = static_cast<unsigned>(value);
    } else if (name == "--buffer-mib") {
      o.buffer_mib = static_cast<uint64_t>(value);
    } else if (name == "--hash-batch") {
      o.hash_batch = static_cast<uint32_t>(value);
    } else if (name == "--slowdown") {
      o.slowdown = value;
    } else {
      die("unknown option " + name);
    }
  }
  if (!o.mib || o.mib % 32 || o.rounds < 1 || !o.slots || !o.pieces)
    die("sizes must be multiples of 32 MiB, counts positive");
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const Options options = parse(argc, argv);
  std::unique_ptr<Neighbour> neighbour;
  if (!options.load.empty()) neighbour = std::make_unique<Neighbour>(options.mib);
  auto driver = need(open_cuda_driver());
  PinnedPoolOptions pool_options;
  pool_options.buffer_bytes = options.buffer_mib << 20;
  pool_options.max_bytes = uint64_t{options.slots + 8} * pool_options.buffer_bytes;
  PinnedPool pool(pool_options);
  Bench bench(*driver, options);
  if (options.serve) {
    bench.open_engine(pool);
    serve(bench, options.mib << 20);
    return 0;
  }
  printf("{\n  \"gpu\": \"%s\",\n  \"mib\": %llu, \"rounds\": %d, \"slots\": %u,\n",
         bench.name().c_str(), static_cast<unsigned long long>(options.mib), options.rounds,
         options.slots);
  const auto own = [&] { return need(driver->process_memory(getpid())).own >> 20; };
  const uint64_t before = own() - options.mib;
  bench.open_engine(pool);
  printf("  \"open_context_s\": %.3f, \"make_engine_s\": %.3f,\n", bench.context_seconds(),
         bench.engine_seconds());
  printf("  \"context_mib\": %llu, \"engine_mib\": %llu,\n",
         static_cast<unsigned long long>(before),
         static_cast<unsigned long long>(bench.engine().device_bytes() >> 20));
  const bool verified = bench.verify();
  printf("  \"hashes_verified\": %s,\n", verified ? "true" : "false");
  bench_alone(bench, options.rounds);
  if (neighbour) {
    const std::map<std::string, Neighbour::Kind> kinds = {{"reader", Neighbour::kReader},
                                                          {"decode", Neighbour::kDecode},
                                                          {"train", Neighbour::kTrain},
                                                          {"storm", Neighbour::kStorm}};
    for (const auto& [name, kind] : kinds) {
      if (options.load.find(name) == std::string::npos) continue;
      bench_loaded(bench, *neighbour, name.c_str(), kind, options.rounds);
    }
  }
  if (options.pool_mib) {
    bench_pool(bench.context(), options.pool_mib << 20, true);
    bench_pool(bench.context(), options.pool_mib << 20, false);
  }
  need(pool.detach());
  printf("  \"total_mib\": %llu\n}\n", static_cast<unsigned long long>(own()));
  return verified ? 0 : 1;
}
