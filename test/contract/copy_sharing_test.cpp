// SPDX-License-Identifier: GPL-2.0-only
// The copy engine at its real work: other processes' memory, memory that is being written to,
// loading, several engines, pinned memory of several contexts.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "test/contract/copy_fixture.h"

namespace contract {
namespace {

using phos::kPageBytes;
using phos::LoadState;
using phos::PageHash;
using phos::PageRef;

constexpr uint64_t kBytes = 4 * kMiB;
constexpr char kBytesText[] = " 4194304";
constexpr char kElements[] = " 1048576";

class CopyShared : public CopyTest {
 protected:
  // The bytes that `address`, imported, must have if a worker has filled it with `seed`.
  void expect_filled(uint64_t address, uint32_t seed) {
    Copy copy;
    ASSERT_OK(engine_->copy(pages_of(address, kBytes), into(copy), pace_));
    std::vector<uint32_t> words(kBytes / 4);
    memcpy(words.data(), copy.bytes.data(), kBytes);
    EXPECT_EQ(count_wrong(words, seed), 0u);
    EXPECT_EQ(wrong_hashes(copy), 0u);
  }
  // An exporter is none the worse for it.
  void expect_checkpoint_works(Worker& worker, const std::string& address, uint32_t seed) {
    ASSERT_EQ(lock(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(checkpoint(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(restore(worker.pid()), CUDA_SUCCESS);
    ASSERT_EQ(unlock(worker.pid()), CUDA_SUCCESS);
    EXPECT_EQ(worker.ask("check " + address + kElements + " " + std::to_string(seed) + " 0"),
              "ok 0");
  }
};

TEST_F(CopyShared, MemoryImportedByIpcHandle) {
  Worker worker;
  const std::string address = value_of(worker.ask(std::string("alloc") + kBytesText));
  ASSERT_EQ(worker.ask("fill " + address + kElements + " 31"), "ok");
  const std::string text = value_of(worker.ask("ipc-export " + address));
  phos::IpcHandle handle;
  for (size_t i = 0; i < handle.size(); i++) {
    handle[i] = static_cast<uint8_t>(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  }
  auto imported = copy_context_->import_ipc(handle);
  ASSERT_OK(imported);
  ASSERT_NO_FATAL_FAILURE(expect_filled(*imported, 31));
  ASSERT_EQ(worker.ask("fill " + address + kElements + " 32"), "ok");
  ASSERT_NO_FATAL_FAILURE(expect_filled(*imported, 32));
  EXPECT_OK(copy_context_->close_ipc(*imported));
  EXPECT_FALSE(copy_context_->close_ipc(*imported)) << "closed already";
  expect_checkpoint_works(worker, address, 32);
}

TEST_F(CopyShared, MemoryImportedByFileDescriptor) {
  Worker worker;
  const std::string reply = value_of(worker.ask(std::string("vmm") + kBytesText));
  const std::string address = reply.substr(0, reply.find(' '));
  ASSERT_EQ(worker.ask("fill " + address + kElements + " 33"), "ok");
  const int pid_fd = static_cast<int>(syscall(SYS_pidfd_open, worker.pid(), 0));
  const int fd = static_cast<int>(
      syscall(SYS_pidfd_getfd, pid_fd, std::stoi(reply.substr(reply.find(' '))), 0));
  ::close(pid_fd);
  ASSERT_GE(fd, 0);
  for (auto access : {phos::MemoryAccess::kRead, phos::MemoryAccess::kReadWrite}) {
    auto imported = copy_context_->import_fd(fd, kBytes, access);
    ASSERT_OK(imported);
    ASSERT_NO_FATAL_FAILURE(expect_filled(*imported, 33));
    EXPECT_OK(copy_context_->close_fd(*imported, kBytes));
  }
  ::close(fd);
  EXPECT_FALSE(copy_context_->import_fd(fd, kBytes, phos::MemoryAccess::kRead)) << "closed fd";
  expect_checkpoint_works(worker, address, 33);
}

// A, B, A, B, ...: at any moment pages hold one or the other or a mixture. Whatever was saved, its
// hash is that of what was saved.
TEST_F(CopyShared, MemoryThatChangesMeanwhile) {
  const CUdeviceptr source = upload(std::vector<uint8_t>(8 * kBuffer));
  const auto pages = pages_of(source, 8 * kBuffer);
  std::jthread writer([&](std::stop_token stop) {
    CUstream stream;
    EXPECT_EQ(cuCtxSetCurrent(context_), CUDA_SUCCESS);
    EXPECT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    for (unsigned i = 0; !stop.stop_requested(); i++) {
      cuMemsetD32Async(source, i % 2 ? 0x41414141 : 0x42424242, 8 * kBuffer / 4, stream);
      cuStreamSynchronize(stream);
    }
    EXPECT_EQ(cuStreamDestroy(stream), CUDA_SUCCESS);
  });
  for (int round = 0; round < 10; round++) {
    Copy copy;
    ASSERT_OK(engine_->copy(pages, into(copy), round % 2 ? pace_ : beside_others_));
    EXPECT_EQ(wrong_hashes(copy), 0u);
  }
}

TEST_F(CopyShared, WhatWasCopiedLoadsAgain) {
  const auto bytes = random_bytes(6 * kBuffer + 1000, 8);
  const CUdeviceptr source = upload(bytes);
  const auto pages = pages_of(source, bytes.size());
  Copy copy;
  ASSERT_OK(engine_->copy(pages, into(copy), pace_));
  ASSERT_EQ(cuMemsetD8(source, 0xee, bytes.size()), CUDA_SUCCESS);

  size_t next = 0, flip = pages.size();
  // Uses every buffer there is: the source has none until the engine has given one back.
  unsigned waited = 0;
  const phos::LoadSource from_copy = [&](bool may_wait,
                                         phos::PagesToLoad* load) -> phos::Result<LoadState> {
    if (next == pages.size()) return LoadState::kEnd;
    auto buffer = pool_->try_acquire();
    if (!buffer) {
      waited++;
      EXPECT_FALSE(may_wait) << "nothing is left that could give one back";
      return LoadState::kLater;
    }
    const size_t n = std::min<size_t>(pages.size() - next, 29);
    load->pages.assign(pages.begin() + next, pages.begin() + next + n);
    load->hashes.assign(copy.hashes.begin() + next, copy.hashes.begin() + next + n);
    memcpy(buffer->data(), &copy.bytes[next * kPageBytes], n * kPageBytes);
    if (flip >= next && flip < next + n) buffer->data()[(flip - next) * kPageBytes + 777] ^= 1;
    load->buffer = std::move(*buffer);
    next += n;
    return LoadState::kPages;
  };
  std::vector<phos::PinnedPool::Buffer> others;
  while (pool_->statistics().buffers - pool_->statistics().in_use > 2) {
    others.push_back(std::move(*pool_->try_acquire()));
  }
  ASSERT_OK(engine_->load(from_copy));
  EXPECT_GT(waited, 0u);
  others.clear();
  std::vector<uint8_t> now(bytes.size());
  ASSERT_EQ(cuMemcpyDtoH(now.data(), source, now.size()), CUDA_SUCCESS);
  EXPECT_EQ(now, bytes);

  next = 0;
  flip = 101;  // one bit, in one page
  auto r = engine_->load(from_copy);
  ASSERT_FALSE(r);
  char address[32];
  snprintf(address, sizeof address, "0x%llx", source + flip * kPageBytes);
  EXPECT_NE(r.error().message().find(address), std::string::npos) << r.error().message();
  EXPECT_EQ(engine_->wrong_page(), source + flip * kPageBytes);
  EXPECT_FALSE(engine_->broken());
  EXPECT_EQ(pool_->statistics().in_use, 0u);
}

// Short pages, too, and not a byte beyond their end. Pages that are no zeros are found out.
TEST_F(CopyShared, ZerosAreLoadedWithoutABuffer) {
  const auto bytes = random_bytes(3 * kPageBytes, 8);
  const CUdeviceptr p = upload(bytes);
  std::vector<PageRef> pages = {{p, kPageBytes}, {p + kPageBytes, 777}, {p + 2 * kPageBytes, 5}};
  const PageHash zeros = hash_page(*key_, "", 1);
  bool done = false;
  std::vector<PageHash> expected(3, zeros);
  const phos::LoadSource source = [&](bool, phos::PagesToLoad* load) -> phos::Result<LoadState> {
    if (std::exchange(done, true)) return LoadState::kEnd;
    load->pages = pages;
    load->hashes = expected;
    return LoadState::kPages;
  };
  const size_t before = faults_->calls().size();
  ASSERT_OK(engine_->load(source));
  const auto& calls = faults_->calls();
  EXPECT_EQ(
      std::count(calls.begin() + static_cast<ptrdiff_t>(before), calls.end(), "copy_to_device"), 1)
      << "the table of pages";
  std::vector<uint8_t> now(bytes.size()), wanted = bytes;
  memset(wanted.data(), 0, kPageBytes + 777);
  memset(wanted.data() + 2 * kPageBytes, 0, 5);
  ASSERT_EQ(cuMemcpyDtoH(now.data(), p, now.size()), CUDA_SUCCESS);
  EXPECT_EQ(now, wanted);

  done = false;
  expected[1] = hash_page(*key_, "x", 1);
  EXPECT_FALSE(engine_->load(source));
  EXPECT_EQ(engine_->wrong_page(), p + kPageBytes);
  EXPECT_EQ(pool_->statistics().peak_in_use, 0u);
}

TEST_F(CopyShared, TwoEnginesShareThePool) {
  CUuuid uuid;
  ASSERT_EQ(cuDeviceGetUuid(&uuid, device_), CUDA_SUCCESS);
  phos::GpuUuid id;
  memcpy(id.data(), uuid.bytes, id.size());
  auto context = driver_->open_context(id);
  ASSERT_OK(context);
  auto second = phos::CopyEngine::create(**context, *pool_, *key_, options());
  ASSERT_OK(second);
  const auto a = random_bytes(12 * kBuffer, 9), b = random_bytes(12 * kBuffer, 10);
  const auto pages_a = pages_of(upload(a), a.size()), pages_b = pages_of(upload(b), b.size());
  Copy copy_a, copy_b;
  std::thread other([&] { EXPECT_OK((*second)->copy(pages_b, into(copy_b), pace_)); });
  EXPECT_OK(engine_->copy(pages_a, into(copy_a), pace_));
  other.join();
  EXPECT_EQ(copy_a.bytes, a);
  EXPECT_EQ(copy_b.bytes, b);
  EXPECT_LE(pool_->statistics().buffers, 8u);
}

// A copy to memory that is not pinned for the context would keep the caller waiting.
TEST_F(CopyShared, PoolIsPinnedForOtherContextsToo) {
  auto buffer = pool_->acquire({});
  ASSERT_OK(buffer);
  CUcontext other;
  ASSERT_EQ(cuCtxCreate(&other, nullptr, 0, device_), CUDA_SUCCESS);
  CUstream stream;
  CUdeviceptr p;
  Kernels kernels;
  ASSERT_EQ(kernels.load(), CUDA_SUCCESS);
  ASSERT_EQ(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
  ASSERT_EQ(cuMemAlloc(&p, kBuffer), CUDA_SUCCESS);
  ASSERT_EQ(kernels.spin(2000, stream), CUDA_SUCCESS);
  ASSERT_EQ(cuMemcpyDtoHAsync(buffer->data(), p, kBuffer, stream), CUDA_SUCCESS);
  EXPECT_EQ(cuStreamQuery(stream), CUDA_ERROR_NOT_READY) << "it has waited for the kernel";
  EXPECT_EQ(cuStreamSynchronize(stream), CUDA_SUCCESS);
  EXPECT_EQ(cuCtxDestroy(other), CUDA_SUCCESS);
  cuCtxSetCurrent(context_);
}

// 2 GiB, as fast as it goes and at a hundredth of the GPU's time.
TEST_F(CopyShared, PaceKeepsKernelsToTheirShare) {
  const auto pages = pages_of(upload(random_bytes(64 * kPageBytes, 11)), 64 * kPageBytes);
  std::vector<PageHash> hashes(pages.size());
  phos::Pace pace;
  ASSERT_OK(engine_->hash(pages, hashes, pace));  // learns the kernel's speed
  auto time = [&] {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 3; i++) EXPECT_OK(engine_->hash(pages, hashes, pace));
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  double fast = time();
  for (int i = 0; i < 5; i++) fast = std::min(fast, time());  // as fast as it goes
  pace.set_max_slowdown(on_simulation() ? 0.1 : 0.01);
  EXPECT_GT(time(), 2 * fast);
  // One launch each, which still have to wait for each other.
  const auto few = std::span(pages).first(1);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 6; i++) {
    EXPECT_OK(engine_->hash(few, std::span(hashes).first(1), pace));
  }
  // A turn is 0.3 ms at least.
  EXPECT_GT(std::chrono::steady_clock::now() - begin,
            std::chrono::microseconds(on_simulation() ? 15000 : 150000));
  // Cancelled in the middle of a pause.
  pace.set_max_slowdown(1e-9);
  std::stop_source stop;
  std::jthread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    stop.request_stop();
  });
  auto r = engine_->hash(pages, hashes, pace, stop.get_token());
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), ECANCELED);
}

}  // namespace
}  // namespace contract
