// SPDX-License-Identifier: GPL-2.0-only
// Chains that are squashed and rebased. What each image has to hold is the memory that was dumped.
#include <sys/stat.h>

#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/page_codec.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/image/repack.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kFirst = 0x10000000, kSecond = 0x20000000;

// `pages` pages that differ from each other and from those of another seed; the last one is short.
Memory memory(int gpu, size_t pages, uint8_t seed) {
  Memory m{gpu, Bytes(pages * kPage - 100)};
  for (size_t i = 0; i < m.bytes.size(); i++) {
    m.bytes[i] = static_cast<uint8_t>(seed + i / kPage * 7 + i % 251);
  }
  return m;
}

void fill(Memory* m, size_t page, uint8_t value) {
  std::fill_n(m->bytes.begin() + static_cast<ptrdiff_t>(page * kPage),
              std::min(kPage, m->bytes.size() - page * kPage), value);
}

class Repack : public ChainTest {
 protected:
  // Three dumps of a process with memory on both GPUs.
  void SetUp() override {
    now_ = {{kFirst, memory(0, 8, 1)}, {kSecond, memory(1, 4, 100)}};
    for (uint8_t level = 1; level <= 3; level++) {
      dump(level, now_);
      were_[level] = now_;
      fill(&now_[kFirst], level, static_cast<uint8_t>(200 + level));
      fill(&now_[kSecond], level, 0);
    }
  }

  // What the image in `dir_fd` says that the memory was.
  static void expect_holds(int dir_fd, const Memories& memories, int pid = 7) {
    auto chain = PageChain::open(dir_fd, pid, PageIo::kCached);
    ASSERT_TRUE(chain) << chain.error().message();
    const ProcessImage& image = chain->image();
    ASSERT_EQ(image.allocations.size(), memories.size());
    AlignedPages read(1), wanted(1);
    for (size_t i = 0; i < image.allocations.size(); i++) {
      const AllocationInfo& a = image.allocations[i];
      const Memory& m = memories.at(a.address);
      ASSERT_EQ(a.size, m.bytes.size());
      EXPECT_EQ(a.gpu, m.gpu);
      for (uint64_t page = 0; page < page_count(a); page++) {
        auto ok = chain->read_page(i, page, read[0]);
        ASSERT_TRUE(ok) << ok.error().message();
        copy_page(m, page, wanted[0]);
        ASSERT_EQ(memcmp(read[0], wanted[0], kPage), 0) << a.address << " page " << page;
        EXPECT_EQ(a.hashes[page], toy_hash(image.hash_key, wanted[0], kPage));
      }
    }
  }

  // After it `level` has nothing to build on.
  void cut(uint8_t level) { ASSERT_EQ(unlink(path(level, "parent").c_str()), 0); }
  void link_to(uint8_t level, uint8_t parent) {
    cut(level);
    ASSERT_EQ(symlink(("../" + std::to_string(parent)).c_str(), path(level, "parent").c_str()), 0);
  }

  ImageSet set(int dir_fd) {
    auto set = read_image_set(dir_fd);
    EXPECT_TRUE(set) << set.error().message();
    return set ? std::move(*set) : ImageSet();
  }
  int new_directory(const std::string& name) {
    EXPECT_EQ(mkdir(dir_.path(name).c_str(), 0700), 0);
    fds_[100].reset(open(dir_.path(name).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    return fds_[100].get();
  }
  std::set<std::string> names(uint8_t level) const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(path(level))) {
      names.insert(entry.path().filename());
    }
    return names;
  }
  // Flips a bit of a slot.
  void damage(uint8_t level, const std::string& name, uint64_t slot) {
    Bytes bytes = read_bytes(path(level, name));
    bytes.at((slot + 1) * kPage + 5) ^= 1;
    write_bytes(path(level, name), bytes);
  }
  template <typename R>
  static RepackReport ok(const R& report) {
    EXPECT_TRUE(report) << report.error().message();
    return report ? *report : RepackReport();
  }
  PageCounts pages(int dir_fd, int pid = 7) {
    auto image = read_process_image(dir_fd, pid);
    EXPECT_TRUE(image) << image.error().message();
    return image ? count_pages(*image) : PageCounts();
  }

