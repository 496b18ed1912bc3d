// SPDX-License-Identifier: GPL-2.0-only
// What image_hostile_test.cpp does to plain images, done to packed and encrypted ones: behind the
// checksums, and behind the encryption.
#include <random>
#include <utility>

#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/crypto.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/image/sealed.h"
#include "test/image/examine.h"
#include "test/image/wire.h"
#include "test/unit/heap_meter.h"
#include "test/unit/image_golden2.h"
#include "test/unit/image_mutations.h"

namespace phos::image_test {
namespace {

constexpr size_t kPageBlock = 65536, kUnit = 4096;

struct File {
  const char* name;
  uint32_t kind;   // of the container; 0: pages
  bool in_parent;  // it is examined there, too
  uint32_t pid, gpu;
};
constexpr File kParentImage{"parent/phos-4242.img", 1, true, 4242, 0};
constexpr File kParentPages{"parent/phos-pages-4242-0.img", 0, true, 4242, 0};
constexpr File kImage{"dump/phos-4242.img", 3, false, 4242, 0};
constexpr File kPages{"dump/phos-pages-4242-1.img", 0, false, 4242, 1};
constexpr File kOtherPages{"dump/phos-pages-77-1.img", 0, false, 77, 1};
constexpr File kFiles[] = {kParentImage, kParentPages, kImage, kPages, kOtherPages};

class HostilePackedImages : public Golden2 {
 protected:
  void SetUp() override {
    Golden2::SetUp();
    for (const File& file : kFiles) originals_.push_back(read_bytes(dir_.path(file.name)));
    ASSERT_EQ(examine(parent_.get()).refusal, "");
    ASSERT_EQ(examine(dump_.get()).refusal, "");
  }

  // As in image_hostile_test.cpp, where the numbers are explained.
  static std::string refusal_of(int dir_fd) {
    constexpr size_t kMetadata = 4096;
    const HeapMeter heap;
    const Examination examined = examine(dir_fd);
    EXPECT_EQ(examined.wrong, "");
    EXPECT_LT(heap.peak(), 48 * kMetadata + (size_t{5} << 20)) << examined.refusal;
    if (!examined.refusal.empty()) {
      EXPECT_LT(heap.peak(), 48 * kMetadata + (512u << 10)) << examined.refusal;
    }
    return examined.refusal;
  }
  // Why the dump is not taken, and its parent if the file is in there; empty: it is.
  std::string refusal(const File& file) {
    std::string above = file.in_parent ? refusal_of(parent_.get()) : "";
    std::string said = refusal_of(dump_.get());
    // What is wrong with a directory is wrong with those that build on it.
    EXPECT_TRUE(above.empty() || !said.empty()) << above;
    return said;
  }

  const Bytes& original(const File& file) const {
    return originals_[static_cast<size_t>(
        std::find_if(std::begin(kFiles), std::end(kFiles),
                     [&](const File& f) { return f.name == file.name; }) -
        std::begin(kFiles))];
  }
  void put_file(const File& file, const Bytes& bytes) { write_bytes(dir_.path(file.name), bytes); }

  // What is encrypted in the dump's image, without phos's reader.
  Bytes opened() const {
    const Bytes& whole = original(kImage);
    const Bytes sealed(whole.begin() + 32, whole.end());
    SealedHeader header;
    memcpy(&header, sealed.data(), sizeof header);
    Bytes payload(sealed.size() - sizeof header);
    auto fits = gcm_decrypt(key()->derive(kDump)->image, header.nonce, header.tag,
                            &sealed[sizeof header], payload.size(), payload.data());
    EXPECT_TRUE(fits && *fits);
    return payload;
  }
  // A file of the kind, with checksums that are right, and a tag.
  static Bytes in_container(const File& file, const Bytes& payload) {
    if (file.kind != 3) return seal_payload(payload, file.kind, 2);
    SealedHeader header{kDump, key()->id(), {}, {}};
    header.nonce.fill(9);
    Bytes sealed(sizeof header + payload.size());
    auto done = gcm_encrypt(key()->derive(kDump)->image, header.nonce, payload.data(),
                            payload.size(), &sealed[sizeof header], &header.tag);
    EXPECT_TRUE(done);
    memcpy(sealed.data(), &header, sizeof header);
    return seal_payload(sealed, 3, 2);
  }
  Bytes payload_of(const File& file) const {
    if (file.kind == 3) return opened();
    return Bytes(original(file).begin() + 32, original(file).end());
  }
  // The image once more, with another value in place of the `index`th number of a field of its
  // only allocation.
  void put_number(const File& file, uint64_t number, size_t index, uint64_t value) {
    WireMessage message = parse_payload(payload_of(file), 1);
    for (WireField& field : message) {
      if (field.number != 10) continue;
      for (WireField& of_it : field.children) {
        if (of_it.number == number) of_it.children.at(index).value = value;
      }
    }
    put_file(file, in_container(file, serialise(message)));
  }

