// SPDX-License-Identifier: GPL-2.0-only
#include "test/live/interleaving.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <ostream>
#include <thread>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/image/verify.h"
#include "test/contract/cuda_helpers.h"

namespace live_test {

using phos::DumpStage;
using phos::kPageBytes;
using phos::LiveCopy;
using phos::PageChain;

namespace {

constexpr unsigned kLockTimeoutMs = 30000;

struct Freed {
  void operator()(uint8_t* p) const { free(p); }
};
using Pages = std::unique_ptr<uint8_t, Freed>;

Pages pages_buffer(size_t pages) {
  return Pages(static_cast<uint8_t*>(aligned_alloc(phos::kPageIoAlignment, pages * kPageBytes)));
}

std::string hex(uint64_t n) {
  char text[32];
  snprintf(text, sizeof text, "%llx", static_cast<unsigned long long>(n));
  return text;
}

bool load(const std::string& path, std::vector<uint8_t>* bytes) {
  FILE* f = fopen(path.c_str(), "r");
  const bool read = f && fread(bytes->data(), 1, bytes->size(), f) == bytes->size();
  if (f) fclose(f);
  return read;
}

}  // namespace

Tally& Tally::operator+=(const Tally& other) {
  interleavings += other.interleavings;
  levels += other.levels;
  pages += other.pages;
  here += other.here;
  parent += other.parent;
  zero += other.zero;
  gone += other.gone;
  return *this;
}

std::ostream& operator<<(std::ostream& out, const Tally& t) {
  return out << t.interleavings << " interleavings, " << t.levels << " images, " << t.pages
             << " pages compared (" << t.here << " of the dump itself, " << t.parent
             << " of its parents, " << t.zero << " zero), " << t.gone
             << " allocations freed before the lock";
}

std::string Copier::start() {
  auto driver = phos::open_cuda_driver();
  if (!driver) return driver.error().message();
  driver_ = std::move(*driver);
  auto gpus = driver_->gpus();
  if (!gpus) return gpus.error().message();
  gpus_ = std::move(*gpus);
  phos::PinnedPoolOptions pool;
  pool.buffer_bytes = 2 << 20;
  pool.max_bytes = 64 << 20;
  pool.step_bytes = 16 << 20;
  pool.threads = 2;
  engines_ = std::make_unique<phos::GpuEngines>(*driver_, pool);
  auto key = phos::PageHashKey::generate();
  if (!key) return key.error().message();
  for (const phos::GpuInfo& gpu : gpus_) {
    auto user = engines_->use(gpu.uuid, *key);
    if (!user) return user.error().message();
    open_.push_back(std::move(*user));
  }
  return "";
}

std::string Interleaving::ask(const std::string& command, std::string* value) {
  const std::string reply = application_.ask(command);
  if (reply.substr(0, 2) != "ok") return "the application: " + reply;
  if (value) *value = reply.size() > 3 ? reply.substr(3) : "";
  return "";
}

void Interleaving::wait_a_little() {
  std::this_thread::sleep_for(std::chrono::microseconds(random_() % 4000));
}

phos::ProcessImage Interleaving::new_image(DumpStage stage) {
  phos::ProcessImage image;
  for (size_t i = 0; i < image.dump_id.size(); i++) {
    image.dump_id[i] = static_cast<uint8_t>(random_() >> 8);
  }
  image.pid = application_.pid();
  image.comm = "application";
  image.stage = stage;
  image.driver_release = "none";
  image.driver_api = 13000;
  image.created_us = 1;
  image.phos_version = "test";
  image.gpus = copier_.gpus();
  return image;
}

std::string Interleaving::compare_allocation(const PageChain& chain, size_t index,
                                             const char* how) {
  const phos::AllocationInfo& a = chain.image().allocations[index];
  const std::string file = directory_ + "/memory";
  std::string answer;
  const std::string question =
      std::string(how) + " " + hex(a.address) + " " + std::to_string(a.size) + " " + file;
  if (std::string e = ask(question, &answer); !e.empty()) return e;
  if (std::stoull(answer) != a.buffer_id) {
    tally_.gone++;
    return "";
  }
  std::vector<uint8_t> memory(a.size);
  if (!load(file, &memory)) return "the application has not written " + file;
  uint64_t seen = 0;
  for (const phos::PageRun& run : chain.runs(index)) {
    const Pages pages = pages_buffer(run.pages);
    if (auto r = chain.read(run, pages.get()); !r) return r.error().message();
    for (uint64_t i = 0; i < run.pages; i++) {
      const uint64_t offset = (run.first_page + i) * kPageBytes;
      const uint64_t bytes = std::min<uint64_t>(kPageBytes, a.size - offset);
      seen++;
      if (!memcmp(pages.get() + i * kPageBytes, &memory[offset], bytes)) continue;
      return "page " + std::to_string(offset / kPageBytes) + " of " + std::to_string(a.size) +
             " bytes at 0x" + hex(a.address) + " (buffer " + std::to_string(a.buffer_id) +
             ") is not what the memory holds; saved in " + chain.describe(run) + "; compared by " +
             how;
    }
  }
  if (seen != page_count(a)) return "pages are missing";
  tally_.pages += seen;
  return "";
}

std::string Interleaving::compare(int directory, const char* how) {
  auto chain = PageChain::open(directory, application_.pid(), phos::PageIo::kCached);
  if (!chain) return chain.error().message();
  for (size_t i = 0; i < chain->image().allocations.size(); i++) {
    if (chain->runs(i).empty()) continue;
    if (std::string e = compare_allocation(*chain, i, how); !e.empty()) return e;
  }
  const phos::PageCounts counts = count_pages(chain->image());
  tally_.here += counts.here;
  tally_.parent += counts.parent;
  tally_.zero += counts.zero;
  return "";
}

// Every page of the chain hashes to what was recorded, also in the pre-dumps.
std::string Interleaving::verify(int directory) {
  auto set = phos::read_image_set(directory);
  if (!set) return set.error().message();
  auto make_hasher = [](const std::vector<uint8_t>& bytes) -> phos::Result<phos::PageHasher> {
    auto key = phos::PageHashKey::from_bytes(bytes);
    if (!key) return key.error();
    return phos::PageHasher([key = *key](const void* page) {
      return phos::hash_page(key, page, phos::kPageBytes).bytes;
    });
  };
  auto report = phos::verify_images(directory, std::move(*set), make_hasher, {});
  if (!report) return report.error().message();
  return report->ok() ? "" : describe(report->damage.front());
}

std::string Interleaving::one_level(unsigned number, bool last) {
  const std::string path = directory_ + "/" + std::to_string(number);
  if (mkdir(path.c_str(), 0700)) return "cannot make " + path;
  phos::UniqueFd directory(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  phos::ProcessImage image = new_image(last ? DumpStage::kDump : DumpStage::kPreDump);
  auto store = phos::PageStore::create(directory.get(), image.dump_id, {});
  if (!store) return store.error().message();
  phos::LiveCopyImages images;
  images.store = std::move(*store);
  for (const phos::GpuInfo& gpu : image.gpus) images.gpus.push_back(gpu.uuid);
  if (number) {
    const std::string parent = "../" + std::to_string(number - 1);
    if (symlink(parent.c_str(), (path + "/parent").c_str())) return "cannot make the link";
    auto fd = phos::open_parent(directory.get());
    if (!fd) return fd.error().message();
    auto previous = phos::PreviousPages::open(fd->get(), application_.pid());
    if (!previous) return previous.error().message();
    images.previous = std::move(*previous);
  }

  const int pid = application_.pid();
  auto tid = copier_.driver().restore_thread_id(pid);
  if (!tid) return tid.error().message();
  const auto tracker =
      random_() % 100 < watch_ ? phos::TrackerChoice::kAuto : phos::TrackerChoice::kContent;
  auto started = LiveCopy::start({pid, pid, *tid, tracker}, std::move(images), copier_.engines());
  if (!started) return started.error().message();
  LiveCopy& copy = **started;
  for (unsigned i = random_() % 3 + 1; i > 0; i--) {
    // With a limit the pages are hashed by the CPU, as they arrive; without, on the GPU.
    const double max_slowdown = random_() % 2 ? 0.05 : 0;
    if (auto r = copy.round(max_slowdown); !r) return r.error().message();
    wait_a_little();
  }
  if (!last) {
    if (auto r = copy.forget_freed(); !r) return r.error().message();
  }
  if (auto r = copy.stop_watching(); !r) return r.error().message();
  if (!last) copy.conclude();
  const auto write = [&]() -> phos::Result<void> {
    if (auto r = copy.release(); !r) return r;
    if (auto r = copy.finish(&image); !r) return r;
    return write_process_image(directory.get(), image);
  };
  tally_.levels++;
  if (!last) {
    if (auto r = write(); !r) return r.error().message();
    return verify(directory.get());
  }

  // Past the lock, where that can be done: then it also falls into the middle of calls.
  const bool peek = contract::on_simulation() && random_() % 4;
  if (!peek) {
    if (std::string e = ask("pause"); !e.empty()) return e;
  }
  if (auto r = copier_.driver().lock(pid, kLockTimeoutMs); !r) return r.error().message();
  std::string problem;
  if (auto r = copy.last_round(); !r) problem = r.error().message();
  if (problem.empty()) {
    if (auto r = write(); !r) problem = r.error().message();
  }
  if (peek && problem.empty()) problem = compare(directory.get(), "peek");
  if (auto r = copier_.driver().unlock(pid); !r) return r.error().message();
  if (!peek) {
    if (problem.empty()) problem = compare(directory.get(), "read");
    if (std::string e = ask("resume"); problem.empty()) problem = e;
  }
  return problem;
}

std::string Interleaving::run() {
  const unsigned depth = random_() % 3 ? 1 : 2 + random_() % 3;
  for (unsigned i = 0; i < depth; i++) {
    wait_a_little();
    if (std::string e = one_level(i, i + 1 == depth); !e.empty()) {
      return "level " + std::to_string(i + 1) + " of " + std::to_string(depth) + ": " + e;
    }
  }
  tally_.interleavings++;
  return "";
}

}  // namespace live_test
