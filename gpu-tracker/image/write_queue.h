// SPDX-License-Identifier: GPL-2.0-only
// WriteQueue: writes to files that go on (io_uring) while their callers do something else. One for
// all pages files of a dump, so that together they keep the disk busy and no more than that.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "gpu-tracker/base/result.h"

namespace phos {

// Writes all of it, waits. 0 or an errno. Where the file system, or the disk below it, refuses what
// O_DIRECT asks of it (EINVAL), the file goes on through the page cache, for all its users.
int write_all(int fd, uint64_t offset, const void* data, uint64_t bytes);

class WriteQueue {
 public:
  // How a write ended: Domain::kErrno, the message is for the caller to make.
  using Done = std::function<void(Result<void>)>;

  // A write is cut into requests of at most so many bytes. With so many of them in flight a disk
  // that moves 4 GB/s is as busy as can be (docs/benchmarks.md).
  static constexpr uint64_t kRequestBytes = 4 << 20;
  static constexpr unsigned kDepth = 32;

  // `depth`: requests in flight at a time. Never fails: where the kernel has no io_uring, or does
  // not let this process use it, submit() writes before it returns; the log says why (debug).
  static std::unique_ptr<WriteQueue> create(unsigned depth = kDepth);
  // Waits until every write has ended.
  ~WriteQueue();
  WriteQueue(const WriteQueue&) = delete;
  WriteQueue& operator=(const WriteQueue&) = delete;

  bool is_asynchronous() const { return ring_ != nullptr; }

  // Begins to write `bytes` bytes at `offset`; waits while as many requests as may be are in
  // flight. From any number of threads; the caller orders writes to one place. `fd` and `data`
  // (aligned, if `fd` is O_DIRECT) are in use until `done` has been called: once, when all of the
  // write has ended, on this queue's thread (or in submit()). It must be short, since other writes
  // wait for it meanwhile, and must neither throw nor call the queue. O_DIRECT as in write_all.
  void submit(int fd, uint64_t offset, const void* data, uint64_t bytes, Done done);

  // Waits until `done` of all that has been submitted has returned. No submit() runs meanwhile.
  void drain();

 private:
  struct Ring;
  struct Write;
  struct Request;

  explicit WriteQueue(unsigned depth);

  // These run on the queue's thread, which alone uses the ring: the kernel cancels requests whose
  // thread ends.
  void run();
  void wait_for_word();
  void start(Request* request);
  void complete(Request* request, int result);
  void end(Request* request, int code);

  const unsigned depth_;
  std::unique_ptr<Ring> ring_;  // null: synchronous
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Request*> submitted_;  // not in the ring yet
  unsigned in_flight_ = 0;          // those too
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace phos
