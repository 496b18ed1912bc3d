// SPDX-License-Identifier: GPL-2.0-only
// PageStore and the images that refer to it: pages stored once, in whatever file, packed or not.
#include <random>
#include <thread>

#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_store.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

constexpr PageStore::PageId kZeroPage = PageStore::kEnd, kParentPage = PageStore::kEnd + 1;

// What kinds of pages there are: number 0 is zeros, odd ones compress, the others do not.
Bytes page_of(uint32_t kind) {
  Bytes page(kPage);
  if (kind == 0) return page;
  std::mt19937 random(kind);
  for (size_t i = 0; i < kPage; i += 4) {
    const uint32_t word = kind % 2 ? kind * (i / 4096) : static_cast<uint32_t>(random());
    memcpy(&page[i], &word, 4);
  }
  return page;
}

// A process that is dumped: one allocation, by kinds of pages.
struct Saver {
  Saver(PageStore& to, int process, int gpu_index, const PreviousPages* parent)
      : store(to), pid(process), gpu(gpu_index), previous(parent), key(to.add_key(kKey)) {
    auto added = store.add_file(pid, gpu);
    EXPECT_TRUE(added);
    file = *added;
  }

  // As CopiedMemory does: `now` is what the memory holds.
  void round(const std::vector<uint32_t>& now) {
    const size_t pages = now.size();
    kinds.resize(pages, UINT32_MAX);
    where.resize(pages, UINT32_MAX);
    hashes.resize(pages);
    AlignedPages data(pages);
    std::vector<PageStore::NewPage> fresh;
    std::vector<size_t> awaited;
    const AllocationInfo* known =
        previous
            ? previous->find(two_gpus()[static_cast<size_t>(gpu)].uuid, kAddress, pages * kPage)
            : nullptr;
    for (size_t i = 0; i < pages; i++) {
      if (kinds[i] == now[i]) continue;
      kinds[i] = now[i];
      const Bytes page = page_of(now[i]);
      memcpy(data[i], page.data(), kPage);
      hashes[i] = toy_hash(kKey, data[i], kPage);
      const auto before = where[i];
      if (now[i] == 0) {
        where[i] = kZeroPage;
      } else if (known && known->hashes[i] == hashes[i]) {
        where[i] = kParentPage;
      } else {
        auto claim = store.claim(file, key, hashes[i], previous);
        ASSERT_TRUE(claim) << claim.error().message();
        where[i] = claim->page;
        if (claim->is_new) fresh.push_back({claim->page, data[i]});
        if (claim->is_under_way) awaited.push_back(i);
      }
      if (before < PageStore::kEnd) store.drop(before);
    }
    auto stored = store.store(file, fresh);
    ASSERT_TRUE(stored) << stored.error().message();
    for (size_t i : awaited) EXPECT_TRUE(store.wait(where[i]));
  }

  ProcessImage image(const DumpId& id, const DumpId& parent) {
    ProcessImage image = small_process(pid, id);
    image.hash_key = kKey;
    image.gpus = two_gpus();
    image.parent_dump_id = parent;
    image.layout = store.layout();
    image.key_id = store.key_id();
    AllocationInfo a{kAddress, where.size() * kPage, gpu, MemoryKind::kDevice,
                     MemoryPath::kReleased};
    PageAppender pages(&image, &a);
    for (size_t i = 0; i < where.size(); i++) {
      if (where[i] < PageStore::kEnd) {
        pages.add(hashes[i], store.place(where[i]));
      } else {
        pages.add(hashes[i], where[i] == kZeroPage ? PageSource::kZero : PageSource::kParent);
      }
    }
    image.allocations.push_back(std::move(a));
    return image;
  }

  static constexpr uint64_t kAddress = 0x1000000;
  PageStore& store;
  const int pid, gpu;
  const PreviousPages* const previous;
  uint32_t key, file = 0;
  std::vector<uint32_t> kinds;
  std::vector<PageStore::PageId> where;
  std::vector<SavedHash> hashes;
};

