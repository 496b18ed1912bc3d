// SPDX-License-Identifier: GPL-2.0-only
// What the image reader must refuse, and for which reason.
#include <random>

#include "gpu-tracker/image/codec.h"
#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

class ImageRefuse : public testing::Test {
 protected:
  // What the reader says of `bytes` under the name phos-4242.img.
  Result<ProcessImage> read(const Bytes& bytes) {
    write_bytes(dir_.path("phos-4242.img"), bytes);
    return read_process_image(dir_.fd(), 4242);
  }
  Result<FilesImage> read_files(const Bytes& bytes) {
    write_bytes(dir_.path("phos-files.img"), bytes);
    return read_files_image(dir_.fd());
  }
  void expect_bad_field(const ProcessImage& image, const char* what) {
    auto written = write_process_image(dir_.fd(), image);
    EXPECT_EQ(image_error_of(written), ImageError::kBadField) << what;
    EXPECT_EQ(dir_.names(), std::set<std::string>()) << what;
  }

  TempDir dir_;
};

// phos-4242.img with one allocation on its one GPU.
struct Parts {
  Bytes dump_id = Bytes(kDump.begin(), kDump.end());
  Bytes uuid = Bytes(16, 1), uuid2 = Bytes(16, 2);
  int64_t pid = 4242;
  std::string comm = "app";
  uint64_t state = 0, driver_api = 13000;
  uint64_t address = 0x10000, size = 0x1000, kind = 1, path = 0;
  int64_t gpu = 0;

  Bytes file() const {
    Message g, g2, a, b, p;
    g.data(1, uuid).text(2, "GPU").number(3, 1u << 30);
    g2.data(1, uuid2).text(2, "GPU").number(3, 1u << 30);
    a.number(1, address).number(2, size).number(3, static_cast<uint64_t>(gpu));
    a.number(4, kind).number(5, path);
    b.number(1, 0x20000).number(2, 0x1000).number(3, 0).number(4, 1).number(5, 0);
    p.data(1, dump_id).number(2, static_cast<uint64_t>(pid)).text(3, comm).number(4, state);
    p.text(5, "580").number(6, driver_api).number(7, 1).text(8, "1");
    p.data(9, g.bytes).data(9, g2.bytes).data(10, a.bytes).data(10, b.bytes);
    p.number(13, 0);
    return container(p.bytes, 1);
  }
};

template <typename Edit>
Bytes edited(Edit edit) {
  Parts parts;
  edit(parts);
  return parts.file();
}

TEST_F(ImageRefuse, TruncationAtEveryByte) {
  const Bytes whole = Parts().file();
  ASSERT_TRUE(read(whole));
  for (size_t length = 0; length < whole.size(); length++) {
    auto result = read(Bytes(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(length)));
    ASSERT_EQ(image_error_of(result), ImageError::kTruncated) << length << " bytes";
  }
}

