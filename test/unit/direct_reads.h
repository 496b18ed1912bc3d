// SPDX-License-Identifier: GPL-2.0-only
// What a disk says to reads around the page cache: this program has a pread of its own.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <functional>

namespace phos {

// As long as it lives, for all threads; one at a time.
class DirectReads {
 public:
  // Asked on each pread of a file that is open with O_DIRECT: how many bytes to read at most; or,
  // if negative, with which errno it fails.
  using Answer = std::function<ssize_t(const void* data, size_t bytes, off_t offset)>;

  explicit DirectReads(Answer answer);
  ~DirectReads();
  DirectReads(const DirectReads&) = delete;
  DirectReads& operator=(const DirectReads&) = delete;

  int direct() const { return direct_; }
  int cached() const { return cached_; }  // calls for other files

  // Of the overriding function.
  ssize_t read(int fd, void* data, size_t bytes, off_t offset);

 private:
  const Answer answer_;
  std::atomic<int> direct_{0}, cached_{0};
};

}  // namespace phos
