// SPDX-License-Identifier: GPL-2.0-only
// What an image may not say of saved pages and of its chain.
#include <functional>
#include <random>

#include "gpu-tracker/image/codec.h"
#include "gpu-tracker/image/container.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

// An image with 6 saved pages, as the wire has it.
struct Parts {
  Bytes hashes = Bytes(6 * 16, 9);
  Bytes extent_pages = {1, 2, 3}, extent_source = {2, 1, 0}, extent_slot = {5};
  Bytes parent = Bytes(16, 3), key = {'k'};
  uint64_t page_size = 65536, stage = 0, path = 1;
  int64_t gpu = 0;
  bool has_parent = true, has_page_size = true, has_key = true, has_stage = true;
  Bytes rounds = {8, 1, 16, 2, 24, 3, 32, 4};

  Bytes payload() const {
    Message g, a, p;
    g.data(1, Bytes(16, 1)).text(2, "GPU").number(3, 1u << 30);
    a.number(1, 0x10000).number(2, 5 * 65536 + 1).number(3, static_cast<uint64_t>(gpu));
    a.number(4, 1).number(5, path).data(7, hashes).data(8, extent_pages);
    a.data(9, extent_source).data(10, extent_slot);
    p.data(1, Bytes(kDump.begin(), kDump.end())).number(2, 4242).text(3, "app").number(4, 0);
    p.text(5, "580").number(6, 13000).number(7, 1).text(8, "1").data(9, g.bytes);
    p.data(10, a.bytes);
    if (has_stage) p.number(13, stage);
    if (has_parent) p.data(14, parent);
    if (has_page_size) p.number(15, page_size);
    if (has_key) p.data(16, key);
    p.data(17, rounds);
    return p.bytes;
  }
};

ImageError code(const std::function<void(Parts&)>& edit) {
  Parts parts;
  edit(parts);
  return image_error_of(decode_process(parts.payload()));
}

TEST(ImageRefusePages, AbsurdFieldsOnTheWire) {
  auto whole = decode_process(Parts().payload());
  ASSERT_TRUE(whole) << whole.error().message();
  EXPECT_EQ(whole->allocations[0].extents, (std::vector<PageExtent>{{0, 1, PageSource::kZero},
                                                                    {1, 2, PageSource::kParent},
                                                                    {3, 3, PageSource::kHere, 5}}));
  const ImageError bad = ImageError::kBadField;
  // Hashes: a byte too few, a page too few, a page too many, none.
  EXPECT_EQ(code([](Parts& p) { p.hashes.pop_back(); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.hashes.resize(5 * 16); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.hashes.resize(7 * 16); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.hashes.clear(); }), bad);
  // Extents: a gap at the end, a page too many, an empty one, a sum that wraps, none.
  EXPECT_EQ(code([](Parts& p) { p.extent_pages[2] = 2; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_pages[2] = 4; }), bad);
  EXPECT_EQ(code([](Parts& p) {
              p.extent_pages = {1, 2, 0, 3}, p.extent_source = {2, 1, 2, 0};
            }),
            bad);
  EXPECT_EQ(code([](Parts& p) {
              p.extent_pages = {1, 0xff, 0xff, 0xff, 0xff, 0x0f, 6};  // 1, 2^32 - 1, 6
            }),
            bad);
  EXPECT_EQ(code([](Parts& p) {
              p.extent_pages.clear(), p.extent_source.clear(), p.extent_slot.clear();
            }),
            bad);
  // Arrays that do not belong together.
  EXPECT_EQ(code([](Parts& p) { p.extent_source.pop_back(); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_source.push_back(0); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_slot.clear(); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_slot.push_back(0); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_source[0] = 3; }), bad);
  // Slots 2^32 - 2 to 2^32.
  EXPECT_EQ(code([](Parts& p) { p.extent_slot = {0xfe, 0xff, 0xff, 0xff, 0x0f}; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.extent_slot = {0xfd, 0xff, 0xff, 0xff, 0x0f}; }), ImageError{});
  // Who saved what.
  EXPECT_EQ(code([](Parts& p) { p.path = 0; }), ImageError{});
  EXPECT_EQ(code([](Parts& p) { p.path = 2; }), ImageError{});
  EXPECT_EQ(code([](Parts& p) { p.gpu = -1; }), bad);
  EXPECT_EQ(code([](Parts& p) {
              p.hashes.clear(), p.extent_pages.clear(), p.extent_source.clear();
              p.extent_slot.clear();
            }),
            bad)
      << "released, and not saved";
  // The chain.
  EXPECT_EQ(code([](Parts& p) { p.stage = 1; }), ImageError{});
  EXPECT_EQ(code([](Parts& p) { p.stage = 2; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.has_stage = false; }), ImageError::kMalformed);
  EXPECT_EQ(code([](Parts& p) { p.has_parent = false; }), bad);  // but pages are in it
  EXPECT_EQ(code([](Parts& p) { p.parent.pop_back(); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.parent.assign(16, 0); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.parent.assign(kDump.begin(), kDump.end()); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.page_size = 4096; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.has_page_size = false; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.has_key = false; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.has_key = p.has_page_size = false; }), bad);
  EXPECT_EQ(code([](Parts& p) { p.key.clear(); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.key.resize(65536, 1); }), ImageError{});
  EXPECT_EQ(code([](Parts& p) { p.key.resize(65537, 1); }), bad);
  EXPECT_EQ(code([](Parts& p) { p.rounds.resize(6); }), ImageError::kMalformed);
}

