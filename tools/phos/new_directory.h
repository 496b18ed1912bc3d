// SPDX-License-Identifier: GPL-2.0-only
// A directory that appears under its name when everything is in it, or not at all.
#pragma once

#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {

// From one thread. Holds files and links, no directories.
class NewDirectory {
 public:
  // Of mode 0700, under a temporary name (".<name>.XXXXXX") beside `path`. Refuses a path where
  // something is already, unless that is an empty directory.
  static Result<NewDirectory> create(const std::string& path);
  // Without commit(), removes it and what is in it.
  ~NewDirectory();
  NewDirectory(NewDirectory&& other) noexcept;
  NewDirectory& operator=(NewDirectory&&) = delete;

  int fd() const { return fd_.get(); }
  // That it will have: as it was given, and absolute.
  const std::string& path() const { return path_; }
  const std::string& real_path() const { return real_path_; }

  // What is in it is durable; makes it and its name so.
  Result<void> commit();

 private:
  NewDirectory() = default;

  std::string path_, real_path_;
  std::string parent_;     // the directory around it, absolute
  std::string temporary_;  // empty: there is none (any more)
  UniqueFd fd_;
};

}  // namespace phos::cli
