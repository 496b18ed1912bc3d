// SPDX-License-Identifier: GPL-2.0-only
// What the tests of chains share: directories linked as CRIU links them, a toy hash, and a dump
// that saves what its parent does not have.
#pragma once

#include <map>
#include <memory>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/verify.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {

inline constexpr size_t kPage = 65536;
inline const Bytes kKey = {'k', 'e', 'y'};

// 128 bits, good enough to tell the pages of a test apart: two FNV-1a.
inline SavedHash toy_hash(const Bytes& key, const void* page, size_t bytes) {
  uint64_t a = 0xcbf29ce484222325, b = 0x9ae16a3b2f90404f;
  auto mix = [&](uint64_t word) {
    a = (a ^ word) * 0x100000001b3;
    b = (b ^ (word + 0x51)) * 0x100000001b3;
    b ^= b >> 29;
  };
  for (uint8_t byte : key) mix(byte);
  for (size_t i = 0; i < bytes; i += 8) {
    uint64_t word;
    memcpy(&word, static_cast<const uint8_t*>(page) + i, 8);
    mix(word);
  }
  SavedHash hash;
  memcpy(hash.data(), &a, 8);
  memcpy(hash.data() + 8, &b, 8);
  return hash;
}

inline Result<PageHasher> toy_hasher(const Bytes& key) {
  return PageHasher([key](const void* page) { return toy_hash(key, page, kPage); });
}

inline DumpId dump_id(uint8_t level) {
  DumpId id{};
  id.fill(level);
  return id;
}

// Memory of a process: what is at an address of a GPU.
struct Memory {
  int gpu = 0;
  Bytes bytes;
};
using Memories = std::map<uint64_t, Memory>;  // by address

inline std::vector<GpuInfo> two_gpus() {
  std::vector<GpuInfo> gpus(2);
  for (size_t i = 0; i < 2; i++) {
    gpus[i].uuid.fill(static_cast<uint8_t>(i + 1));
    gpus[i].name = "GPU";
    gpus[i].total_bytes = 1 << 30;
  }
  return gpus;
}

// Page `page` of the memory, with zeros up to its end.
inline void copy_page(const Memory& memory, uint64_t page, uint8_t* to) {
  const size_t offset = page * kPage, bytes = std::min(kPage, memory.bytes.size() - offset);
  memset(to, 0, kPage);
  memcpy(to, memory.bytes.data() + offset, bytes);
}

inline void append(std::vector<PageExtent>* extents, PageSource source, uint32_t page,
                   uint32_t slot) {
  if (!extents->empty()) {
    PageExtent& last = extents->back();
    bool follows = source != PageSource::kHere || last.slot + last.pages == slot;
    if (last.source == source && follows) {
      last.pages++;
      return;
    }
  }
  extents->push_back({page, 1, source, source == PageSource::kHere ? slot : 0});
}

// The chain of an image is the same whether what it builds on is read again or not.
inline void expect_same_on(const PageChain& parent, int dir_fd, const ProcessImage& image) {
  auto read = PageChain::open(dir_fd, image, PageIo::kCached);
  ASSERT_TRUE(read) << read.error().message();
  auto on = PageChain::open_on(parent, dir_fd, image, PageIo::kCached);
  ASSERT_TRUE(on) << on.error().message();
  ASSERT_EQ(on->levels().size(), read->levels().size());
  for (size_t i = 0; i < read->levels().size(); i++) {
    EXPECT_EQ(on->levels()[i].dump_id, read->levels()[i].dump_id);
    EXPECT_EQ(on->levels()[i].directory, read->levels()[i].directory);
  }
  AlignedPages pages(2);
  for (size_t a = 0; a < image.allocations.size(); a++) {
    for (uint64_t i = 0; i < image.allocations[a].hashes.size(); i++) {
      const auto there = read->locate(a, i), here = on->locate(a, i);
      ASSERT_TRUE(there && here);
      ASSERT_EQ(there->is_stored(), here->is_stored());
      if (there->is_stored()) {
        const PagePlace x = read->place(*there), y = on->place(*here);
        EXPECT_TRUE(x.file == y.file && x.slot == y.slot);
        EXPECT_EQ(read->level(*there), on->level(*here));
      }
      ASSERT_TRUE(read->read_page(a, i, pages[0]));
      ASSERT_TRUE(on->read_page(a, i, pages[1]));
      EXPECT_EQ(memcmp(pages[0], pages[1], kPage), 0) << "allocation " << a << ", page " << i;
    }
  }
}