  // As phosd dumps: pages that are somewhere in the parents are not saved again. On top of the
  // level before.
  void dump_by_store(uint8_t level, const Memories& memories, PageStoreOptions options) {
    make_directory(level);
    auto previous = PreviousPages::open(fd(static_cast<uint8_t>(level - 1)), 7);
    ASSERT_TRUE(previous) << previous.error().message();
    auto store = PageStore::create(fd(level), dump_id(level), std::move(options));
    ASSERT_TRUE(store) << store.error().message();
    ProcessImage image = small_process(7, dump_id(level));
    image.hash_key = kKey;
    image.gpus = two_gpus();
    image.parent_dump_id = (*previous)->dump_id();
    image.layout = (*store)->layout();
    image.key_id = (*store)->key_id();
    const uint32_t key = (*store)->add_key(kKey);
    std::vector<std::pair<AllocationInfo, std::vector<PageStore::PageId>>> saved;
    AlignedPages page(1);
    std::map<int, uint32_t> files;
    for (const auto& [address, memory] : memories) {
      AllocationInfo a{address, memory.bytes.size(), memory.gpu, MemoryKind::kDevice,
                       MemoryPath::kReleased};
      if (!files.contains(a.gpu)) files[a.gpu] = *(*store)->add_file(7, a.gpu);
      std::vector<PageStore::PageId> ids;
      for (uint64_t i = 0; i < page_count(a); i++) {
        copy_page(memory, i, page[0]);
        auto claim =
            (*store)->claim(files[a.gpu], key, toy_hash(kKey, page[0], kPage), &**previous);
        ASSERT_TRUE(claim) << claim.error().message();
        const PageStore::NewPage one{claim->page, page[0]};
        ASSERT_TRUE(!claim->is_new || (*store)->store(files[a.gpu], {&one, 1}));
        ids.push_back(claim->page);
      }
      saved.emplace_back(std::move(a), std::move(ids));
    }
    ASSERT_TRUE((*store)->finish());
    for (auto& [a, ids] : saved) {
      PageAppender pages(&image, &a);
      for (uint64_t i = 0; i < ids.size(); i++) {
        copy_page(memories.at(a.address), i, page[0]);
        pages.add(toy_hash(kKey, page[0], kPage), (*store)->place(ids[i]));
      }
      image.allocations.push_back(std::move(a));
    }
    auto written = write_process_image(fd(level), image);
    ASSERT_TRUE(written) << written.error().message();
  }

  Memories now_;
  std::map<uint8_t, Memories> were_;
};

TEST_F(Repack, ToANewDirectory) {
  // Of the 12 pages two are zero by the third dump.
  const int to = new_directory("new");
  const RepackReport r = ok(repack_to(fd(3), set(fd(3)), to, -1, toy_hasher, {}));
  EXPECT_EQ(r.processes, 1u);
  EXPECT_EQ(r.pages, 12u);
  EXPECT_EQ(r.zero_pages, 2u);
  EXPECT_EQ(r.stored_pages, 10u);
  EXPECT_EQ(r.equal_pages + r.kept_pages + r.parent_pages, 0u);
  EXPECT_EQ(r.bytes, 10 * kPage);
  for (uint8_t level = 1; level <= 3; level++) fs::remove_all(path(level));
  expect_holds(to, were_[3]);
  const ImageSet alone = set(to);
  EXPECT_EQ(alone.files.dump_id, dump_id(3));
  EXPECT_EQ(alone.chains[0].size(), 1u);
  // Nothing of it takes a newer reader.
  EXPECT_EQ(read_bytes(dir_.path("new/phos-7.img"))[8], 1);
}

