// SPDX-License-Identifier: GPL-2.0-only
// When images are on disk: before their writer says that they are there, or some time later.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {

// kMemory: the kernel's page cache holds them at first, which outlives every process of phos's, but
// not the machine.
enum class Durability { kDisk = 0, kMemory = 1 };
// "disk", "memory"; an error says which there are.
Result<Durability> parse_durability(const std::string& text);

// The files of one image directory that are complete, but not on disk for certain. Thread-safe.
// They stay open, so that no error of the disk goes by unnoticed.
class UnsyncedFiles {
 public:
  explicit UnsyncedFiles(UniqueFd directory) : directory_(std::move(directory)) {}

  // A file that has its final name. An earlier one of that name has been replaced.
  void add(const std::string& name, UniqueFd file);

  bool empty() const;
  uint64_t bytes() const;         // of all files
  std::string directory() const;  // for messages

  // Makes the files durable, and then the directory; once. Takes as long as the disk needs, and
  // tries every file. The error names those that a machine which goes down may lose.
  Result<void> sync();

 private:
  const UniqueFd directory_;
  mutable std::mutex mutex_;
  std::map<std::string, UniqueFd> files_;
};

}  // namespace phos