TEST_F(ImageRefuse, EverySingleBitFlip) {
  const Bytes whole = Parts().file();
  for (size_t bit = 0; bit < whole.size() * 8; bit++) {
    Bytes flipped = whole;
    flipped[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
    ImageError expected = bit < 8 * 8 ? ImageError::kNotAnImage : ImageError::kChecksum;
    ASSERT_EQ(image_error_of(read(flipped)), expected) << "bit " << bit;
  }
}

TEST_F(ImageRefuse, TrailingBytes) {
  Bytes longer = Parts().file();
  longer.push_back(0);
  EXPECT_EQ(image_error_of(read(longer)), ImageError::kTrailingBytes);
}

TEST_F(ImageRefuse, OtherFileTypes) {
  const std::string text = "#!/bin/sh\necho this is a shell script, not an image\n";
  EXPECT_EQ(image_error_of(read(Bytes(text.begin(), text.end()))), ImageError::kNotAnImage);
  EXPECT_EQ(image_error_of(read({'x'})), ImageError::kNotAnImage);
  EXPECT_EQ(image_error_of(read({})), ImageError::kTruncated);
}

TEST_F(ImageRefuse, RandomGarbage) {
  std::mt19937 random(20260101);
  for (int i = 0; i < 2000; i++) {
    Bytes garbage(random() % 300);
    for (uint8_t& byte : garbage) byte = static_cast<uint8_t>(random());
    ASSERT_FALSE(read(garbage)) << "round " << i;
  }
}

// Past the checksums: payloads that a hostile or buggy writer sealed correctly. What is accepted
// must obey the rules of the format, so it can be written again.
TEST_F(ImageRefuse, SealedGarbagePayloads) {
  std::mt19937 random(4711);
  const Bytes whole = Parts().file();
  const Bytes good(whole.begin() + 32, whole.end());
  int accepted = 0;
  for (int i = 0; i < 5000; i++) {
    Bytes payload = good;
    for (unsigned edits = 1 + random() % 4; edits > 0; edits--) {
      switch (random() % 3) {
        case 0:
          payload[random() % payload.size()] = static_cast<uint8_t>(random());
          break;
        case 1:
          payload.resize(1 + random() % payload.size());
          break;
        case 2: {
          size_t from = random() % payload.size();
          Bytes tail(payload.begin() + static_cast<ptrdiff_t>(from), payload.end());
          payload.insert(payload.end(), tail.begin(), tail.end());
          break;
        }
      }
    }
    auto result = read(container(payload, 1));
    if (!result) {
      ASSERT_NE(image_error_of(result), ImageError{}) << result.error().message();
      continue;
    }
    accepted++;
    auto again = encode(*result);
    ASSERT_TRUE(again) << again.error().message();
  }
  EXPECT_GT(accepted, 0);
}

TEST_F(ImageRefuse, NewerVersionNamesBothAndTheRemedy) {
  auto result = read(container({}, 1, 7));
  ASSERT_EQ(image_error_of(result), ImageError::kNewerVersion);
  const std::string& message = result.error().message();
  EXPECT_NE(message.find("version 7"), std::string::npos) << message;
  EXPECT_NE(message.find("up to version 2"), std::string::npos) << message;
  EXPECT_NE(message.find("use a newer phos"), std::string::npos) << message;
  EXPECT_EQ(image_error_of(read(container({}, 1, 0))), ImageError::kBadField);
}

TEST_F(ImageRefuse, WrongName) {
  EXPECT_EQ(image_error_of(read(edited([](Parts& p) { p.pid = 4243; }))), ImageError::kWrongName);
  Message files;
  files.data(1, Bytes(kDump.begin(), kDump.end()));
  EXPECT_EQ(image_error_of(read(container(files.bytes, 2))), ImageError::kWrongName);
  EXPECT_EQ(image_error_of(read_files(Parts().file())), ImageError::kWrongName);
}

TEST_F(ImageRefuse, NotTheMessage) {
  EXPECT_EQ(image_error_of(read(container({}, 1))), ImageError::kMalformed);
  EXPECT_EQ(image_error_of(read(container({0xff}, 1))), ImageError::kMalformed);
  Message only_id;
  only_id.data(1, Bytes(16, 1));
  EXPECT_EQ(image_error_of(read(container(only_id.bytes, 1))), ImageError::kMalformed);
}

TEST_F(ImageRefuse, AbsurdFields) {
  auto code = [&](auto edit) { return image_error_of(read(edited(edit))); };
  ASSERT_TRUE(read(Parts().file()));
  EXPECT_EQ(code([](Parts& p) { p.dump_id.pop_back(); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.dump_id.push_back(0); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.dump_id.assign(16, 0); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.uuid.clear(); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.uuid.resize(17); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.uuid2 = p.uuid; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.pid = -4242; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.pid = 0; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.comm = std::string("a\0b", 3); }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.state = 3; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.driver_api = 0; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.driver_api = 0x80000000; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.address = 0; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.size = 0; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.address = ~0ull, p.size = 2; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.gpu = 2; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.gpu = -2; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.kind = 6; }), ImageError::kBadField);
  EXPECT_EQ(code([](Parts& p) { p.path = 3; }), ImageError::kBadField);
}

