// SPDX-License-Identifier: GPL-2.0-only
// A whole image directory and its parent, with anything in their files: each is refused with a
// reason or holds together (test/image/examine.h), and never costs more memory than the files' size
// warrants. What is said of single fields is in image_refuse*_test.cpp.
#include <random>

#include "test/image/examine.h"
#include "test/image/wire.h"
#include "test/unit/heap_meter.h"
#include "test/unit/image_chain_fixture.h"
#include "test/unit/image_mutations.h"

namespace phos::image_test {
namespace {

struct File {
  uint8_t level;
  const char* name;
  uint32_t kind;  // 0: pages
};
constexpr File kFiles[] = {{1, "phos-7.img", 1},         {2, "phos-7.img", 1},
                           {2, "phos-files.img", 2},     {1, "phos-pages-7-0.img", 0},
                           {2, "phos-pages-7-0.img", 0}, {2, "phos-pages-7-1.img", 0}};

// A pre-dump of one GPU's memory, and a dump of two GPUs' that builds on it.
class HostileImages : public ChainTest {
 protected:
  HostileImages() {
    Memory memory{0, Bytes(4 * kPage - 100, 'a')};
    std::fill_n(memory.bytes.begin() + kPage, kPage, 0);
    first_ = dump(1, {{0x1000000, memory}});
    first_.stage = DumpStage::kPreDump;
    EXPECT_TRUE(write_process_image(fd(1), first_));
    memory.bytes[2 * kPage] = 'b';
    second_ = dump(2, {{0x1000000, memory}, {0x2000000, {1, Bytes(kPage, 'c')}}});
    EXPECT_TRUE(write_files_image(fd(2), {dump_id(2), {{7, "/dev/nvidiactl", 2}}}));
    EXPECT_EQ(refusal(), "");
  }

  // Why the reader does not take directory 2; empty: it does.
  std::string refusal() {
    const HeapMeter heap;
    const Examination examined = examine(fd(2));
    EXPECT_EQ(examined.wrong, "");
    // 32 times the payload for the decoder, half of that for what it makes of it; a block for a
    // header and one for pages to verify; lists of names, messages.
    EXPECT_LT(heap.peak(), 48 * metadata_bytes() + (size_t{5} << 20)) << examined.refusal;
    // A refusal came before anything was made of it.
    if (!examined.refusal.empty()) {
      EXPECT_LT(heap.peak(), 48 * metadata_bytes() + (512u << 10)) << examined.refusal;
    }
    return examined.refusal;
  }
  static size_t metadata_bytes() { return 4096; }

  Bytes original(const File& file) { return read_bytes(path(file.level, file.name)); }
  void put_file(const File& file, const Bytes& bytes) {
    write_bytes(path(file.level, file.name), bytes);
  }

