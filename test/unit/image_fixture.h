// SPDX-License-Identifier: GPL-2.0-only
// What the image tests share: a temporary directory, sample images, and a second implementation of
// the format (written from docs/image-format.md) to compare with.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/image.h"

namespace phos::image_test {

using Bytes = std::vector<uint8_t>;

inline constexpr DumpId kDump = {0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77,
                                 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff};
inline constexpr DumpId kOtherDump = {1};

class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "phos-unit-XXXXXX").string();
    if (!mkdtemp(name.data())) {
      ADD_FAILURE() << "mkdtemp " << name << ": " << strerror(errno);
      return;
    }
    path_ = name;
    fd_.reset(open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }

  int fd() const { return fd_.get(); }
  std::string path(const std::string& name) const { return path_ + "/" + name; }

  std::set<std::string> names() const {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(path_)) {
      names.insert(entry.path().filename());
    }
    return names;
  }

 private:
  std::string path_;
  UniqueFd fd_;
};

inline Bytes read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  EXPECT_TRUE(in.is_open()) << path;
  return Bytes(std::istreambuf_iterator<char>(in), {});
}

// Mode 0600 whatever the umask, as an image must have.
inline void write_bytes(const std::string& path, const Bytes& bytes) {
  UniqueFd fd(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  ASSERT_TRUE(fd) << path << ": " << strerror(errno);
  ASSERT_EQ(write(fd.get(), bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  ASSERT_EQ(fchmod(fd.get(), 0600), 0);
}

// Zeroed pages, aligned as page I/O wants them.
class AlignedPages {
 public:
  explicit AlignedPages(size_t pages)
      : data_(static_cast<uint8_t*>(aligned_alloc(4096, pages * 65536))) {
    memset(data_, 0, pages * 65536);
  }
  AlignedPages(const AlignedPages&) = delete;
  AlignedPages& operator=(const AlignedPages&) = delete;
  ~AlignedPages() { free(data_); }
  uint8_t* operator[](size_t page) { return data_ + page * 65536; }

 private:
  uint8_t* data_;
};

// The ImageError of a failed result; 0 if it succeeded or failed in another domain.
template <typename R>
ImageError image_error_of(const R& result) {
  if (result.ok() || result.error().domain() != Domain::kFormat) return ImageError{};
  return static_cast<ImageError>(result.error().code());
}

// ---- the format once more, by hand ----

inline uint32_t bitwise_crc32c(const Bytes& data) {
  uint32_t crc = 0xffffffff;
  for (uint8_t byte : data) {
    for (int bit = 0; bit < 8; bit++) {
      bool carry = (crc ^ (byte >> bit)) & 1;
      crc >>= 1;
      if (carry) crc ^= 0x82f63b78;
    }
  }
  return crc ^ 0xffffffff;
}

inline void put(Bytes& out, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; i++) out.push_back(static_cast<uint8_t>(value >> (8 * i)));
}

inline Bytes container(const Bytes& payload, uint32_t kind, uint32_t version = 1) {
  Bytes out = {'P', 'H', 'O', 'S', 'I', 'M', 'G', 0};
  put(out, version, 4);
  put(out, kind, 4);
  put(out, payload.size(), 8);
  put(out, bitwise_crc32c(payload), 4);
  put(out, bitwise_crc32c(out), 4);
  out.insert(out.end(), payload.begin(), payload.end());
  return out;
}

// A protobuf message under construction.
struct Message {
  Bytes bytes;

  Message& varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) bytes.push_back(static_cast<uint8_t>(value | 0x80));
    bytes.push_back(static_cast<uint8_t>(value));
    return *this;
  }
  Message& number(unsigned field, uint64_t value) { return varint(field << 3).varint(value); }
  Message& data(unsigned field, const Bytes& value) {
    varint(field << 3 | 2).varint(value.size());
    bytes.insert(bytes.end(), value.begin(), value.end());
    return *this;
  }
  Message& text(unsigned field, const std::string& value) {
    return data(field, Bytes(value.begin(), value.end()));
  }
};

// ---- samples ----

inline SavedHash hash_of(const std::string& sixteen) {
  SavedHash hash{};
  EXPECT_EQ(sixteen.size(), hash.size());
  std::copy_n(sixteen.begin(), hash.size(), hash.begin());
  return hash;
}