TEST_F(Repack, EqualPagesAndZeroPagesAreStoredOnce) {
  // By a writer that does not look for them.
  ProcessImage image = dump(4, {{kFirst, memory(0, 1, 9)}});
  Bytes bytes(6 * kPage);  // a header; a page three times, one of zeros, one of its own
  std::fill_n(bytes.begin() + kPage, 3 * kPage, 7);
  std::fill_n(bytes.begin() + 5 * kPage, kPage, 8);
  auto file = create(4, 7, 0);
  AlignedPages pages(5);
  memcpy(pages[0], &bytes[kPage], 5 * kPage);
  ASSERT_TRUE(file->write(0, pages[0], 5));
  ASSERT_TRUE(file->finish());
  AllocationInfo& a = image.allocations[0];
  a.size = 5 * kPage;
  a.hashes.clear();
  for (size_t i = 0; i < 5; i++) a.hashes.push_back(toy_hash(kKey, pages[i], kPage));
  a.extents = {{0, 5, PageSource::kHere, 0}};
  ASSERT_TRUE(write_process_image(fd(4), image));
  const int to = new_directory("new");
  const RepackReport r = ok(repack_to(fd(4), set(fd(4)), to, -1, toy_hasher, {}));
  EXPECT_EQ(r.stored_pages, 2u);
  EXPECT_EQ(r.equal_pages, 2u);
  EXPECT_EQ(r.zero_pages, 1u);
  EXPECT_EQ(fs::file_size(dir_.path("new/phos-pages-7-0.img")), 3 * kPage);
  Memory wanted{0, Bytes(bytes.begin() + kPage, bytes.end())};
  expect_holds(to, {{kFirst, wanted}});
}

TEST_F(Repack, EqualPagesOfTwoProcessesAreStoredOnce) {
  dump(1, were_[1], 9);
  const int to = new_directory("new");
  const RepackReport r = ok(repack_to(fd(1), set(fd(1)), to, -1, toy_hasher, {}));
  EXPECT_EQ(r.processes, 2u);
  EXPECT_EQ(r.stored_pages, 12u);
  EXPECT_EQ(r.equal_pages, 12u);
  expect_holds(to, were_[1], 7);
  expect_holds(to, were_[1], 9);
}

TEST_F(Repack, InPlace) {
  const std::map<std::string, Bytes> own = {
      {"phos-pages-7-0.img", read_bytes(path(3, "phos-pages-7-0.img"))}};
  EXPECT_FALSE(fs::exists(path(3, "phos-pages-7-1.img")));
  const RepackReport r = ok(squash_in_place(fd(3), set(fd(3)), -1, toy_hasher, {}));
  EXPECT_EQ(r.pages, 12u);
  EXPECT_EQ(r.zero_pages, 2u);
  EXPECT_EQ(r.kept_pages, 1u);
  EXPECT_EQ(r.stored_pages, 9u);
  cut(3);
  fs::remove_all(path(1));
  fs::remove_all(path(2));
  expect_holds(fd(3), were_[3]);
  EXPECT_EQ(set(fd(3)).chains[0].size(), 1u);
  // What was there is as it was; the rest is in a file that belongs to no GPU.
  for (const auto& [name, bytes] : own) EXPECT_EQ(read_bytes(path(3, name)), bytes) << name;
  EXPECT_EQ(fs::file_size(path(3, "phos-pages-7-2.img")), 10 * kPage);
  EXPECT_TRUE(verify(3)->ok());
  // Again: there is nothing to do.
  const RepackReport again = ok(squash_in_place(fd(3), set(fd(3)), -1, toy_hasher, {}));
  EXPECT_EQ(again.kept_pages, 10u);
  EXPECT_EQ(again.stored_pages, 0u);
  expect_holds(fd(3), were_[3]);
}

TEST_F(Repack, InPlaceOfWhatOthersBuildOn) {
  ok(squash_in_place(fd(2), set(fd(2)), -1, toy_hasher, {}));
  cut(2);
  fs::remove_all(path(1));
  expect_holds(fd(2), were_[2]);
  expect_holds(fd(3), were_[3]);
  EXPECT_EQ(set(fd(3)).chains[0].size(), 2u);
}

TEST_F(Repack, DamageIsNamedAndLeavesNothing) {
  // Page 5 of the first allocation, only ever saved in the first dump.
  damage(1, "phos-pages-7-0.img", 5);
  const auto before = names(3);
  const Bytes image = read_bytes(path(3, "phos-7.img"));
  auto r = squash_in_place(fd(3), set(fd(3)), -1, toy_hasher, {});
  ASSERT_EQ(image_error_of(r), ImageError::kDamagedPage);
  for (const std::string& text :
       {std::string("process 7, GPU-01010101-"), std::string("allocation at 0x10000000"),
        std::string("offset 327680: 1 page is not what was saved"),
        path(1, "phos-pages-7-0.img") + ", slot 5"}) {
    EXPECT_NE(r.error().message().find(text), std::string::npos) << r.error().message();
  }
  EXPECT_EQ(names(3), before);
  EXPECT_EQ(read_bytes(path(3, "phos-7.img")), image);
  const int to = new_directory("new");
  EXPECT_EQ(image_error_of(repack_to(fd(3), set(fd(3)), to, -1, toy_hasher, {})),
            ImageError::kDamagedPage);
  EXPECT_TRUE(fs::is_empty(dir_.path("new")));
}

