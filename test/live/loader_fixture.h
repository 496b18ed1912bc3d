// SPDX-License-Identifier: GPL-2.0-only
// A worker whose memory is saved by LiveCopy, spoilt, and loaded again by MemoryLoader.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "gpu-tracker/daemon/memory_loader.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/driver/fault_driver.h"
#include "test/contract/fixture.h"

namespace live_test {

#define ASSERT_OK(expression)                               \
  do {                                                      \
    const auto& result_ = (expression);                     \
    ASSERT_TRUE(result_.ok()) << result_.error().message(); \
  } while (0)

using Bytes = std::string;
inline constexpr uint64_t kPage = phos::kImagePageSize;
inline constexpr uint64_t kMiB = 1 << 20;

// Memory of the worker, and what the application has put there.
struct Memory {
  std::string address;  // hexadecimal, as the worker says it
  Bytes bytes;
  int device = 0;
  uint64_t number() const { return strtoull(address.c_str(), nullptr, 16); }
};

class LoaderTest : public contract::WorkerTest {
 protected:
  void SetUp() override {
    contract::WorkerTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    auto driver = phos::open_cuda_driver();
    ASSERT_OK(driver);
    driver_ = std::move(*driver);
    faults_ = std::make_unique<phos::FaultDriver>(*driver_);
    auto gpus = driver_->gpus();
    ASSERT_OK(gpus);
    gpus_ = *gpus;
    make_engines(32);
    ASSERT_NE(mkdtemp(directory_), nullptr);
    process_.emplace("cuda");
  }
  void TearDown() override {
    agent_.reset();
    loader_.reset();
    chain_.reset();
    const auto pool = engines_ ? engines_->pool_statistics() : phos::PinnedPool::Statistics();
    EXPECT_EQ(pool.in_use, 0u);
    engines_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }

  // Pages that are read ahead stay in host memory unless the options say so.
  void make_engines(uint64_t buffers, phos::GpuEngines::Options options = {.stage = false}) {
    phos::PinnedPoolOptions pool;
    pool.buffer_bytes = 2 << 20;
    pool.max_bytes = buffers * pool.buffer_bytes;
    pool.step_bytes = 4 << 20;
    pool.threads = 1;
    engines_ = std::make_unique<phos::GpuEngines>(*faults_, pool, options);
  }

  // ---- the application
  std::string file(const char* name) const { return std::string(directory_) + "/" + name; }
  Bytes random_bytes(uint64_t n) {
    Bytes bytes(n, 0);
    for (char& c : bytes) c = static_cast<char>(random_() >> 16);
    return bytes;
  }
  // What is allocated from now on is there; copies of memory that others may not access, too.
  void use_device(int device) {
    if (device == device_) return;
    ASSERT_EQ(process_->ask("use-device " + std::to_string(device)), "ok");
    device_ = device;
  }
  void put(const Memory& m) {
    ASSERT_NO_FATAL_FAILURE(use_device(m.device));
    std::ofstream(file("bytes"), std::ios::binary).write(m.bytes.data(), m.bytes.size());
    ASSERT_EQ(process_->ask("upload " + m.address + " " + file("bytes")), "ok");
  }
  void allocate(Bytes bytes) {
    Memory m{contract::value_of(process_->ask("alloc " + std::to_string(bytes.size()))),
             std::move(bytes), device_};
    ASSERT_NO_FATAL_FAILURE(put(m));
    memory_.push_back(std::move(m));
  }
  // VMM memory, which is handed over by file descriptor.
  void map(Bytes bytes) {
    Memory m{contract::value_of(process_->ask("map " + std::to_string(bytes.size()) + " 1 1")),
             std::move(bytes), device_};
    ASSERT_NO_FATAL_FAILURE(put(m));
    memory_.push_back(std::move(m));
  }
  void spoil() {
    for (const Memory& m : memory_) {
      ASSERT_NO_FATAL_FAILURE(put({m.address, random_bytes(m.bytes.size()), m.device}));
    }
  }
  void expect_all_there() {
    for (const Memory& m : memory_) {
      const std::string size = std::to_string(m.bytes.size());
      ASSERT_NO_FATAL_FAILURE(use_device(m.device));
      ASSERT_EQ(process_->ask("download " + m.address + " " + size + " " + file("bytes")), "ok");
      std::ifstream in(file("bytes"), std::ios::binary);
      const Bytes now{std::istreambuf_iterator<char>(in), {}};
      ASSERT_EQ(now.size(), m.bytes.size());
      const auto differs = std::mismatch(now.begin(), now.end(), m.bytes.begin()).first;
      EXPECT_TRUE(differs == now.end())
          << size << " bytes at " << m.address << ": byte " << differs - now.begin() << " differs";
    }
  }

