// SPDX-License-Identifier: GPL-2.0-only
// Format version 2 against files that phos's code did not make: test/golden/2.
#include "test/unit/image_golden2.h"

#include "gpu-tracker/image/chain.h"

namespace phos::image_test {
namespace {

constexpr DumpId kParent = {0xf0, 0xf1, 0xf2, 0xf3, 0xf4, 0xf5, 0xf6, 0xf7,
                            0xf8, 0xf9, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff};

// A page of one text of 16 bytes.
Bytes page_of(const std::string& text) {
  Bytes page;
  while (page.size() < kImagePageSize) page.insert(page.end(), text.begin(), text.end());
  return page;
}

Bytes counting_page() {
  Bytes page(kImagePageSize);
  for (size_t i = 0; i < page.size(); i++) page[i] = static_cast<uint8_t>(i * 7);
  return page;
}

SavedHash hash(const char* text) {
  SavedHash bytes;
  memcpy(bytes.data(), text, bytes.size());
  return bytes;
}

class ImageGolden2 : public Golden2 {
 protected:
  static ProcessImage expected_parent() {
    ProcessImage p;
    p.dump_id = kParent;
    p.pid = 4242;
    p.comm = "python3";
    p.driver_release = "580.159.04";
    p.driver_api = 13000;
    p.created_us = 1767225540000000;
    p.phos_version = "0.2.0";
    p.gpus = {golden_process().gpus[1]};
    p.stage = DumpStage::kPreDump;
    p.hash_key = golden_process().hash_key;
    p.rounds = {{5, 5, 262144, 900}};
    p.layout.packed = true;
    AllocationInfo a{0x7f3000000000, 326680, 0, MemoryKind::kDevice, MemoryPath::kReleased};
    a.hashes = {hash("page 0, unit 0.."), hash("page 1, dropped."), hash("zero page 2 ...."),
                hash("page 3, unit 1.."), hash("page 4, unit 17.")};
    a.extents = {{0, 1, PageSource::kHere, 0},
                 {1, 1, PageSource::kDropped},
                 {2, 1, PageSource::kZero},
                 {3, 2, PageSource::kHere, 1}};
    a.packed = {{11}, {65536}, {11}};
    p.allocations = {a};
    return p;
  }
};

TEST_F(ImageGolden2, ReaderAndWriterOfTheImage) {
  auto read = read_process_image(parent_.get(), 4242);
  ASSERT_TRUE(read) << read.error().message();
  const ProcessImage expected = expected_parent();
  expect_equal(*read, expected);
  EXPECT_EQ(read->layout, expected.layout);
  EXPECT_EQ(read->allocations[0].packed, expected.allocations[0].packed);
  const Bytes golden = read_bytes(dir_.path("parent/phos-4242.img"));
  ASSERT_TRUE(write_process_image(parent_.get(), expected));
  EXPECT_EQ(read_bytes(dir_.path("parent/phos-4242.img")), golden);
}

TEST_F(ImageGolden2, ReaderOfTheEncryptedImage) {
  auto read = read_process_image(dump_.get(), 4242);
  ASSERT_TRUE(read) << read.error().message();
  EXPECT_EQ(read->dump_id, kDump);
  EXPECT_EQ(read->parent_dump_id, kParent);
  EXPECT_NE(read->key_id, KeyId());
  EXPECT_EQ(read->layout, (PagesLayout{true, true}));
  EXPECT_EQ(read->other_files, (std::vector<PagesFileRef>{{kParent, 4242, 0, {true, false}},
                                                          {kDump, 77, 1, {true, true}}}));
  const AllocationInfo& a = read->allocations.at(0);
  EXPECT_EQ(a.extents, (std::vector<PageExtent>{{0, 1, PageSource::kParent},
                                                {1, 1, PageSource::kHere, 2},
                                                {2, 1, PageSource::kOther, 17, 0},
                                                {3, 1, PageSource::kParent},
                                                {4, 1, PageSource::kOther, 0, 1}}));
  ASSERT_EQ(a.packed.size(), 3u);
  EXPECT_EQ(a.packed[0].seal.nonce[0], 1);
  EXPECT_EQ(a.packed[1].seal, Seal());
  EXPECT_EQ(a.packed[2].seal.nonce[11], 2);
}

TEST_F(ImageGolden2, PagesOfTheChain) {
  for (PageIo io : {PageIo::kDirect, PageIo::kCached}) {
    auto chain = PageChain::open(dump_.get(), 4242, io);
    ASSERT_TRUE(chain) << chain.error().message();
    const Bytes expected[] = {page_of("a"), page_of("its own page 1. "), page_of("e"),
                              counting_page(), page_of("of process 77.. ")};
    AlignedPages page(1);
    for (uint64_t i = 0; i < 5; i++) {
      auto ok = chain->read_page(0, i, page[0]);
      ASSERT_TRUE(ok) << ok.error().message();
      EXPECT_EQ(memcmp(page[0], expected[i].data(), kImagePageSize), 0) << i;
    }
  }
}

TEST_F(ImageGolden2, APageThatWasDropped) {
  auto chain = PageChain::open(parent_.get(), 4242, PageIo::kCached);
  ASSERT_TRUE(chain) << chain.error().message();
  AlignedPages page(1);
  EXPECT_TRUE(chain->read_page(0, 0, page[0]));
  auto dropped = chain->read_page(0, 1, page[0]);
  ASSERT_FALSE(dropped);
  EXPECT_NE(dropped.error().message().find("`phos gc` has dropped it"), std::string::npos);
  EXPECT_EQ(count_pages(chain->image()), (PageCounts{.here = 3, .zero = 1, .dropped = 1}));
}

}  // namespace
}  // namespace phos::image_test