// Directories "1", "2", …, each with a link `parent` to the one before.
class ChainTest : public testing::Test {
 protected:
  std::string path(uint8_t level, const std::string& name = "") const {
    return dir_.path(std::to_string(level)) + (name.empty() ? "" : "/" + name);
  }
  // The descriptor lives until the test ends.
  int fd(uint8_t level) {
    UniqueFd& fd = fds_[level];
    if (!fd) fd.reset(open(path(level).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    EXPECT_TRUE(fd) << path(level);
    return fd.get();
  }
  void make_directory(uint8_t level) {
    ASSERT_EQ(mkdir(path(level).c_str(), 0700), 0);
    if (level == 1) return;
    const std::string target = "../" + std::to_string(level - 1);
    ASSERT_EQ(symlink(target.c_str(), path(level, "parent").c_str()), 0);
  }

  // Saves `memories` in directory `level`, which it makes.
  ProcessImage dump(uint8_t level, const Memories& memories, int pid = 7) {
    if (!std::filesystem::exists(path(level))) make_directory(level);
    ProcessImage image = small_process(pid, dump_id(level));
    image.hash_key = key_;
    image.gpus = two_gpus();
    image.created_us = level;
    std::optional<PreviousPages> previous;
    if (std::filesystem::exists(path(level, "parent"))) {
      auto parent = open_parent(fd(level));
      EXPECT_TRUE(parent) << parent.error().message();
      auto opened = PreviousPages::open(parent->get(), pid);
      EXPECT_TRUE(opened) << opened.error().message();
      previous = std::move(*opened);
      EXPECT_TRUE(previous);
      image.parent_dump_id = previous->dump_id();
      EXPECT_EQ(previous->hash_key(), key_);
    }
    std::unique_ptr<PageFileWriter> files[2];
    AlignedPages page(1);
    for (const auto& [address, memory] : memories) {
      AllocationInfo a{address, memory.bytes.size(), memory.gpu, MemoryKind::kDevice,
                       MemoryPath::kReleased};
      const auto* known =
          previous ? previous->find(image.gpus[static_cast<size_t>(a.gpu)].uuid, address, a.size)
                   : nullptr;
      auto& file = files[memory.gpu];
      for (uint32_t i = 0; i < page_count(a); i++) {
        copy_page(memory, i, page[0]);
        a.hashes.push_back(toy_hash(key_, page[0], kPage));
        if (std::all_of(page[0], page[0] + kPage, [](uint8_t b) { return b == 0; })) {
          append(&a.extents, PageSource::kZero, i, 0);
        } else if (known && known->hashes[i] == a.hashes[i]) {
          append(&a.extents, PageSource::kParent, i, 0);
        } else {
          if (!file) file = create(level, pid, memory.gpu);
          const auto slot = static_cast<uint32_t>(file->slots());
          EXPECT_TRUE(file->write(slot, page[0], 1));
          append(&a.extents, PageSource::kHere, i, slot);
        }
      }
      image.allocations.push_back(std::move(a));
    }
    for (auto& file : files) EXPECT_TRUE(!file || file->finish());
    auto written = write_process_image(fd(level), image);
    EXPECT_TRUE(written) << written.error().message();
    if (previous) expect_same_on(previous->chain(), fd(level), image);
    return image;
  }

  std::unique_ptr<PageFileWriter> create(uint8_t level, int pid, int gpu) {
    auto file = PageFileWriter::create(fd(level), pid, gpu, dump_id(level));
    EXPECT_TRUE(file) << file.error().message();
    return std::move(*file);
  }

  Result<PageChain> open_chain(uint8_t level, int pid = 7) {
    return PageChain::open(fd(level), pid, PageIo::kCached);
  }
  Result<VerifyReport> verify(uint8_t level, const VerifyOptions& options = {}) {
    auto set = read_image_set(fd(level));
    if (!set) return set.error();
    return verify_images(fd(level), std::move(*set), toy_hasher, options);
  }
  // The chain of `level` is refused for this reason, with this in the message.
  void expect_refused(uint8_t level, ImageError code, const std::string& text) {
    auto chain = open_chain(level);
    ASSERT_EQ(image_error_of(chain), code) << (chain ? "" : chain.error().message());
    EXPECT_NE(chain.error().message().find(text), std::string::npos) << chain.error().message();
    EXPECT_EQ(chain.error().message().find('\n'), std::string::npos);
    // A set with such a chain is no set.
    EXPECT_EQ(image_error_of(read_image_set(fd(level))), code);
  }

  Bytes key_ = kKey;  // of the next dump
  TempDir dir_;
  std::map<uint8_t, UniqueFd> fds_;
};

}  // namespace phos::image_test