  // ---- phosd
  // Saves it all in directory `level`, upon the one before.
  void save(int level) {
    const std::string path = file(std::to_string(level).c_str());
    ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
    phos::UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    const int pid = process_->pid();
    phos::ProcessImage image;
    image.dump_id.fill(static_cast<uint8_t>(level));
    auto store = phos::PageStore::create(fd.get(), image.dump_id, {});
    ASSERT_OK(store);
    phos::LiveCopyImages images;
    images.store = std::move(*store);
    for (const phos::GpuInfo& gpu : gpus_) images.gpus.push_back(gpu.uuid);
    if (level > 1) {
      ASSERT_EQ(symlink(("../" + std::to_string(level - 1)).c_str(), (path + "/parent").c_str()),
                0);
      auto parent = phos::open_parent(fd.get());
      ASSERT_OK(parent);
      auto previous = phos::PreviousPages::open(parent->get(), pid);
      ASSERT_OK(previous);
      images.previous = std::move(*previous);
    }
    image.pid = pid;
    image.comm = "worker";
    image.driver_release = "none";
    image.driver_api = 13000;
    image.created_us = 1;
    image.phos_version = "test";
    image.gpus = gpus_;
    auto tid = driver_->restore_thread_id(pid);
    ASSERT_OK(tid);
    auto copy = phos::LiveCopy::start({pid, pid, *tid}, std::move(images), *engines_);
    ASSERT_OK(copy);
    ASSERT_OK((*copy)->round(0));
    ASSERT_OK((*copy)->forget_freed());
    ASSERT_OK((*copy)->stop_watching());
    (*copy)->conclude();
    ASSERT_OK((*copy)->release());
    ASSERT_OK((*copy)->finish(&image));
    for (auto& a : image.allocations) {
      if (!a.hashes.empty()) a.path = phos::MemoryPath::kReleased;
    }
    ASSERT_OK(write_process_image(fd.get(), image));
  }
  void open_chain(int level) {
    loader_.reset();
    phos::UniqueFd fd(
        open(file(std::to_string(level).c_str()).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    auto chain = phos::PageChain::open(fd.get(), process_->pid(), phos::PageIo::kDirect);
    ASSERT_OK(chain);
    chain_.emplace(std::move(*chain));
    auto loader = phos::MemoryLoader::create(*chain_, *engines_);
    ASSERT_OK(loader);
    loader_ = std::move(*loader);
  }
  size_t index_of(uint64_t address) const {
    const auto& all = chain_->image().allocations;
    for (size_t i = 0; i < all.size(); i++) {
      if (all[i].address == address) return i;
    }
    ADD_FAILURE() << "the image has nothing at that address";
    return 0;
  }

  // All memory, as the agent in the process describes it and hands it over.
  std::vector<phos::MemoryToLoad> exported() {
    std::vector<phos::MemoryToLoad> out;
    if (!agent_) {
      auto tid = driver_->restore_thread_id(process_->pid());
      EXPECT_TRUE(tid);
      auto agent = phos::Agent::attach(process_->pid(), *tid);
      EXPECT_TRUE(agent) << agent.error().message();
      agent_.emplace(std::move(*agent));
    }
    auto seen = agent_->enumerate();
    EXPECT_TRUE(seen) << seen.error().message();
    for (const Memory& m : memory_) {
      for (const phos::AgentAllocation& a : *seen) {
        if (a.address != m.number()) continue;
        auto handles = agent_->export_memory({&a, 1}, phos::AgentGuard::kCaller);
        EXPECT_TRUE(handles) << handles.error().message();
        out.push_back({index_of(a.address), a, std::move((*handles)[0])});
      }
    }
    EXPECT_EQ(out.size(), memory_.size());
    return out;
  }

  // GPU memory of others that this process has mapped; -1: cannot be told (a real GPU).
  static int imported() {
    if (!contract::on_simulation()) return -1;
    int n = 0;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) n += line.find("phos-sim-vram") != line.npos;
    return n;
  }

  std::unique_ptr<phos::GpuDriver> driver_;
  std::unique_ptr<phos::FaultDriver> faults_;
  std::unique_ptr<phos::GpuEngines> engines_;
  std::vector<phos::GpuInfo> gpus_;
  char directory_[32] = "/dev/shm/phos-load-XXXXXX";
  std::optional<contract::Worker> process_;
  int device_ = 0;                    // its current one
  std::optional<phos::Agent> agent_;  // from the first exported() on
  std::vector<Memory> memory_;
  std::optional<phos::PageChain> chain_;
  std::unique_ptr<phos::MemoryLoader> loader_;
  std::minstd_rand random_{7};
};

class MemoryLoaderTest : public LoaderTest {
 protected:
  // Odd sizes, zeros in every place, both ways of handing over.
  void make_memory() {
    ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(5 * kMiB + 12345)));
    ASSERT_NO_FATAL_FAILURE(allocate(random_bytes(kMiB + 1)));
    ASSERT_NO_FATAL_FAILURE(map(random_bytes(4 * kMiB)));
    Bytes sparse = random_bytes(3 * kMiB + 7);
    for (uint64_t page : {0, 5, 6, 7, 20, 48}) {  // the last one is short
      std::fill_n(sparse.begin() + static_cast<ptrdiff_t>(page * kPage),
                  std::min(kPage, sparse.size() - page * kPage), 0);
    }
    ASSERT_NO_FATAL_FAILURE(allocate(std::move(sparse)));
    ASSERT_NO_FATAL_FAILURE(allocate(Bytes(2 * kMiB + 100, 0)));
  }
  uint64_t all_pages() const {
    uint64_t n = 0;
    for (const Memory& m : memory_) n += (m.bytes.size() + kPage - 1) / kPage;
    return n;
  }
  uint64_t all_bytes() const {
    uint64_t n = 0;
    for (const Memory& m : memory_) n += m.bytes.size();
    return n;
  }
  static constexpr uint64_t kZeroPages = 6 + 33;
  void make_saved_and_spoilt() {
    ASSERT_NO_FATAL_FAILURE(make_memory());
    ASSERT_NO_FATAL_FAILURE(save(1));
    ASSERT_NO_FATAL_FAILURE(spoil());
    ASSERT_NO_FATAL_FAILURE(open_chain(1));
  }