  // Reads a page of the dump: an error that says why not, or whatever is in it.
  Result<void> read_page(uint64_t page) {
    auto chain = PageChain::open(dump_.get(), 4242, PageIo::kCached);
    if (!chain) return chain.error();
    AlignedPages data(1);
    const HeapMeter heap;
    auto read = chain->read_page(0, page, data[0]);
    // A buffer for 16 pages, what zstd needs, a message.
    EXPECT_LT(heap.peak(), size_t{3} << 19);
    return read;
  }

  std::vector<Bytes> originals_;
};

TEST_F(HostilePackedImages, MetadataCutOffAnywhere) {
  for (const File& file : {kParentImage, kImage}) {
    const Bytes& whole = original(file);
    for (size_t length = whole.size(); length-- > 0;) {
      ASSERT_EQ(truncate(dir_.path(file.name).c_str(), static_cast<off_t>(length)), 0);
      ASSERT_NE(refusal(file), "") << file.name << ", " << length << " bytes";
    }
    // The same, as if that were all of it.
    for (size_t length = whole.size() - 32; length-- > 0;) {
      const Bytes payload(whole.begin() + 32, whole.begin() + 32 + static_cast<ptrdiff_t>(length));
      put_file(file, seal_payload(payload, file.kind, 2));
      ASSERT_NE(refusal(file), "") << file.name << ", " << length << " bytes of payload";
    }
    put_file(file, whole);
  }
  // And as if that had been encrypted.
  const Bytes payload = opened();
  for (size_t length = payload.size(); length-- > 0;) {
    const auto end = payload.begin() + static_cast<ptrdiff_t>(length);
    put_file(kImage, in_container(kImage, Bytes(payload.begin(), end)));
    ASSERT_NE(refusal(kImage), "") << length << " bytes";
  }
  put_file(kImage, in_container(kImage, payload));
  EXPECT_EQ(refusal(kImage), "");
}

TEST_F(HostilePackedImages, PagesCutOffAnywhere) {
  const std::string name = dir_.path(kOtherPages.name);
  for (size_t length = original(kOtherPages).size(); length-- > 0;) {
    ASSERT_EQ(truncate(name.c_str(), static_cast<off_t>(length)), 0);
    auto file = PageFile::open(dump_.get(), 77, 1, kDump, PageIo::kCached);
    ASSERT_EQ(image_error_of(file), ImageError::kTruncated) << length << " bytes";
  }
  EXPECT_NE(refusal(kOtherPages), "");
  put_file(kOtherPages, original(kOtherPages));
  for (const File& file : {kParentPages, kPages}) {
    const size_t whole = original(file).size();
    for (size_t unit = kPageBlock; unit < whole; unit += kUnit) {
      for (size_t length : {unit, unit + 1, unit + kUnit - 1}) {
        ASSERT_EQ(truncate(dir_.path(file.name).c_str(), static_cast<off_t>(length)), 0);
        ASSERT_NE(refusal(file).find("is truncated"), std::string::npos) << file.name << length;
      }
    }
    put_file(file, original(file));
  }
  EXPECT_EQ(refusal(kPages), "");
}

// A file with fewer units than its images refer to, which is all right by itself.
TEST_F(HostilePackedImages, UnitsThatAreNotThere) {
  for (const File& file : {kParentPages, kPages, kOtherPages}) {
    const Bytes& whole = original(file);
    for (size_t units = (whole.size() - kPageBlock) / kUnit; units-- > 0;) {
      Bytes header(whole.begin(), whole.begin() + 52);
      for (int i = 0; i < 8; i++) header[16 + i] = static_cast<uint8_t>(units >> (8 * i));
      Bytes shorter = seal_page_header(header);
      const auto pages = whole.begin() + kPageBlock;
      shorter.insert(shorter.end(), pages, pages + static_cast<ptrdiff_t>(units * kUnit));
      put_file(file, shorter);
      const std::string has = ", which has " + std::to_string(units) + " slots";
      ASSERT_NE(refusal(file).find(has), std::string::npos) << file.name;
    }
    put_file(file, whole);
  }
}

TEST_F(HostilePackedImages, EveryBitOfTheMetadata) {
  for (const File& file : kFiles) {
    const Bytes& whole = original(file);
    const size_t bytes = file.kind ? whole.size() : 56;
    UniqueFd at(open(dir_.path(file.name).c_str(), O_WRONLY | O_CLOEXEC));
    for (size_t bit = 0; bit < bytes * 8; bit++) {
      const auto offset = static_cast<off_t>(bit / 8);
      const uint8_t flipped = whole[bit / 8] ^ static_cast<uint8_t>(1 << (bit % 8));
      ASSERT_EQ(pwrite(at.get(), &flipped, 1, offset), 1);
      ASSERT_NE(refusal(file), "") << file.name << ", bit " << bit;
      ASSERT_EQ(pwrite(at.get(), &whole[bit / 8], 1, offset), 1);
    }
  }
  EXPECT_EQ(refusal(kImage), "");
}

// Whoever has not the key can make the checksums right, and nothing else.
TEST_F(HostilePackedImages, EveryBitOfWhatIsEncryptedBehindRightChecksums) {
  const Bytes& whole = original(kImage);
  Bytes sealed(whole.begin() + 32, whole.end());
  for (size_t bit = 0; bit < sealed.size() * 8; bit++) {
    const auto flip = static_cast<uint8_t>(1 << (bit % 8));
    sealed[bit / 8] ^= flip;
    put_file(kImage, seal_payload(sealed, 3, 2));
    auto image = read_process_image(dump_.get(), 4242);
    const bool of_key = bit / 8 >= 16 && bit / 8 < 24;
    ASSERT_EQ(image_error_of(image), of_key ? ImageError::kNoKey : ImageError::kChecksum) << bit;
    sealed[bit / 8] ^= flip;
  }
}

TEST_F(HostilePackedImages, GarbageOfManyLengths) {
  std::mt19937 random(20261123);
  for (const File& file : kFiles) {
    const Bytes& whole = original(file);
    for (size_t length = 0; length < 70'000; length += 1 + length / 16) {
      Bytes garbage(length);
      for (uint8_t& byte : garbage) byte = static_cast<uint8_t>(random());
      std::copy_n(whole.begin(), std::min<size_t>(8, length), garbage.begin());
      put_file(file, garbage);
      ASSERT_NE(refusal(file), "") << file.name << ", " << length << " bytes after the magic";
      if (file.kind == 0 || length > 4096) continue;
      put_file(file, seal_payload(garbage, file.kind, 2));
      ASSERT_NE(refusal(file), "") << file.name << ", " << length << " bytes with checksums";
      put_file(file, in_container(file, garbage));
      ASSERT_NE(refusal(file), "") << file.name << ", " << length << " bytes, encrypted";
    }
    put_file(file, whole);
  }
}

TEST_F(HostilePackedImages, EveryFieldAtItsExtremesBehindRightChecksums) {
  int refused = 0, accepted = 0;
  for (const File& file : {kParentImage, kImage}) {
    WireMessage message = parse_payload(payload_of(file), 1);
    ASSERT_EQ(serialise(message), payload_of(file));
    auto write_and_read = [&](uint64_t number) {
      put_file(file, in_container(file, serialise(message)));
      (refusal(file).empty() ? accepted : refused)++;
      ASSERT_FALSE(HasFailure()) << file.name << ", field " << number;
    };
    for_each_mutation(message, write_and_read);
    put_file(file, original(file));
  }
  EXPECT_GT(refused, 800);
  EXPECT_GT(accepted, 100);
}

TEST_F(HostilePackedImages, HeadersAtTheirExtremesBehindRightChecksums) {
  for (const File& file : {kParentPages, kPages, kOtherPages}) {
    const Bytes& whole = original(file);
    for (size_t at = 8; at < 52; at++) {
      if (at >= 24 && at < 40) continue;  // the dump id
      for (uint64_t value : kExtremes) {
        for (int bytes : {1, 4, 8}) {
          Bytes header(whole.begin(), whole.begin() + 52), field;
          put(field, value, bytes);
          field.resize(std::min(field.size(), header.size() - at));
          std::copy(field.begin(), field.end(), header.begin() + static_cast<ptrdiff_t>(at));
          Bytes changed = seal_page_header(header);
          changed.insert(changed.end(), whole.begin() + kPageBlock, whole.end());
          if (changed == whole) continue;
          put_file(file, changed);
          // The way in which pages are compressed is said nowhere else; they show it when read.
          const bool other_compression =
              std::equal(header.begin(), header.begin() + 49, whole.begin()) && header[49] < 3 &&
              header[50] == whole[50] && header[51] == 0;
          ASSERT_EQ(refusal(file).empty(), other_compression)
              << file.name << ", at " << at << ": " << value;
        }
      }
    }
    put_file(file, whole);
  }
}

// Lists that no page is behind are refused before memory is taken for what they are made into.
TEST_F(HostilePackedImages, PackedPagesWithoutPages) {
  constexpr size_t kMany = 300'000;
  for (const File& file : {kParentImage, kImage}) {
    for (uint64_t number : {10u, 11u, 12u, 13u}) {
      WireMessage message = parse_payload(payload_of(file), 1);
      bool found = false;
      for_each_field(message, [&](WireField& field) {
        if (field.kind == WireField::Kind::kPacked && field.number == number) {
          field.children.assign(kMany, WireField{});
          for (WireField& one : field.children) one.value = 1;
          found = true;
        } else if (number == 13 && field.number == 13 && field.data.size() % 28 == 0 &&
                   !field.data.empty()) {
          field.data.resize(28 * kMany);
          found = true;
        }
      });
      if (!found) continue;  // an image without seals, or without pages in other files
      const Bytes payload = serialise(message);
      put_file(file, in_container(file, payload));
      const HeapMeter heap;
      auto image = read_process_image(file.in_parent ? parent_.get() : dump_.get(), 4242);
      ASSERT_EQ(image_error_of(image), ImageError::kBadField) << file.name << ", " << number;
      EXPECT_LT(heap.peak(), payload.size() * 6 + (64u << 10)) << file.name << ", " << number;
    }
  }
}

// Pages that lie upon each other are read as what is there; what is not in the file is not there.
TEST_F(HostilePackedImages, PagesThatOverlapOrLeadOutOfTheFile) {
  constexpr uint64_t kSlot = 10, kStored = 12;
  // The parent's pages 3 and 4 lie in units 1 to 16 and 17, the last one; page 0 in unit 0.
  put_number(kParentImage, kSlot, 1, 0);
  EXPECT_EQ(refusal(kParentImage), "");
  for (uint64_t unit : {2u, 0x7fffffffu, 0xffffffeeu}) {
    put_number(kParentImage, kSlot, 1, unit);
    const std::string last = "refers to slot " + std::to_string(unit + 16);
    EXPECT_NE(refusal(kParentImage).find(last), std::string::npos) << unit;
  }
  for (uint64_t unit : {0xfffffff0u, 0xffffffffu}) {
    put_number(kParentImage, kSlot, 1, unit);
    EXPECT_NE(refusal(kParentImage).find(" 2^32 or above"), std::string::npos) << unit;
  }
  put_file(kParentImage, original(kParentImage));
  // One unit more than there is; a page that ends in the file's last byte.
  put_number(kParentImage, kStored, 2, kUnit + 1);
  EXPECT_NE(refusal(kParentImage).find("refers to slot 18"), std::string::npos);
  put_number(kParentImage, kStored, 2, kUnit);
  EXPECT_EQ(refusal(kParentImage), "");
  EXPECT_EQ(image_error_of(read_page(0)), ImageError{});
}

// What is stored of a page says how large it is. Any other number is refused, or the page is.
TEST_F(HostilePackedImages, EverySizeOfAStoredPage) {
  constexpr uint64_t kStored = 12, kSize = 11;
  for (uint64_t bytes = 1; bytes <= kUnit; bytes++) {
    put_number(kParentImage, kStored, 0, bytes);
    auto read = read_page(0);
    ASSERT_EQ(image_error_of(read), bytes == kSize ? ImageError{} : ImageError::kDamagedPage)
        << bytes << ": " << (read ? "" : read.error().message());
  }
  put_file(kParentImage, original(kParentImage));
  for (uint64_t bytes = 1; bytes <= kUnit; bytes += 3) {
    put_number(kImage, kStored, 0, bytes);
    ASSERT_EQ(image_error_of(read_page(1)), bytes == 283 ? ImageError{} : ImageError::kDamagedPage)
        << bytes;
  }
}

TEST_F(HostilePackedImages, EveryBitOfWhatIsStored) {
  struct Stored {
    const File& file;
    size_t unit, bytes;
    uint64_t page;
    bool sealed;
  };
  int accepted = 0;
  for (const Stored& s : {Stored{kParentPages, 0, 11, 0, false}, Stored{kPages, 2, 283, 1, true},
                          Stored{kOtherPages, 0, 283, 4, true}}) {
    const Bytes& whole = original(s.file);
    const size_t from = kPageBlock + s.unit * kUnit;
    UniqueFd at(open(dir_.path(s.file.name).c_str(), O_WRONLY | O_CLOEXEC));
    for (size_t bit = 0; bit < s.bytes * 8; bit++) {
      const size_t byte = from + bit / 8;
      const uint8_t flipped = whole[byte] ^ static_cast<uint8_t>(1 << (bit % 8));
      ASSERT_EQ(pwrite(at.get(), &flipped, 1, static_cast<off_t>(byte)), 1);
      auto read = read_page(s.page);
      // Another page, which its hash gives away; never where the page is encrypted.
      if (read && !s.sealed) {
        accepted++;
      } else {
        ASSERT_EQ(image_error_of(read), ImageError::kDamagedPage) << s.file.name << ", bit " << bit;
      }
      ASSERT_EQ(pwrite(at.get(), &whole[byte], 1, static_cast<off_t>(byte)), 1);
    }
  }
  EXPECT_GE(accepted, 8);  // the byte that the page is made of
  EXPECT_LT(accepted, 11 * 8 / 2);
}

// A seal of another page, of another dump's key, or none.
TEST_F(HostilePackedImages, EveryBitOfTheSeals) {
  const Bytes payload = opened();
  WireMessage message = parse_payload(payload, 1);
  WireField* seals = nullptr;
  for (WireField& field : message) {
    if (field.number != 10) continue;
    for (WireField& of_it : field.children) {
      if (of_it.number == 13) seals = &of_it;
    }
  }
  ASSERT_TRUE(seals);
  ASSERT_EQ(seals->data.size(), 3 * 28u);
  for (size_t bit = 0; bit < 28 * 8; bit++) {
    const auto flip = static_cast<uint8_t>(1 << (bit % 8));
    seals->data[bit / 8] ^= flip;
    put_file(kImage, in_container(kImage, serialise(message)));
    ASSERT_EQ(image_error_of(read_page(1)), ImageError::kDamagedPage) << bit;
    ASSERT_TRUE(read_page(4));
    seals->data[bit / 8] ^= flip;
  }
  std::swap_ranges(seals->data.begin(), seals->data.begin() + 28, seals->data.end() - 28);
  put_file(kImage, in_container(kImage, serialise(message)));
  for (uint64_t page : {1, 4}) {
    EXPECT_EQ(image_error_of(read_page(page)), ImageError::kDamagedPage) << page;
  }
  EXPECT_TRUE(read_page(0));
}

}  // namespace
}  // namespace phos::image_test