class StoreTest : public ChainTest {
 protected:
  std::unique_ptr<PageStore> make_store(uint8_t level, PageStoreOptions options = {}) {
    if (!std::filesystem::exists(path(level))) make_directory(level);
    auto store = PageStore::create(fd(level), dump_id(level), std::move(options));
    EXPECT_TRUE(store) << store.error().message();
    return std::move(*store);
  }

  void expect_holds(uint8_t level, const ProcessImage& image, const std::vector<uint32_t>& kinds) {
    auto chain = PageChain::open(fd(level), image, PageIo::kDirect);
    ASSERT_TRUE(chain) << chain.error().message();
    AlignedPages all(kinds.size());
    for (const PageRun& run : chain->runs(0)) {
      auto read = chain->read(run, all[run.first_page]);
      ASSERT_TRUE(read) << read.error().message();
    }
    AlignedPages one(1);
    for (size_t i = 0; i < kinds.size(); i++) {
      const Bytes expected = page_of(kinds[i]);
      ASSERT_EQ(memcmp(all[i], expected.data(), kPage), 0) << "page " << i;
      ASSERT_TRUE(chain->read_page(0, i, one[0]));
      ASSERT_EQ(memcmp(one[0], expected.data(), kPage), 0) << "page " << i;
    }
  }

  uint64_t slots(uint8_t level, int pid, int gpu) {
    auto file = PageFile::open(fd(level), pid, gpu, dump_id(level), PageIo::kCached);
    EXPECT_TRUE(file) << file.error().message();
    return (*file)->slots();
  }
};

TEST_F(StoreTest, EachPageIsStoredOnce) {
  auto store = make_store(1);
  Saver a(*store, 7, 0, nullptr), b(*store, 8, 1, nullptr);
  a.round({1, 2, 1, 0, 3, 3});
  b.round({3, 1, 4, 0});
  ASSERT_TRUE(store->finish());
  EXPECT_EQ(store->statistics().stored, 4u);
  EXPECT_EQ(store->statistics().bytes, 4 * kPage);
  EXPECT_EQ(store->statistics().shared, 4u);
  EXPECT_EQ(slots(1, 7, 0), 3u);
  EXPECT_EQ(slots(1, 8, 1), 1u);
  const ProcessImage first = a.image(dump_id(1), {}), second = b.image(dump_id(1), {});
  EXPECT_TRUE(first.other_files.empty());
  EXPECT_EQ(second.other_files, (std::vector<PagesFileRef>{{dump_id(1), 7, 0, {}}}));
  EXPECT_EQ(count_pages(second), (PageCounts{1, 0, 1, 2, 0}));
  ASSERT_TRUE(write_process_image(fd(1), first));
  ASSERT_TRUE(write_process_image(fd(1), second));
  expect_holds(1, first, a.kinds);
  auto back = read_process_image(fd(1), 8);
  ASSERT_TRUE(back) << back.error().message();
  expect_equal(*back, second);
  expect_holds(1, *back, b.kinds);
  EXPECT_TRUE(read_image_set(fd(1)));
}

// A slot is used again only when nobody's page is in it.
TEST_F(StoreTest, SharedPageOutlivesItsFirstOwner) {
  auto store = make_store(1);
  Saver a(*store, 7, 0, nullptr), b(*store, 8, 0, nullptr);
  a.round({1, 2});
  b.round({1});
  a.round({4, 6});
  a.round({8, 10});
  ASSERT_TRUE(store->finish());
  EXPECT_EQ(slots(1, 7, 0), 4u);  // 1, and 2's slot again and again; one change lay between
  expect_holds(1, a.image(dump_id(1), {}), a.kinds);
  expect_holds(1, b.image(dump_id(1), {}), b.kinds);
}

