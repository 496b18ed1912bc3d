// SPDX-License-Identifier: GPL-2.0-only
// /dev/phos told nonsense by several threads, while nvidia-uvm works: it must refuse or endure it.
// What the kernel has to say about that test/oracle.py finds in its log.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "gpu-tracker/track/uvm_layout.h"
#include "test/uvm/fixture.h"

namespace uvm_test {
namespace {

using phos::UniqueFd;

constexpr size_t kFuzzers = 3, kFiles = 6;

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = getenv(variable);
  return text ? strtoull(text, nullptr, 0) : otherwise;
}

// All that the threads share. A descriptor may be closed, and be another file, at any moment: that
// is part of it.
class Fuzzer {
 public:
  Fuzzer(uint64_t seed, const phos_kmod_layout& layout, int uvm, std::atomic<int>* files)
      : random_(seed), layout_(layout), uvm_(uvm), files_(files) {
    // Two pages, of which the second one is not there.
    edge_ = static_cast<uint8_t*>(
        mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(edge_ + kPage, kPage, PROT_NONE);
  }
  ~Fuzzer() { munmap(edge_, 2 * kPage); }

  void step() {
    std::atomic<int>& file = files_[random_() % kFiles];
    switch (random_() % 8) {
      case 0:
        reopen(&file);
        break;
      case 1:
        map(file);
        break;
      case 2:
        other_calls(file);
        break;
      default:
        command(file);
    }
  }

  size_t tracked = 0, answered = 0, mapped = 0, refused = 0;

 private:
  bool one_in(uint64_t n) { return random_() % n == 0; }

  void reopen(std::atomic<int>* file) {
    const int old = file->exchange(open(PHOS_KMOD_DEVICE, O_RDWR | O_CLOEXEC));
    if (old >= 0) close(old);
  }

  uint32_t offset(uint32_t right) {
    if (one_in(2)) return right;
    return one_in(4) ? static_cast<uint32_t>(random_()) : static_cast<uint32_t>(random_() % 64 * 8);
  }

  phos_kmod_track wish() {
    phos_kmod_track want = {};
    want.abi = PHOS_KMOD_ABI;
    want.pid = one_in(4) ? static_cast<int>(random_()) : getpid();
    want.slots = 1U << random_() % 12;
    want.space_count = 1 + random_() % PHOS_KMOD_MAX_SPACES;
    for (int& space : want.spaces) space = one_in(3) ? uvm_ : static_cast<int>(random_() % 64) - 4;
    want.layout = layout_;
    auto* fields = reinterpret_cast<uint32_t*>(&want.layout);
    if (one_in(2)) {
      for (size_t i = 0; i < sizeof want.layout / 4; i++) fields[i] = offset(fields[i]);
    }
    if (one_in(4)) {
      auto* bytes = reinterpret_cast<uint8_t*>(&want);
      for (int i = 0; i < 3; i++) bytes[random_() % sizeof want] ^= 1U << random_() % 8;
    }
    if (want.slots > 1 << 16) want.slots |= 1;  // refused: nobody wants the memory
    return want;
  }

  void command(int file) {
    const unsigned long known[] = {PHOS_KMOD_TRACK, PHOS_KMOD_NEXT_EPOCH, PHOS_KMOD_SO_FAR};
    unsigned long command = known[random_() % 3];
    if (one_in(10)) command ^= 1UL << random_() % 32;
    phos_kmod_track want = wish();
    void* places[] = {
        &want,
        &want,
        &want,
        nullptr,
        edge_ + kPage - 8,
        edge_ + kPage - sizeof want,
        edge_ + kPage,
        reinterpret_cast<void*>(0xffff888000001000),
        reinterpret_cast<void*>(0xffffffff81000000),
        reinterpret_cast<void*>(~uintptr_t{7}),
        const_cast<char*>("read only, and long enough for all that is asked of it, or told to it"
                          "........................................")};
    void* const place = places[one_in(2) ? 0 : random_() % std::size(places)];
    if (place == edge_ + kPage - sizeof want) memcpy(place, &want, sizeof want);
    const bool done = ioctl(file, command, place) == 0;
    (done ? command == PHOS_KMOD_TRACK ? tracked : answered : refused)++;
  }

  void map(int file) {
    const size_t size = (1 + random_() % (one_in(8) ? 1 << 20 : one_in(2) ? 80 : 4)) * kPage;
    const int protection = one_in(3) ? static_cast<int>(random_() % 8) : PROT_READ;
    const off_t at = one_in(3) ? static_cast<off_t>(random_() & ~(kPage - 1)) : 0;
    void* p = mmap(nullptr, size, protection, one_in(3) ? MAP_PRIVATE : MAP_SHARED, file, at);
    if (p == MAP_FAILED) return;
    mapped++;
    uint64_t sum = 0;
    if (protection & PROT_READ) {
      for (size_t i = 0; i < size; i += kPage) sum += static_cast<volatile uint8_t*>(p)[i];
    }
    mprotect(p, size, PROT_READ | PROT_WRITE);
    if (one_in(2)) munmap(static_cast<uint8_t*>(p), kPage);
    munmap(p, size);
  }

  void other_calls(int file) {
    char byte = 0;
    if (read(file, &byte, 1) > 0 || write(file, &byte, 1) > 0) abort();
    lseek(file, static_cast<off_t>(random_()), SEEK_SET);
    fcntl(file, F_SETFL, O_NONBLOCK);
    const int copy = dup(file);
    if (copy >= 0) close(copy);
  }

  std::mt19937_64 random_;
  const phos_kmod_layout layout_;
  const int uvm_;
  std::atomic<int>* const files_;
  uint8_t* edge_;
};

class KmodFuzz : public Watched {};
INSTANTIATE_TEST_SUITE_P(, KmodFuzz, testing::Values(Backend::kKmod), backend_name);

// PHOS_FUZZ_SEED and PHOS_FUZZ_STEPS (of each thread) make it another run, or a longer one.
TEST_P(KmodFuzz, HarmsNeitherTheKernelNorOtherTrackers) {
  const uint64_t seed = number_from("PHOS_FUZZ_SEED", 1);
  const uint64_t steps = number_from("PHOS_FUZZ_STEPS", 4000);
  auto layout = phos::uvm_layout();
  ASSERT_TRUE(layout) << layout.error().message();
  std::vector<std::atomic<int>> files(kFiles);
  for (auto& file : files) file = -1;

  // nvidia-uvm is kept busy: all hooks are passed, by blocks and ranges that the others' layouts
  // misread.
  std::atomic<bool> stop = false;
  std::thread worker([&] {
    const uintptr_t other = kAddress + 64 * kChunk;
    for (uint8_t round = 1; !stop; round++) {
      auto memory = space_.map(other, kChunk + 5 * kPage);
      if (!memory) break;
      memset(*memory, round, kChunk);
      if (!space_.revoke_writes(*memory, kChunk)) break;
      (*memory)[round * kPage] = 1;
      const uint8_t byte = 2;
      if (!space_.write_as_debugger(*memory + 3 * kPage, &byte, 1)) break;
      munmap(*memory, kChunk + 5 * kPage);
    }
  });
  std::vector<std::unique_ptr<Fuzzer>> fuzzers;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kFuzzers; i++) {
    fuzzers.push_back(
        std::make_unique<Fuzzer>(seed * kFuzzers + i, layout->offsets, space_.fd(), files.data()));
    threads.emplace_back([&, i] {
      for (uint64_t n = 0; n < steps; n++) fuzzers[i]->step();
    });
  }
  for (std::thread& t : threads) t.join();
  stop = true;
  worker.join();
  for (auto& file : files) {
    if (file >= 0) close(file);
  }
  Fuzzer& all = *fuzzers[0];
  for (size_t i = 1; i < kFuzzers; i++) {
    all.tracked += fuzzers[i]->tracked;
    all.answered += fuzzers[i]->answered;
    all.mapped += fuzzers[i]->mapped;
    all.refused += fuzzers[i]->refused;
  }
  printf("seed %lu: %zu trackers, %zu answers, %zu mappings, %zu refusals\n", seed, all.tracked,
         all.answered, all.mapped, all.refused);
  // Otherwise it would have shown little.
  EXPECT_GT(all.tracked, steps / 50);
  EXPECT_GT(all.answered, steps / 50);
  EXPECT_GT(all.mapped, steps / 200);

  // The tracker that there was all the while, and a new one.
  watch_->next_epoch();
  for (int i = 0; i < 2; i++) {
    begin();
    byte(9) = 1;
    const phos::UvmEpoch epoch = watch_->next_epoch();
    EXPECT_EQ(epoch.doubt(), "");
    EXPECT_EQ(dirty(epoch), recorded({9}));
    watch(phos::kUvmChunks);
  }
}

}  // namespace
}  // namespace uvm_test
