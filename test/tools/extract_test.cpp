// SPDX-License-Identifier: GPL-2.0-only
// phos extract as a program.
#include "test/tools/images_fixture.h"

namespace phos::test {
namespace {

constexpr uint64_t kAt = 0x7f0000000000, kDriver = 0x7f1000000000, kCopied = 0x7f2000000000;

class Extract : public Images {
 protected:
  void SetUp() override {
    Images::SetUp();
    text_ = text_pages(40, 1) + "a tail";
    std::fill_n(text_.begin() + 3 * kPage, 20 * kPage, '\0');
    dir_ = dump("a",
                {{kAt, text_},
                 {kDriver, "by the driver", MemoryPath::kDriver, false},
                 {kCopied, "by both", MemoryPath::kDriver, true}},
                *PageHashKey::generate());
    std::filesystem::create_directory(root("out"));
  }

  Outcome extract(const std::string& address, const std::string& to, const Words& more = {}) const {
    Words args = {"extract", dir_, "--pid", "4242", "--address", address, "-o", to};
    args.insert(args.end(), more.begin(), more.end());
    return phos(args);
  }

  std::string text_, dir_;
};

TEST_F(Extract, WritesTheBytes) {
  Outcome o = extract("0x7f0000000000", root("out/f"));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.err, "");
  EXPECT_EQ(o.out_lines().size(), 1u) << o.out;
  EXPECT_TRUE(read_file(root("out/f")) == text_);
  EXPECT_EQ(list_dir(root("out")), Words{"f"});
  struct stat st;
  ASSERT_EQ(stat(root("out/f").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0600u);
  o = extract(std::to_string(kAt), "-");
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.err, "");
  EXPECT_TRUE(o.out == text_);
}

TEST_F(Extract, ReadsThroughTheChain) {
  UniqueFd parent = open_dir(dir_);
  ProcessImage image = *read_process_image(parent.get(), 4242);
  image.parent_dump_id = image.dump_id;
  image.dump_id.fill(9);
  for (AllocationInfo& a : image.allocations) {
    if (!a.hashes.empty()) {
      a.extents = {{0, static_cast<uint32_t>(a.hashes.size()), PageSource::kParent, 0}};
    }
  }
  std::filesystem::create_directory(root("b"));
  std::filesystem::create_symlink("../a", root("b/parent"));
  ASSERT_TRUE(write_process_image(open_dir(root("b")).get(), image));
  dir_ = root("b");
  Outcome o = extract("0x7f0000000000", root("out/f"));
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_TRUE(read_file(root("out/f")) == text_);
}

TEST_F(Extract, ReplacesAFileOnlyByForce) {
  write_file(root("out/f"), "mine");
  expect_refused(extract("0x7f0000000000", root("out/f")), "exists already");
  EXPECT_EQ(read_file(root("out/f")), "mine");
  Outcome o = extract("0x7f0000000000", root("out/f"), {"--force"});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_TRUE(read_file(root("out/f")) == text_);
  EXPECT_EQ(list_dir(root("out")), Words{"f"});
  // Neither a device nor what a link leads to.
  std::filesystem::create_symlink("f", root("out/link"));
  expect_refused(extract("0x7f0000000000", root("out/link"), {"-f"}), "is not a regular file");
  expect_refused(extract("0x7f0000000000", "/dev/null", {"-f"}), "is not a regular file");
  expect_refused(extract("0x7f0000000000", root("out"), {"-f"}), "is not a regular file");
  expect_refused(extract("0x7f0000000000", root("none/f")), "cannot write");
}

TEST_F(Extract, LeavesNothingOfADamagedAllocation) {
  write_file(root("out/old"), "mine");
  damage(dir_ + "/phos-pages-4242-0.img", 21 * kPage + 1);  // slot 20: page 40, behind the tail
  const std::string text = "offset 2621440: 1 page is not what was saved";
  expect_refused(extract("0x7f0000000000", root("out/f")), text);
  expect_refused(extract("0x7f0000000000", root("out/old"), {"-f"}), text);
  EXPECT_EQ(list_dir(root("out")), Words{"old"});
  EXPECT_EQ(read_file(root("out/old")), "mine");
  // Nothing of the damaged page, nor of those that are checked with it, goes out.
  Outcome o = extract("0x7f0000000000", "-");
  EXPECT_EQ(o.code, 1);
  EXPECT_TRUE(o.out == text_.substr(0, 32 * kPage));
}

TEST_F(Extract, WhatTheDriverSavedIsRefused) {
  expect_refused(extract("0x7f1000000000", root("out/f")), "only a restore brings it back");
  expect_refused(extract("0x7f1000000000", root("out/f"), {"--live-copy"}),
                 "only a restore brings it back");
  expect_refused(extract("0x7f2000000000", root("out/f")), "add --live-copy");
  EXPECT_EQ(list_dir(root("out")), Words{});
  Outcome o = extract("0x7f2000000000", "-", {"--live-copy"});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.out, "by both");
}

TEST_F(Extract, WrongPlaces) {
  expect_refused(extract("0x7f0000000001", "-"),
                 "0x7f0000000001 lies in process 4242, allocation at 0x7f0000000000");
  expect_refused(extract("0x10", "-"), "no GPU memory at 0x10");
  expect_refused(phos({"extract", dir_, "--pid", "1", "--address", "1", "-o", "-"}),
                 "no CUDA process with pid 1");
  expect_refused(phos({"extract", root("none"), "--pid", "1", "--address", "1", "-o", "-"}),
                 "there is no directory");
}

TEST_F(Extract, UsageErrors) {
  for (const char* address : {"", "0x", "x", "-1", "0x1g", "12a", "0x10000000000000000"}) {
    SCOPED_TRACE(address);
    expect_refused(extract(address, "-"), "phos extract: ", 2);
  }
  for (const Words& args :
       {Words{"extract"}, Words{"extract", dir_}, Words{"extract", dir_, "--pid", "4242"},
        Words{"extract", dir_, "--pid", "4242", "--address", "0x7f0000000000"},
        Words{"extract", dir_, dir_, "--pid", "4242", "--address", "1", "-o", "-"}}) {
    SCOPED_TRACE(::testing::PrintToString(args));
    expect_refused(phos(args), "phos extract: ", 2);
  }
}

}  // namespace
}  // namespace phos::test
