// SPDX-License-Identifier: GPL-2.0-only
// DirectStorage: from files into GPU memory without a copy in host memory (GPUDirect Storage, by
// NVIDIA's libcufile, opened with dlopen). What it brings is proved by hash like everything else.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "gpu-tracker/base/result.h"

namespace phos {

// All calls may be made from any thread. Once it is open, nobody forks.
class DirectStorage {
 public:
  // What read() asks of offsets, addresses and sizes, in bytes.
  static constexpr uint64_t kAlignment = 4096;

  // A file that was opened with O_DIRECT; the descriptor and the DirectStorage outlive it.
  class File {
   public:
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    // Reads all of it to device address `to`, in memory of the calling thread's context
    // (GpuContext::make_current). After an error what is there is undefined, but nobody writes to
    // it any more.
    Result<void> read(uint64_t offset, uint64_t to, uint64_t bytes) const;

   private:
    friend class DirectStorage;
    File(const DirectStorage& storage, void* handle) : storage_(storage), handle_(handle) {}
    const DirectStorage& storage_;
    void* const handle_;
  };

  // Error: why there is none, and what can be done ("why; remedy"). A library that may read
  // through host memory behind its caller's back counts as none, unless that is wanted: it has the
  // same results, but no use.
  enum class CompatMode { kRefused, kAccepted };
  static Result<std::unique_ptr<DirectStorage>> open(const std::string& library = "libcufile.so.0",
                                                     CompatMode compat = CompatMode::kRefused);
  ~DirectStorage();
  DirectStorage(const DirectStorage&) = delete;
  DirectStorage& operator=(const DirectStorage&) = delete;

  // Fails where the file system or its disk is not one for this.
  Result<std::unique_ptr<File>> use(int fd) const;

  // "nvidia-fs 2.17"
  const std::string& description() const { return description_; }

 private:
  struct Library;
  explicit DirectStorage(std::unique_ptr<const Library> library);

  const std::unique_ptr<const Library> library_;
  std::string description_;
};

}  // namespace phos