// Whose image was not written since it has ended: the others' pages in its file are needed.
TEST_F(StoreTest, FileOfOneThatHasEnded) {
  auto store = make_store(1);
  auto a = std::make_unique<Saver>(*store, 7, 0, nullptr);
  Saver b(*store, 8, 0, nullptr);
  a->round({1, 2});
  b.round({2});
  for (auto page : a->where) store->drop(page);
  store->end_file(a->file);
  ASSERT_TRUE(store->finish());
  const ProcessImage image = b.image(dump_id(1), {});
  ASSERT_TRUE(write_process_image(fd(1), image));
  expect_holds(1, image, {2});
  auto set = read_image_set(fd(1));
  EXPECT_TRUE(set) << set.error().message();
  ASSERT_EQ(unlink(path(1, "phos-pages-7-0.img").c_str()), 0);
  EXPECT_EQ(image_error_of(read_image_set(fd(1))), ImageError::kIncomplete);
}

TEST_F(StoreTest, FilesWithoutPagesAreRemoved) {
  auto store = make_store(1);
  Saver a(*store, 7, 0, nullptr), b(*store, 8, 0, nullptr);
  a.round({0, 0});
  b.round({5});
  store->drop(b.where[0]);
  store->end_file(b.file);
  EXPECT_FALSE(std::filesystem::exists(path(1, "phos-pages-8-0.img.tmp")));
  ASSERT_TRUE(store->finish());
  EXPECT_TRUE(std::filesystem::is_empty(path(1)));
  EXPECT_FALSE(store->claim(a.file, a.key, {}, nullptr)) << "it is complete";
}

TEST_F(StoreTest, PagesThatCannotBeStoredAreClaimedAnew) {
  auto store = make_store(1);
  Saver a(*store, 7, 0, nullptr), b(*store, 8, 0, nullptr);
  AlignedPages data(1);
  const Bytes page = page_of(2);
  memcpy(data[0], page.data(), kPage);
  const SavedHash hash = toy_hash(kKey, data[0], kPage);
  auto mine = store->claim(a.file, a.key, hash, nullptr);
  auto other = store->claim(b.file, b.key, hash, nullptr);
  ASSERT_TRUE(mine && other);
  EXPECT_TRUE(mine->is_new);
  EXPECT_TRUE(other->is_under_way);
  const PageStore::NewPage wrong{mine->page, data[0] + 1};  // not aligned
  EXPECT_FALSE(store->store(a.file, {&wrong, 1}));
  EXPECT_FALSE(store->wait(other->page));
  auto again = store->claim(b.file, b.key, hash, nullptr);
  ASSERT_TRUE(again);
  EXPECT_TRUE(again->is_new);
  store->drop(mine->page);
  store->drop(other->page);
  const PageStore::NewPage right{again->page, data[0]};
  ASSERT_TRUE(store->store(b.file, {&right, 1}));
  EXPECT_EQ(store->place(again->page).file.pid, 8);
}

// What ten dumps take in which 2 % of the pages change each time, against one of them alone.
TEST_F(StoreTest, ChainTakesLittleMoreThanOneDump) {
  std::mt19937 random(2);
  std::vector<uint32_t> memory(500);
  for (uint32_t i = 0; i < memory.size(); i++) memory[i] = 2 + 2 * i;
  uintmax_t all = 0, first = 0;
  for (uint8_t level = 1; level <= 10; level++) {
    auto store = make_store(level);
    std::optional<PreviousPages> previous;
    if (level > 1) {
      auto opened = PreviousPages::open(fd(static_cast<uint8_t>(level - 1)), 7);
      ASSERT_TRUE(opened) << opened.error().message();
      previous = std::move(*opened);
    }
    Saver saver(*store, 7, 0, previous ? &*previous : nullptr);
    for (int i = 0; level > 1 && i < 10; i++) memory[random() % 500] = 2000 + 20u * level + 2u * i;
    saver.round(memory);
    ASSERT_TRUE(store->finish());
    const DumpId parent = level > 1 ? dump_id(static_cast<uint8_t>(level - 1)) : DumpId();
    const ProcessImage image = saver.image(dump_id(level), parent);
    ASSERT_TRUE(write_process_image(fd(level), image));
    if (level == 10) expect_holds(level, image, memory);
    for (const auto& entry : std::filesystem::directory_iterator(path(level))) {
      if (entry.is_regular_file()) all += entry.file_size();
    }
    if (level == 1) first = all;
  }
  const double ratio = static_cast<double>(all) / static_cast<double>(first);
  RecordProperty("ratio", std::to_string(ratio));
  EXPECT_LE(ratio, 1.25);
  EXPECT_GE(all - first, 9u * 9 * kPage) << "the pages that changed are to be there";
}

