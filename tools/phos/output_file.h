// SPDX-License-Identifier: GPL-2.0-only
// A file that appears under its name when all of it is there, or not at all.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {

// From one thread.
class OutputFile {
 public:
  // A new file of mode 0600, under a temporary name (".<name>.XXXXXX") beside `path`. Refuses a
  // path where something is already, unless that is a regular file and `replace`.
  static Result<OutputFile> create(const std::string& path, bool replace);
  // Standard output, for "-"; refused if it is a terminal.
  static Result<OutputFile> standard_output();
  // Without commit(), removes what was written.
  ~OutputFile();
  OutputFile(OutputFile&& other) noexcept;
  OutputFile& operator=(OutputFile&&) = delete;

  Result<void> write(const void* data, size_t bytes);
  // Makes what was written durable and gives it its name (which a crash of the machine may undo).
  // Without `replace`, an error if something has that name by now.
  Result<void> commit();

 private:
  OutputFile() = default;
  Error failed(int code) const;

  std::string path_, temporary_;  // temporary_ empty: there is none (any more)
  bool replace_ = false;
  UniqueFd file_;
  int fd_ = -1;
};

}  // namespace phos::cli