// The second allocation of Parts is at 0x20000 and has 0x1000 bytes.
TEST_F(ImageRefuse, OverlappingAllocations) {
  auto code = [&](uint64_t address, uint64_t size) {
    return image_error_of(read(edited([&](Parts& p) { p.address = address, p.size = size; })));
  };
  EXPECT_EQ(code(0x20000, 0x1000), ImageError::kBadField);  // the same one twice
  EXPECT_EQ(code(0x1ffff, 2), ImageError::kBadField);
  EXPECT_EQ(code(0x1ffff, 1), ImageError{});
  EXPECT_EQ(code(0x20fff, 1), ImageError::kBadField);
  EXPECT_EQ(code(0x21000, 1), ImageError{});
  EXPECT_EQ(code(1, ~0ull), ImageError::kBadField);  // up to the end of the address space
}

TEST_F(ImageRefuse, AbsurdDeviceFiles) {
  auto code = [&](std::vector<std::pair<uint32_t, std::string>> files) {
    Message m;
    m.data(1, Bytes(kDump.begin(), kDump.end()));
    for (const auto& [id, path] : files) {
      Message f;
      f.number(1, id).text(2, path).number(3, 0);
      m.data(2, f.bytes);
    }
    return image_error_of(read_files(container(m.bytes, 2)));
  };
  EXPECT_EQ(code({{1, "/dev/nvidia0"}, {2, "/dev/nvidia0"}}), ImageError{});
  EXPECT_EQ(code({{1, "/dev/nvidia0"}, {1, "/dev/nvidia1"}}), ImageError::kBadField);
  EXPECT_EQ(code({{1, ""}}), ImageError::kBadField);
  EXPECT_EQ(code({{1, "dev/nvidia0"}}), ImageError::kBadField);
  EXPECT_EQ(code({{1, std::string("/dev/null\0x", 11)}}), ImageError::kBadField);
  EXPECT_EQ(code({{1, "/" + std::string(4095, 'x')}}), ImageError::kBadField);
}

TEST_F(ImageRefuse, WriterKeepsTheSameRules) {
  ProcessImage p = small_process(4242);
  p.pid = -1;
  expect_bad_field(p, "pid");
  p = small_process(4242, DumpId{});
  expect_bad_field(p, "dump_id");
  p = small_process(4242);
  p.state = CudaState::kFailed;
  expect_bad_field(p, "state");
  p = small_process(4242);
  p.phos_version = std::string("1\0", 2);
  expect_bad_field(p, "phos_version");
  p = small_process(4242);
  p.allocations = {{0x1000, 0x1000, 0, MemoryKind::kDevice, MemoryPath::kDriver}};
  expect_bad_field(p, "gpu index without GPUs");
  p.allocations[0].gpu = -1;
  EXPECT_TRUE(write_process_image(dir_.fd(), p));
}

// A header may promise anything; memory follows what the file has. The file is sparse.
TEST_F(ImageRefuse, HugeLengthsCostNoMemory) {
  Bytes header = {'P', 'H', 'O', 'S', 'I', 'M', 'G', 0};
  put(header, 1, 4);
  put(header, 1, 4);
  put(header, 1ull << 40, 8);
  put(header, 0, 4);
  put(header, bitwise_crc32c(header), 4);
  EXPECT_EQ(image_error_of(read(header)), ImageError::kTruncated);

  std::string path = dir_.path("phos-4242.img");
  if (truncate(path.c_str(), (1ll << 40) + 32) != 0) {
    GTEST_SKIP() << "no sparse file of 1 TiB here: " << strerror(errno);
  }
  EXPECT_EQ(image_error_of(read_process_image(dir_.fd(), 4242)), ImageError::kBadField);
}

