// SPDX-License-Identifier: GPL-2.0-only
// What the code under test does to make files durable, in order: this program has fsync, fdatasync,
// pwrite and renameat of its own, which note the call and make it.
#pragma once

#include <mutex>
#include <string>
#include <vector>

namespace phos {

// Records as long as it lives, from all threads; one at a time.
class SyncRecorder {
 public:
  SyncRecorder();
  ~SyncRecorder();
  SyncRecorder(const SyncRecorder&) = delete;
  SyncRecorder& operator=(const SyncRecorder&) = delete;

  // "write a.tmp" ("direct write ..." of a file that is O_DIRECT), "sync a.tmp", "rename a",
  // "sync /": of a directory. One line for calls that are the same and follow each other.
  std::vector<std::string> calls() const;
  // Since the last time.
  std::vector<std::string> take();
  // fsync of a file of that name fails with EIO.
  void fail(const std::string& name);

  // Of the overriding functions. True: the call is to fail.
  bool note(const std::string& what, const std::string& name);

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> calls_;
  std::string failing_;
};

}  // namespace phos