// The process of test/golden/phos-4242.txt.
inline ProcessImage golden_process() {
  ProcessImage p;
  p.dump_id = kDump;
  p.pid = 4242;
  p.comm =
      "py\xff"
      "t) (3";
  p.state = CudaState::kLocked;
  p.driver_release = "580.159.04";
  p.driver_api = 13000;
  p.created_us = 1767225600123456;
  p.phos_version = "0.1.0";
  p.gpus.resize(2);
  p.gpus[0].uuid = {0x15, 0x5e, 0x86, 0x6b, 0x91, 0x44, 0x3f, 0x4c,
                    0xec, 0x25, 0xf1, 0xc3, 0xd4, 0x92, 0xb8, 0xc2};
  p.gpus[1].uuid = {0xfe, 0xdc, 0xba, 0x98, 0x76, 0x54, 0x32, 0x10,
                    0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef};
  for (GpuInfo& gpu : p.gpus) {
    gpu.name = "NVIDIA H200";
    gpu.total_bytes = 150119120896;
  }
  p.allocations = {
      {0x7f2000000000, 8589934592, 0, MemoryKind::kDevice, MemoryPath::kDriver},
      {0x7f2200000000, 2097152, 1, MemoryKind::kDevice, MemoryPath::kDriver},
      {0x302000000, 33554432, 0, MemoryKind::kPool, MemoryPath::kDriver},
      {0x7f3000000000, 328680, 1, MemoryKind::kVirtual, MemoryPath::kReleased},
      {0x7f4000000000, 1048576, 0, MemoryKind::kManaged, MemoryPath::kShared},
      {0x7f5000000000, 4096, -1, MemoryKind::kHost, MemoryPath::kDriver},
      {0xfffffffffffff000, 4096, -1, MemoryKind::kUnknown, MemoryPath::kDriver},
  };
  p.timings.scan_us = 10250;
  p.timings.checkpoint_us = 1400000;
  p.allocations[3].buffer_id = 77;
  for (const char* hash : {"zero page 0 ....", "parent's page 1.", "parent's page 2.",
                           "page 3, slot 1..", "zero page 4 ....", "page 5, slot 0.."}) {
    p.allocations[3].hashes.push_back(hash_of(hash));
  }
  p.allocations[3].extents = {{0, 1, PageSource::kZero},
                              {1, 2, PageSource::kParent},
                              {3, 1, PageSource::kHere, 1},
                              {4, 1, PageSource::kZero},
                              {5, 1, PageSource::kHere, 0}};
  for (size_t i = 0; i < p.parent_dump_id.size(); i++) {
    p.parent_dump_id[i] = static_cast<uint8_t>(0xf0 + i);
  }
  p.hash_key = {1, 0, 'k', 'e', 'y', 0xff};
  p.rounds = {{6, 4, 262144, 1500}, {6, 1, 65536, 20}};
  return p;
}

// The files of test/golden/phos-files.txt.
inline FilesImage golden_files() {
  return {kDump, {{7, "/dev/nvidiactl", 0x80002}, {300, "/dev/nvidia0", 2}}};
}

inline ProcessImage small_process(int pid, const DumpId& dump_id = kDump) {
  ProcessImage p;
  p.dump_id = dump_id;
  p.pid = pid;
  p.comm = "app";
  p.driver_api = 12080;
  return p;
}

inline void expect_equal(const ProcessImage& a, const ProcessImage& b) {
  EXPECT_EQ(a.dump_id, b.dump_id);
  EXPECT_EQ(a.pid, b.pid);
  EXPECT_EQ(a.comm, b.comm);
  EXPECT_EQ(a.state, b.state);
  EXPECT_EQ(a.driver_release, b.driver_release);
  EXPECT_EQ(a.driver_api, b.driver_api);
  EXPECT_EQ(a.created_us, b.created_us);
  EXPECT_EQ(a.phos_version, b.phos_version);
  ASSERT_EQ(a.gpus.size(), b.gpus.size());
  for (size_t i = 0; i < a.gpus.size(); i++) {
    EXPECT_EQ(a.gpus[i].uuid, b.gpus[i].uuid);
    EXPECT_EQ(a.gpus[i].name, b.gpus[i].name);
    EXPECT_EQ(a.gpus[i].total_bytes, b.gpus[i].total_bytes);
  }
  ASSERT_EQ(a.allocations.size(), b.allocations.size());
  for (size_t i = 0; i < a.allocations.size(); i++) {
    EXPECT_EQ(a.allocations[i].address, b.allocations[i].address);
    EXPECT_EQ(a.allocations[i].size, b.allocations[i].size);
    EXPECT_EQ(a.allocations[i].gpu, b.allocations[i].gpu);
    EXPECT_EQ(a.allocations[i].kind, b.allocations[i].kind);
    EXPECT_EQ(a.allocations[i].path, b.allocations[i].path);
    EXPECT_EQ(a.allocations[i].buffer_id, b.allocations[i].buffer_id);
    EXPECT_TRUE(a.allocations[i].hashes == b.allocations[i].hashes);
    EXPECT_TRUE(a.allocations[i].extents == b.allocations[i].extents);
  }
  EXPECT_EQ(a.timings.scan_us, b.timings.scan_us);
  EXPECT_EQ(a.timings.lock_us, b.timings.lock_us);
  EXPECT_EQ(a.timings.checkpoint_us, b.timings.checkpoint_us);
  EXPECT_EQ(a.timings.gate_us, b.timings.gate_us);
  EXPECT_EQ(a.timings.validate_us, b.timings.validate_us);
  EXPECT_EQ(a.timings.write_us, b.timings.write_us);
  EXPECT_EQ(a.timings.release_us, b.timings.release_us);
  EXPECT_EQ(a.timings.copy_us, b.timings.copy_us);
  EXPECT_EQ(a.timings.stopped_us, b.timings.stopped_us);
  EXPECT_EQ(a.device_bytes, b.device_bytes);
  EXPECT_EQ(a.gpu_bytes, b.gpu_bytes);
  EXPECT_EQ(a.stage, b.stage);
  EXPECT_EQ(a.parent_dump_id, b.parent_dump_id);
  EXPECT_EQ(a.hash_key, b.hash_key);
  EXPECT_TRUE(a.rounds == b.rounds);
}

inline void expect_equal(const FilesImage& a, const FilesImage& b) {
  EXPECT_EQ(a.dump_id, b.dump_id);
  ASSERT_EQ(a.files.size(), b.files.size());
  for (size_t i = 0; i < a.files.size(); i++) {
    EXPECT_EQ(a.files[i].id, b.files[i].id);
    EXPECT_EQ(a.files[i].path, b.files[i].path);
    EXPECT_EQ(a.files[i].flags, b.files[i].flags);
  }
}

}  // namespace phos::image_test
