// SPDX-License-Identifier: GPL-2.0-only
// The managed memory of `counter`: counters that the GPU increments and the CPU reads, a pattern,
// and pages that a thread goes on writing with the CPU, whatever happens to the process. A write
// that is lost, or seen before the one that came first, ends the program. And many small
// allocations, each with a number of the CPU's own.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <thread>
#include <vector>

#include "test/sim/test_kernels.h"

// From 4 bytes to 1 MiB, with gaps between them.
class SmallManaged {
 public:
  bool start(uint64_t count) {
    constexpr uint64_t kSizes[] = {4, 700, 4096, 65537, 300000, 1 << 20, 12, 30000};
    std::vector<CUdeviceptr> gaps;
    for (uint64_t i = 0; i < count; i++) {
      const uint64_t size = kSizes[i % std::size(kSizes)];
      CUdeviceptr p = 0;
      if (cuMemAllocManaged(&p, size, CU_MEM_ATTACH_GLOBAL)) return false;
      all_.push_back({reinterpret_cast<volatile uint32_t*>(p), size / 4});
      // Of several sizes, so that the first one in a chunk is among them.
      if (i % 3 == 0 && cuMemAllocManaged(&gaps.emplace_back(), size, CU_MEM_ATTACH_GLOBAL)) {
        return false;
      }
    }
    for (const CUdeviceptr p : gaps) {
      if (cuMemFree(p)) return false;
    }
    for (const One& one : all_) {
      for (uint64_t i = 0; i < one.words; i++) one.at[i] = value(one, i);
    }
    return true;
  }

  // The first word of each counts.
  bool tick(uint32_t ticks) {
    for (const One& one : all_) {
      const uint32_t before = value(one, 0) + ticks - 1;
      if (one.at[0] != before) return wrong(one, 0);
      one.at[0] = before + 1;
    }
    return true;
  }

  bool check() const {
    for (const One& one : all_) {
      for (uint64_t i = 1; i < one.words; i++) {
        if (one.at[i] != value(one, i)) return wrong(one, i);
      }
    }
    return true;
  }

 private:
  struct One {
    volatile uint32_t* at;
    uint64_t words;
  };
  static uint32_t value(const One& one, uint64_t i) {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(one.at) / 512 + i * 2654435761u);
  }
  static bool wrong(const One& one, uint64_t i) {
    fprintf(stderr, "counter: word %lu of %lu managed bytes holds %08x\n", i, one.words * 4,
            one.at[i]);
    return false;
  }

  std::vector<One> all_;
};

class ManagedCounter {
 public:
  static constexpr uint32_t kCounters = 1024;

  // At least 1 MiB: the counters, the pattern and, from the middle on, the thread's.
  bool start(uint64_t mib, CUfunction increment) {
    bytes_ = mib << 20;
    increment_ = increment;
    if (cuMemAllocManaged(&memory_, bytes_, CU_MEM_ATTACH_GLOBAL)) return false;
    if (cuMemsetD32(memory_, 0, kCounters)) return false;
    for (uint64_t i = kCounters; i < words() / 2; i++) at(i) = value(i);
    std::thread([this] { write_on(); }).detach();
    return true;
  }

  bool tick(uint64_t ticks) {
    uint32_t n = kCounters;
    void* arguments[] = {&memory_, &n};
    if (cuLaunchKernel(increment_, 4, 1, 1, 256, 1, 1, 0, nullptr, arguments, nullptr))
      return false;
    if (cuCtxSynchronize()) return false;
    for (uint32_t i = 0; i < n; i++) {
      if (at(i) != static_cast<uint32_t>(ticks)) return wrong("counter", i, at(i));
    }
    return true;
  }

  bool check() {
    for (uint64_t i = kCounters; i < words() / 2; i++) {
      if (at(i) != value(i)) return wrong("word", i, at(i));
    }
    return true;
  }

 private:
  static constexpr uint64_t kPage = 4096 / 4;

  uint64_t words() const { return bytes_ / 4; }
  volatile uint32_t& at(uint64_t i) { return reinterpret_cast<volatile uint32_t*>(memory_)[i]; }
  static uint32_t value(uint64_t i) {
    // Some pages are zero, and some equal.
    const uint64_t page = i / (65536 / 4);
    return page % 4 == 1
               ? 0
               : phos_test::fill_value(7, static_cast<uint32_t>(page % 4 == 2 ? i % 16384 : i));
  }
  static bool wrong(const char* what, uint64_t i, uint32_t is) {
    fprintf(stderr, "counter: managed %s %lu holds %08x\n", what, i, is);
    return false;
  }

  // Each page has the number of the round that was there last, at both ends.
  [[noreturn]] void write_on() {
    for (uint32_t round = 1;; round++) {
      for (uint64_t page = words() / 2; page < words(); page += kPage) {
        const uint32_t first = at(page), last = at(page + kPage - 1);
        if (first != round - 1 || last != round - 1) {
          wrong("page, written by the CPU,", page / kPage, first != round - 1 ? first : last);
          printf("tick lost: round %u\n", round);
          fflush(stdout);
          _Exit(1);
        }
        at(page) = round;
        at(page + kPage - 1) = round;
      }
    }
  }

  uint64_t bytes_ = 0;
  CUdeviceptr memory_ = 0;
  CUfunction increment_ = nullptr;
};