TEST_F(Repack, AnotherParent) {
  // Onto the first dump: of the changes since, the second one's are in neither.
  const int to = new_directory("new");
  ASSERT_EQ(symlink("../1", dir_.path("new/parent").c_str()), 0);
  const RepackReport r = ok(repack_to(fd(3), set(fd(3)), to, fd(1), toy_hasher, {}));
  EXPECT_EQ(r.zero_pages, 2u);
  EXPECT_EQ(r.stored_pages, 2u);  // pages 1 and 2 of the first allocation
  EXPECT_EQ(r.parent_pages, 8u);
  fs::remove_all(path(2));
  expect_holds(to, were_[3]);
  EXPECT_EQ(set(to).chains[0].size(), 2u);
  EXPECT_EQ(pages(to), (PageCounts{.here = 2, .parent = 8, .zero = 2}));
}

TEST_F(Repack, AnotherParentInPlace) {
  ok(squash_in_place(fd(3), set(fd(3)), fd(1), toy_hasher, {}));
  expect_holds(fd(3), were_[3]);  // its link leads to the second one still
  link_to(3, 1);
  fs::remove_all(path(2));
  expect_holds(fd(3), were_[3]);
  const RepackReport r = ok(build_in_place_on(fd(3), set(fd(3)), fd(1), toy_hasher, {}));
  EXPECT_EQ(r.parent_pages, 8u);
  EXPECT_EQ(r.kept_pages, 2u);
  EXPECT_EQ(r.zero_pages, 2u);
  expect_holds(fd(3), were_[3]);
  auto freed = free_unused_pages(fd(3));
  ASSERT_TRUE(freed) << freed.error().message();
  EXPECT_EQ(freed->bytes, 8 * kPage);  // of the 9 that the first step copied
  expect_holds(fd(3), were_[3]);
  EXPECT_TRUE(verify(3)->ok());
}

TEST_F(Repack, PagesThatTheNewParentHasAreReadFirst) {
  damage(1, "phos-pages-7-0.img", 5);
  cut(2);
  dump(2, were_[2]);  // has all of its pages itself
  const auto before = read_bytes(path(2, "phos-7.img"));
  ASSERT_EQ(symlink("../1", path(2, "parent").c_str()), 0);
  auto r = build_in_place_on(fd(2), set(fd(2)), fd(1), toy_hasher, {});
  ASSERT_EQ(image_error_of(r), ImageError::kDamagedPage);
  EXPECT_NE(r.error().message().find(path(1, "phos-pages-7-0.img")), std::string::npos);
  EXPECT_EQ(read_bytes(path(2, "phos-7.img")), before);
}

TEST_F(Repack, OntoADumpWithAnotherKey) {
  key_ = {'o', 't', 'h', 'e', 'r'};
  ASSERT_EQ(mkdir(path(9).c_str(), 0700), 0);
  Memories others = were_[3];
  fill(&others[kFirst], 7, 77);
  dump(9, others);
  ok(squash_in_place(fd(3), set(fd(3)), fd(9), toy_hasher, {}));
  expect_holds(fd(3), were_[3]);
  EXPECT_EQ(read_process_image(fd(3), 7)->hash_key, key_);
  link_to(3, 9);
  const RepackReport r = ok(build_in_place_on(fd(3), set(fd(3)), fd(9), toy_hasher, {}));
  EXPECT_EQ(r.parent_pages, 9u);
  EXPECT_EQ(r.kept_pages, 1u);
  expect_holds(fd(3), were_[3]);
  // And at once, to a new directory, from the old images.
  const int to = new_directory("new");
  ASSERT_EQ(symlink("../9", dir_.path("new/parent").c_str()), 0);
  ok(repack_to(fd(2), set(fd(2)), to, fd(9), toy_hasher, {}));
  expect_holds(to, were_[2]);
}