  phos::GpuMemoryInfo memory_info() {
    auto gpu = engines_->use(gpus_[0].uuid, key_);
    EXPECT_TRUE(gpu);
    auto info = (*gpu)->context->memory_info();
    EXPECT_TRUE(info);
    return info ? *info : phos::GpuMemoryInfo();
  }
  uint64_t free_bytes() { return memory_info().free; }
  uint64_t total_bytes() { return memory_info().total; }

  // On a GPU the driver takes and gives memory of its own beside ours.
  static uint64_t slack() { return contract::on_simulation() ? 0 : 32 * kMiB; }
  const phos::PageHashKey key_ = *phos::PageHashKey::generate();

  // Changes one byte of what is saved. Returns the name of the file.
  std::string damage(size_t allocation, uint64_t page, uint64_t byte) {
    const auto run = chain_->locate(allocation, page);
    EXPECT_TRUE(run && run->is_stored());
    const std::string where = chain_->describe(*run);
    const std::string path = where.substr(0, where.find(", slot"));
    const phos::UniqueFd fd(open(path.c_str(), O_RDWR | O_CLOEXEC));
    const auto at = static_cast<off_t>((chain_->place(*run).slot + 1) * kPage + byte);
    char value = 0;
    EXPECT_EQ(pread(fd.get(), &value, 1, at), 1);
    value ^= 0x10;
    EXPECT_EQ(pwrite(fd.get(), &value, 1, at), 1);
    return where;
  }
};

}  // namespace live_test
