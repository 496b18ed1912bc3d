// SPDX-License-Identifier: GPL-2.0-only
// Directories of images with real pages and real hashes, for the commands that read them.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/page_file.h"
#include "test/tools/harness.h"

namespace phos::test {

using Words = std::vector<std::string>;

inline constexpr size_t kPage = kImagePageSize;
struct SavedMemory {
  uint64_t address = 0;
  std::string bytes;
  MemoryPath path = MemoryPath::kReleased;
  bool saved = true;  // its pages are in the images
};

// Of a process on one GPU.
inline ProcessImage image_without_memory(int pid) {
  ProcessImage image;
  image.pid = pid;
  image.comm = "train";
  image.driver_release = "580.159.04";
  image.driver_api = 13000;
  image.created_us = 1;
  image.phos_version = "0.1.0";
  image.gpus.resize(1);
  image.gpus[0].uuid.fill(1);
  image.gpus[0].name = "NVIDIA of the test";
  image.gpus[0].total_bytes = 1 << 30;
  return image;
}

// `pages` pages of text; no two of them, and none of another `seed`, are equal.
inline std::string text_pages(size_t pages, unsigned seed) {
  std::string text;
  for (size_t line = 0; text.size() < pages * kPage; line++) {
    text += "line " + std::to_string(line) + " of " + std::to_string(seed) + "\n";
  }
  text.resize(pages * kPage);
  return text;
}

class Images : public Installation {
 protected:
  Outcome phos(const Words& args) const { return run(tool("phos", args)); }

  // Fails with one line on standard error that has this in it, and nothing on standard output.
  void expect_refused(const Outcome& o, const std::string& text, int code = 1) const {
    EXPECT_EQ(o.code, code);
    EXPECT_EQ(o.out, "");
    EXPECT_EQ(o.err_lines().size(), 1u) << o.err;
    EXPECT_NE(o.err.find(text), std::string::npos) << o.err;
  }

  static UniqueFd open_dir(const std::string& dir) {
    return UniqueFd(open(dir.c_str(), O_DIRECTORY | O_RDONLY | O_CLOEXEC));
  }

  // Adds process `pid` to a dump; made, as CRIU leaves it, if it is missing.
  std::string dump(const std::string& name, const std::vector<SavedMemory>& memories,
                   const PageHashKey& key, int pid = 4242) const {
    const std::string dir = root(name);
    std::filesystem::create_directory(dir);
    write_file(dir + "/inventory.img", kInventory);
    UniqueFd fd = open_dir(dir);
    ProcessImage image = image_without_memory(pid);
    std::copy_n(name.begin(), std::min(name.size(), image.dump_id.size()), image.dump_id.begin());
    const std::string bytes = key.to_bytes();
    image.hash_key.assign(bytes.begin(), bytes.end());
    auto pages = PageFileWriter::create(fd.get(), pid, 0, image.dump_id);
    EXPECT_TRUE(pages.ok());
    std::unique_ptr<char, void (*)(void*)> page(static_cast<char*>(aligned_alloc(4096, kPage)),
                                                free);
    for (const SavedMemory& m : memories) {
      AllocationInfo a{m.address, m.bytes.size(), 0, MemoryKind::kDevice, m.path};
      for (size_t at = 0; m.saved && at < m.bytes.size(); at += kPage) {
        memset(page.get(), 0, kPage);
        memcpy(page.get(), m.bytes.data() + at, std::min(kPage, m.bytes.size() - at));
        a.hashes.push_back(hash_page(key, page.get(), kPage).bytes);
        const auto number = static_cast<uint32_t>(at / kPage);
        if (std::all_of(page.get(), page.get() + kPage, [](char c) { return c == 0; })) {
          a.extents.push_back({number, 1, PageSource::kZero, 0});
          continue;
        }
        const auto slot = static_cast<uint32_t>((*pages)->slots());
        EXPECT_TRUE((*pages)->write(slot, page.get(), 1).ok());
        a.extents.push_back({number, 1, PageSource::kHere, slot});
      }
      image.allocations.push_back(std::move(a));
    }
    EXPECT_TRUE((*pages)->slots() == 0 || (*pages)->finish().ok());
    auto written = write_process_image(fd.get(), image);
    EXPECT_TRUE(written.ok()) << (written ? "" : written.error().message());
    return dir;
  }

  // Flips a bit of the file.
  static void damage(const std::string& path, size_t at) {
    std::string bytes = read_file(path);
    bytes.at(at) = static_cast<char>(bytes.at(at) ^ 4);
    write_file(path, bytes);
  }
};

}  // namespace phos::test