  ProcessImage first_, second_;
};

TEST_F(HostileImages, MetadataCutOffAnywhere) {
  for (const File& file : kFiles) {
    if (file.kind == 0) continue;
    const Bytes whole = original(file);
    ASSERT_LT(whole.size(), metadata_bytes());
    for (size_t length = whole.size(); length-- > 0;) {
      ASSERT_EQ(truncate(path(file.level, file.name).c_str(), static_cast<off_t>(length)), 0);
      ASSERT_NE(refusal(), "") << file.name << ", " << length << " bytes";
    }
    put_file(file, whole);
  }
  EXPECT_EQ(refusal(), "");
}

TEST_F(HostileImages, PagesCutOffAnywhere) {
  const std::string name = path(2, "phos-pages-7-1.img");
  for (size_t length = 2 * kPage; length-- > 0;) {
    ASSERT_EQ(truncate(name.c_str(), static_cast<off_t>(length)), 0);
    auto file = PageFile::open(fd(2), 7, 1, dump_id(2), PageIo::kCached);
    ASSERT_EQ(image_error_of(file), ImageError::kTruncated) << length << " bytes";
  }
  EXPECT_NE(refusal(), "");
}

TEST_F(HostileImages, EveryBitOfTheMetadata) {
  for (const File& file : kFiles) {
    const Bytes whole = original(file);
    const size_t bytes = file.kind ? whole.size() : 56;
    UniqueFd at(open(path(file.level, file.name).c_str(), O_WRONLY | O_CLOEXEC));
    for (size_t bit = 0; bit < bytes * 8; bit++) {
      const auto offset = static_cast<off_t>(bit / 8);
      const uint8_t flipped = whole[bit / 8] ^ static_cast<uint8_t>(1 << (bit % 8));
      ASSERT_EQ(pwrite(at.get(), &flipped, 1, offset), 1);
      ASSERT_NE(refusal(), "") << file.name << ", bit " << bit;
      ASSERT_EQ(pwrite(at.get(), &whole[bit / 8], 1, offset), 1);
    }
  }
  EXPECT_EQ(refusal(), "");
}

// The rest of the header's block has no checksum; it must be zero.
TEST_F(HostileImages, EveryByteAfterThePagesHeader) {
  UniqueFd at(open(path(2, "phos-pages-7-1.img").c_str(), O_WRONLY | O_CLOEXEC));
  for (off_t offset = 56; offset < static_cast<off_t>(kPage); offset++) {
    const uint8_t set = 1 << (offset % 8), zero = 0;
    ASSERT_EQ(pwrite(at.get(), &set, 1, offset), 1);
    auto file = PageFile::open(fd(2), 7, 1, dump_id(2), PageIo::kCached);
    ASSERT_EQ(image_error_of(file), ImageError::kChecksum) << "byte " << offset;
    ASSERT_EQ(pwrite(at.get(), &zero, 1, offset), 1);
  }
  EXPECT_EQ(refusal(), "");
}

TEST_F(HostileImages, GarbageOfManyLengths) {
  std::mt19937 random(20261121);
  for (const File& file : kFiles) {
    const Bytes whole = original(file);
    for (size_t length = 0; length < 70'000; length += 1 + length / 16) {
      Bytes garbage(length);
      for (uint8_t& byte : garbage) byte = static_cast<uint8_t>(random());
      put_file(file, garbage);
      ASSERT_NE(refusal(), "") << file.name << ", " << length << " bytes";
      // And behind the right magic.
      std::copy_n(whole.begin(), std::min<size_t>(8, length), garbage.begin());
      put_file(file, garbage);
      ASSERT_NE(refusal(), "") << file.name << ", " << length << " bytes after the magic";
      if (file.kind == 0 || length > metadata_bytes()) continue;
      put_file(file, seal_payload(garbage, file.kind));
      ASSERT_NE(refusal(), "") << file.name << ", " << length << " bytes with checksums";
    }
    put_file(file, whole);
  }
}

// Every number of every message at its extremes, every length a lie or the truth of another
// content, every field there twice or not at all; with the checksums that belong to it.
TEST_F(HostileImages, EveryFieldAtItsExtremesBehindRightChecksums) {
  int refused = 0, accepted = 0;
  for (const File& file : kFiles) {
    if (file.kind == 0) continue;
    const Bytes whole = original(file);
    WireMessage message = parse_payload(Bytes(whole.begin() + 32, whole.end()), file.kind);
    auto seal_and_read = [&](uint64_t number) {
      put_file(file, seal_payload(serialise(message), file.kind));
      (refusal().empty() ? accepted : refused)++;
      ASSERT_FALSE(HasFailure()) << file.name << ", field " << number;
    };
    ASSERT_EQ(seal_payload(serialise(message), file.kind), whole);
    for_each_mutation(message, seal_and_read);
    put_file(file, whole);
  }
  EXPECT_GT(refused, 800);
  EXPECT_GT(accepted, 100);
}

TEST_F(HostileImages, HeadersAtTheirExtremesBehindRightChecksums) {
  for (const File& file : kFiles) {
    const Bytes whole = original(file);
    const size_t size = file.kind ? 28 : 52;
    for (size_t at = 8; at < size; at += 4) {
      if (!file.kind && at >= 24 && at < 40) continue;  // the dump id
      for (uint64_t value : kExtremes) {
        for (int bytes : {4, 8}) {
          Bytes header(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size)), field;
          put(field, value, bytes);
          field.resize(std::min(field.size(), size - at));
          std::copy(field.begin(), field.end(), header.begin() + static_cast<ptrdiff_t>(at));
          put(header, bitwise_crc32c(header), 4);
          Bytes changed = whole;
          std::copy(header.begin(), header.end(), changed.begin());
          if (changed == whole) continue;
          put_file(file, changed);
          ASSERT_NE(refusal(), "") << file.name << ", at " << at << ": " << value;
        }
      }
    }
    put_file(file, whole);
  }
}

// Slots may be shared, and the reader then gives both pages the same bytes; what is not in the file
// is not there.
TEST_F(HostileImages, ExtentsThatOverlapOrLeadOutOfTheFile) {
  auto with_slot = [&](uint32_t slot) {
    ProcessImage image = second_;
    for (PageExtent& e : image.allocations[0].extents) {
      if (e.source == PageSource::kHere) e.slot = slot;
    }
    EXPECT_TRUE(write_process_image(fd(2), image));
    return refusal();
  };
  EXPECT_EQ(with_slot(0), "");
  for (uint32_t slot : {1u, 2u, 0x7fffffffu, 0x80000000u, 0xffffffffu}) {
    EXPECT_NE(with_slot(slot).find("refers to slot " + std::to_string(slot)), std::string::npos)
        << slot;
  }
  // In the parent: pages 0, 2 and 3 lie in slots 0 to 2. Now all in slot 0, then beyond the end.
  ProcessImage image = first_;
  image.allocations[0].extents = {{0, 1, PageSource::kHere, 0},
                                  {1, 1, PageSource::kZero},
                                  {2, 1, PageSource::kHere, 0},
                                  {3, 1, PageSource::kHere, 0}};
  ASSERT_TRUE(write_process_image(fd(1), image));
  ASSERT_TRUE(write_process_image(fd(2), second_));
  EXPECT_EQ(refusal(), "");
  auto chain = open_chain(2);
  ASSERT_TRUE(chain);
  AlignedPages pages(2);
  ASSERT_TRUE(chain->read_page(0, 0, pages[0]));
  ASSERT_TRUE(chain->read_page(0, 3, pages[1]));
  EXPECT_EQ(memcmp(pages[0], pages[1], kPage), 0);
  image.allocations[0].extents[3].slot = 3;
  ASSERT_TRUE(write_process_image(fd(1), image));
  EXPECT_NE(refusal().find("refers to slot 3 of phos-pages-7-0.img, which has 3"),
            std::string::npos);
}

// Extents that no page is behind are refused before memory is taken for them: as the struct has
// them they are eight times as large as on the wire.
TEST_F(HostileImages, ExtentsWithoutPages) {
  constexpr size_t kExtents = 300'000;
  WireMessage message;
  const Bytes whole = original(kFiles[1]);
  message = parse_payload(Bytes(whole.begin() + 32, whole.end()), 1);
  for_each_field(message, [](WireField& field) {
    if (field.kind != WireField::Kind::kPacked || field.number == 10) return;
    field.children.assign(kExtents, WireField{});
    for (WireField& one : field.children) one.value = field.number == 8 ? 1 : 2;
  });
  const Bytes payload = serialise(message);
  put_file(kFiles[1], seal_payload(payload, 1));
  const HeapMeter heap;
  auto image = read_process_image(fd(2), 7);
  ASSERT_EQ(image_error_of(image), ImageError::kBadField);
  // The payload and the decoder's arrays of 4 bytes each.
  EXPECT_LT(heap.peak(), payload.size() * 6);
}

// Addresses that a hash table would put into one bucket cost it minutes.
TEST_F(HostileImages, AddressesThatAHashTableCannotTellApart) {
  constexpr uint64_t kBuckets = 172933;  // of libstdc++'s, for so many
  ProcessImage image = small_process(8, dump_id(2));
  image.gpus = two_gpus();
  image.hash_key = kKey;
  for (uint64_t i = 1; i < kBuckets; i++) {
    AllocationInfo a{i * kBuckets, 1, 0, MemoryKind::kDevice, MemoryPath::kReleased};
    a.hashes.resize(1);
    a.extents = {{0, 1, PageSource::kZero}};
    image.allocations.push_back(std::move(a));
  }
  ASSERT_TRUE(write_process_image(fd(2), image));
  const clock_t start = clock();
  auto previous = PreviousPages::open(fd(2), 8);
  ASSERT_TRUE(previous && *previous);
  for (const AllocationInfo& a : image.allocations) {
    ASSERT_TRUE((*previous)->find(image.gpus[0].uuid, a.address, 1));
  }
  EXPECT_LT((clock() - start) / CLOCKS_PER_SEC, 10);
}

// Text of which a reader that stops at the first NUL would see only the start.
TEST_F(HostileImages, TextIsUtf8WithoutNul) {
  const Bytes whole = original(kFiles[1]);
  for (const Bytes& bytes : {Bytes{'a', 0, 'b'}, Bytes{0}, Bytes{'a', 0}, Bytes{0xff}, Bytes{0xc3},
                             Bytes{0xed, 0xa0, 0x80}}) {
    for (uint64_t number : {5u, 8u, 2u}) {
      WireMessage message = parse_payload(Bytes(whole.begin() + 32, whole.end()), 1);
      WireMessage* in = &message;
      if (number == 2) {
        in = &std::find_if(message.begin(), message.end(), [](auto& f) {
                return f.number == 9;
              })->children;
      }
      for (WireField& field : *in) {
        if (field.number == number) field.data = bytes;
      }
      put_file(kFiles[1], seal_payload(serialise(message), 1));
      EXPECT_NE(refusal().find("is not text"), std::string::npos) << number;
    }
  }
}

}  // namespace
}  // namespace phos::image_test