// The whole of it: processes on two GPUs that share pages, rounds in which pages change, chains in
// which pages move, stored in every way.
struct Way {
  const char* name;
  CompressionChoice compression;
  bool encrypted;
};

class StoreWays : public StoreTest, public testing::WithParamInterface<Way> {};

TEST_P(StoreWays, ChainsOfDumpsHoldWhatTheMemoryHeld) {
  std::shared_ptr<const ImageKey> key;
  if (GetParam().encrypted) {
    write_bytes(dir_.path("key"), Bytes(32, 0x5a));
    auto read = ImageKey::read(dir_.path("key"));
    ASSERT_TRUE(read) << read.error().message();
    key = std::make_shared<ImageKey>(std::move(*read));
    add_image_key(key);
  }
  std::mt19937 random(1);
  auto some_kind = [&] { return static_cast<uint32_t>(random() % 40); };
  std::vector<std::vector<uint32_t>> memory(3, std::vector<uint32_t>(60));
  std::map<int, ProcessImage> parents;
  uint64_t from_others = 0;
  for (uint8_t level = 1; level <= 3; level++) {
    auto store = make_store(level, {GetParam().compression, key});
    std::vector<std::optional<PreviousPages>> previous(3);
    std::vector<std::unique_ptr<Saver>> savers;
    for (int p = 0; p < 3; p++) {
      if (level > 1) {
        auto opened = PreviousPages::open(fd(static_cast<uint8_t>(level - 1)), 7 + p);
        ASSERT_TRUE(opened) << opened.error().message();
        previous[static_cast<size_t>(p)] = std::move(*opened);
      }
      auto& parent = previous[static_cast<size_t>(p)];
      savers.push_back(std::make_unique<Saver>(*store, 7 + p, p % 2, parent ? &*parent : nullptr));
    }
    for (int round = 0; round < 3; round++) {
      for (auto& m : memory) {
        for (auto& kind : m) kind = random() % 3 ? kind : some_kind();
      }
      std::vector<std::jthread> threads;
      for (size_t p = 0; p < 3; p++) threads.emplace_back([&, p] { savers[p]->round(memory[p]); });
    }
    ASSERT_TRUE(store->finish());
    for (size_t p = 0; p < 3; p++) {
      const DumpId parent = level > 1 ? dump_id(static_cast<uint8_t>(level - 1)) : DumpId();
      const ProcessImage image = savers[p]->image(dump_id(level), parent);
      auto written = write_process_image(fd(level), image);
      ASSERT_TRUE(written) << written.error().message();
      if (previous[p]) expect_same_on(previous[p]->chain(), fd(level), image);
      from_others += count_pages(image).other;
    }
    for (int p = 0; p < 3; p++) {
      auto image = read_process_image(fd(level), 7 + p);
      ASSERT_TRUE(image) << image.error().message();
      expect_holds(level, *image, memory[static_cast<size_t>(p)]);
    }
    EXPECT_TRUE(verify(level)->ok());
  }
  EXPECT_GT(from_others, 30u) << "the test is to show pages in others' files";
}

INSTANTIATE_TEST_SUITE_P(All, StoreWays,
                         testing::Values(Way{"plain", {}, false},
                                         Way{"zstd", {Compression::kZstd, 1}, false},
                                         Way{"lz4", {Compression::kLz4, 0}, false},
                                         Way{"encrypted", {Compression::kZstd, 1}, true}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace phos::image_test