TEST_F(Repack, CompressedAndOnTopOfCompressed) {
  RepackOptions zstd;
  zstd.compression = CompressionChoice{Compression::kZstd, 1};
  const int to = new_directory("new");
  const RepackReport r = ok(repack_to(fd(3), set(fd(3)), to, -1, toy_hasher, zstd));
  EXPECT_EQ(r.stored_pages, 10u);
  EXPECT_LE(r.bytes, 10 * 2 * kPageUnit);  // text of 251 bytes, again and again
  expect_holds(to, were_[3]);
  // What is stored with it later is compressed in the same way.
  fs::create_directory(path(20));
  fs::permissions(path(20), fs::perms::owner_all);
  const RepackReport again = ok(repack_to(to, set(to), fd(20), -1, toy_hasher, {}));
  EXPECT_EQ(again.bytes, r.bytes);
  expect_holds(fd(20), were_[3]);
}

TEST_F(Repack, PagesInOtherFilesOfParentsAndEncryptedOnes) {
  SecretKey secret;
  secret.data()[0] = 77;
  auto key = std::make_shared<const ImageKey>(*ImageKey::make(secret));
  add_image_key(key);
  // Memory that has moved: on another GPU, and begun a page later.
  Memories moved = {{kSecond, memory(0, 6, 50)}, {kFirst, memory(1, 8, 1)}};
  for (size_t page = 1; page < 6; page++) {
    std::copy_n(were_[3][kFirst].bytes.begin() + static_cast<ptrdiff_t>((page - 1) * kPage), kPage,
                moved[kSecond].bytes.begin() + static_cast<ptrdiff_t>(page * kPage));
    moved[kSecond].bytes.resize(6 * kPage);
  }
  for (bool in_place : {false, true}) {
    SCOPED_TRACE(in_place);
    dump_by_store(4, moved, {{Compression::kZstd, 1}, key});
    EXPECT_GT(pages(fd(4)).other, 8u);
    int to = fd(4);
    if (in_place) {
      ok(squash_in_place(to, set(to), -1, toy_hasher, {}));
      cut(4);
    } else {
      to = new_directory("new");
      ok(repack_to(fd(4), set(fd(4)), to, -1, toy_hasher, {}));
    }
    for (uint8_t level = 1; level <= 3; level++) fs::rename(path(level), path(level) + "-away");
    expect_holds(to, moved);
    auto image = read_process_image(to, 7);
    ASSERT_TRUE(image) << image.error().message();
    EXPECT_EQ(image->key_id, key->id());
    EXPECT_TRUE(image->layout.sealed);
    for (const PagesFileRef& file : image->other_files) EXPECT_TRUE(file.layout.sealed);
    for (uint8_t level = 1; level <= 3; level++) fs::rename(path(level) + "-away", path(level));
    if (!in_place) fs::remove_all(path(4));
    if (!in_place) fds_.erase(4);
  }
}

TEST_F(Repack, ProgressAndInterruption) {
  uint64_t calls = 0;
  RepackOptions options;
  options.check = [&] {
    return ++calls > 1 ? Result<void>(Error(Domain::kErrno, EINTR, "enough")) : Result<void>();
  };
  options.jobs = 1;
  const auto before = names(3);
  auto r = squash_in_place(fd(3), set(fd(3)), -1, toy_hasher, options);
  ASSERT_FALSE(r);
  EXPECT_EQ(r.error().code(), EINTR);
  EXPECT_EQ(names(3), before);
}

TEST_F(Repack, LeftoversOfAKilledWriter) {
  // A file that was complete, and one that was not.
  ASSERT_TRUE(PageFileWriter::create(fd(3), 7, 2, dump_id(3)).value()->finish());
  write_bytes(path(3, "phos-pages-7-3.img.tmp"), Bytes(100));
  write_bytes(path(3, "phos-7.img.tmp"), Bytes(100));
  write_bytes(path(3, "other.tmp"), Bytes(100));
  UniqueFd in_use(open(path(3, "phos-7.img.tmp").c_str(), O_WRONLY | O_CLOEXEC));
  auto freed = remove_leftovers(fd(3));
  ASSERT_TRUE(freed) << freed.error().message();
  EXPECT_EQ(freed->files, 2u);
  EXPECT_EQ(names(3), (std::set<std::string>{"other.tmp", "parent", "phos-7.img", "phos-7.img.tmp",
                                             "phos-pages-7-0.img"}));
  expect_holds(fd(3), were_[3]);
}

}  // namespace
}  // namespace phos::image_test