TEST(ImageRefusePages, WriterKeepsTheSameRules) {
  const ProcessImage whole = golden_process();
  ASSERT_TRUE(encode(whole));
  auto refused = [&](const std::function<void(ProcessImage&, AllocationInfo&)>& edit) {
    ProcessImage image = whole;
    edit(image, image.allocations[3]);
    return image_error_of(encode(image));
  };
  using P = ProcessImage;
  using A = AllocationInfo;
  const ImageError bad = ImageError::kBadField;
  EXPECT_EQ(refused([](P&, A& a) { a.hashes.pop_back(); }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.size += kImagePageSize; }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.extents.pop_back(); }), bad);
  EXPECT_EQ(refused([](P&, A& a) { std::swap(a.extents[0], a.extents[1]); }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.extents[1].first_page++; }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.extents[1].pages = 0; }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.extents[1].slot = 1; }), bad);  // it is in the parent
  EXPECT_EQ(refused([](P&, A& a) { a.extents[1].source = PageSource(3); }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.gpu = -1; }), bad);
  EXPECT_EQ(refused([](P& p, A&) { p.hash_key.clear(); }), bad);
  EXPECT_EQ(refused([](P& p, A&) { p.parent_dump_id = {}; }), bad);
  EXPECT_EQ(refused([](P& p, A&) { p.parent_dump_id = p.dump_id; }), bad);
  EXPECT_EQ(refused([](P& p, A&) { p.stage = DumpStage(2); }), bad);
  EXPECT_EQ(refused([](P&, A& a) { a.address = 1, a.size = 1ull << 48; }), bad);
}

// What the reader takes obeys the rules, so that it can be written, and is what was written.
TEST(ImageRefusePages, SealedGarbage) {
  std::mt19937 random(20260505);
  const Bytes good = Parts().payload();
  int accepted = 0;
  for (int i = 0; i < 100'000; i++) {
    Bytes payload = good;
    for (unsigned edits = 1 + random() % 3; edits > 0; edits--) {
      payload[random() % payload.size()] =
          static_cast<uint8_t>(random() % 8 ? random() % 7 : random());
    }
    auto result = decode_process(payload);
    if (!result) {
      ASSERT_NE(image_error_of(result), ImageError{}) << result.error().message();
      continue;
    }
    accepted++;
    auto again = encode(*result);
    ASSERT_TRUE(again) << again.error().message();
    auto back = decode_process(*again);
    ASSERT_TRUE(back) << back.error().message();
    expect_equal(*back, *result);
  }
  EXPECT_GT(accepted, 1000);
}

// Packed arrays cost four times their size, whatever a hostile payload holds of them.
TEST(ImageRefusePages, MillionsOfExtentsAreReadInBoundedMemory) {
  constexpr uint32_t kPages = 4'500'000;
  ProcessImage image = small_process(1);
  image.gpus.resize(1);
  image.hash_key = {1};
  image.parent_dump_id = kOtherDump;
  AllocationInfo a{1 << 16, uint64_t{kPages} << 16, 0, MemoryKind::kDevice, MemoryPath::kReleased};
  a.hashes.resize(kPages);
  for (uint32_t i = 0; i < kPages; i++) {
    memcpy(a.hashes[i].data(), &i, sizeof i);
    a.extents.push_back({i, 1, i % 2 ? PageSource::kParent : PageSource::kHere, i % 2 ? 0 : i / 2});
  }
  image.allocations = {std::move(a)};
  auto payload = encode(image);
  ASSERT_TRUE(payload) << payload.error().message();
  // 16 bytes of hash, one of length, one of source, at most 4 of slot for every other page.
  EXPECT_LT(payload->size(), size_t{kPages} * 20 + 200);
  EXPECT_GT(payload->size(), 64u << 20);  // where the reader becomes stricter
  auto read = decode_process(*payload);
  ASSERT_TRUE(read) << read.error().message();
  expect_equal(*read, image);
  // A terabyte in the worst case, of which this is more than a quarter.
  EXPECT_LT(payload->size() * 4, kMaxPayload);
}

}  // namespace
}  // namespace phos::image_test
