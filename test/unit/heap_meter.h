// SPDX-License-Identifier: GPL-2.0-only
// How much memory a piece of code takes from the heap at most.
#pragma once

#include <cstddef>

namespace phos {

// Counts what this thread allocates and frees, from construction on. One at a time.
class HeapMeter {
 public:
  HeapMeter();
  ~HeapMeter();
  HeapMeter(const HeapMeter&) = delete;
  HeapMeter& operator=(const HeapMeter&) = delete;

  // The most bytes at a time; 0 where malloc is a sanitizer's, which cannot be counted.
  size_t peak() const;
};

}  // namespace phos