// Empty sub-messages cost the decoder some fifty times their two bytes. A valid image with a
// million of them is refused for that alone.
TEST_F(ImageRefuse, AmplifyingPayload) {
  Bytes whole = Parts().file();
  Bytes payload(whole.begin() + 32, whole.end());
  for (int i = 0; i < 3; i++) payload.insert(payload.end(), {0x5a, 0x00});
  ASSERT_TRUE(read(container(payload, 1)));
  for (int i = 0; i < 1'000'000; i++) payload.insert(payload.end(), {0x5a, 0x00});
  EXPECT_EQ(image_error_of(read(container(payload, 1))), ImageError::kMalformed);
}

// The smallest elements the rules allow must not be mistaken for that.
TEST_F(ImageRefuse, NotManySmallElements) {
  Message files;
  files.data(1, Bytes(kDump.begin(), kDump.end()));
  for (uint32_t id = 0; id < 200'000; id++) {
    Message file;
    file.number(1, id).text(2, "/").number(3, 0);
    files.data(2, file.bytes);
  }
  auto result = read_files(container(files.bytes, 2));
  ASSERT_TRUE(result) << result.error().message();
  EXPECT_EQ(result->files.size(), 200'000u);
}

TEST_F(ImageRefuse, SymbolicLink) {
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(4242)));
  ASSERT_EQ(rename(dir_.path("phos-4242.img").c_str(), dir_.path("real").c_str()), 0);
  ASSERT_EQ(symlink("real", dir_.path("phos-4242.img").c_str()), 0);
  auto result = read_process_image(dir_.fd(), 4242);
  EXPECT_EQ(image_error_of(result), ImageError::kUntrusted);
  EXPECT_NE(result.error().message().find("symbolic link"), std::string::npos);
}

TEST_F(ImageRefuse, NotARegularFile) {
  ASSERT_EQ(mkfifo(dir_.path("phos-4242.img").c_str(), 0600), 0);
  EXPECT_EQ(image_error_of(read_process_image(dir_.fd(), 4242)), ImageError::kUntrusted);
  ASSERT_EQ(mkdir(dir_.path("phos-files.img").c_str(), 0700), 0);
  EXPECT_EQ(image_error_of(read_files_image(dir_.fd())), ImageError::kUntrusted);
}

TEST_F(ImageRefuse, WritableByGroupOrOthers) {
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(4242)));
  std::string path = dir_.path("phos-4242.img");
  for (mode_t mode : {0620u, 0602u, 0666u}) {
    ASSERT_EQ(chmod(path.c_str(), mode), 0);
    auto result = read_process_image(dir_.fd(), 4242);
    ASSERT_EQ(image_error_of(result), ImageError::kUntrusted) << std::oct << mode;
    EXPECT_NE(result.error().message().find("chmod go-w"), std::string::npos);
  }
  ASSERT_EQ(chmod(path.c_str(), 0644), 0);
  EXPECT_TRUE(read_process_image(dir_.fd(), 4242));
}

TEST_F(ImageRefuse, OwnedBySomeoneElse) {
  if (geteuid() != 0) GTEST_SKIP() << "giving a file away needs root";
  ASSERT_TRUE(write_process_image(dir_.fd(), small_process(4242)));
  ASSERT_EQ(chown(dir_.path("phos-4242.img").c_str(), 12345, 0), 0);
  auto result = read_process_image(dir_.fd(), 4242);
  ASSERT_EQ(image_error_of(result), ImageError::kUntrusted);
  EXPECT_NE(result.error().message().find("12345"), std::string::npos);
  EXPECT_NE(result.error().message().find("chown root"), std::string::npos);
}

TEST_F(ImageRefuse, MissingFileIsEnoent) {
  auto result = read_process_image(dir_.fd(), 4242);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().domain(), Domain::kErrno);
  EXPECT_EQ(result.error().code(), ENOENT);
}

}  // namespace
}  // namespace phos::image_test
