// SPDX-License-Identifier: GPL-2.0-only
// phos verify as a program.
#include "test/tools/images_fixture.h"

namespace phos::test {
namespace {

class Verify : public Images {
 protected:
  void SetUp() override {
    Images::SetUp();
    std::string with_zeros = text_pages(9, 1);
    std::fill_n(with_zeros.begin() + 2 * kPage, 3 * kPage, '\0');
    dir_ = dump("a", {{0x7f0000000000, with_zeros}, {0x7f1000000000, "tail"}},
                *PageHashKey::generate());
    pages_ = dir_ + "/phos-pages-4242-0.img";
  }

  std::string dir_, pages_;
};

TEST_F(Verify, ASoundDump) {
  for (const Words& args : {Words{"verify", dir_}, Words{"verify", "-j", "1", dir_}}) {
    Outcome o = phos(args);
    EXPECT_EQ(o.code, 0);
    EXPECT_EQ(o.err, "");
    EXPECT_EQ(o.out_lines().size(), 1u) << o.out;
    EXPECT_EQ(
        o.out.rfind(dir_ + ": 1 process, 2 allocations, 10 pages (3 zero), 448.0 KiB read in", 0),
        0u)
        << o.out;
    EXPECT_NE(o.out.find(" GB/s): all as saved"), std::string::npos) << o.out;
  }
  Outcome o = phos({"verify", dir_, "--json"});
  EXPECT_EQ(o.code, 0);
  for (const char* text : {"\"ok\": true", "\"pages\": 10", "\"zero_pages\": 3",
                           "\"bytes\": 458752", "\"damage\": []", "\"stage\": \"dump\""}) {
    EXPECT_NE(o.out.find(text), std::string::npos) << text << " in " << o.out;
  }
}

TEST_F(Verify, DamageIsNamedAndFailsIt) {
  damage(pages_, 2 * kPage + 12345);  // page 1
  damage(pages_, 7 * kPage + 5);      // behind "tail"
  Outcome o = phos({"verify", dir_});
  EXPECT_EQ(o.code, 1);
  EXPECT_EQ(o.out.find("all as saved"), std::string::npos) << o.out;
  const Words lines = o.err_lines();
  ASSERT_EQ(lines.size(), 3u) << o.err;
  const std::string gpu = "phos verify: process 4242, GPU-01010101-0101-0101-0101-010101010101, ";
  EXPECT_EQ(lines[0],
            gpu +
                "allocation at 0x7f0000000000 (589824 bytes), offset 65536: 1 page is not "
                "what was saved (" +
                pages_ + ", slot 1)");
  EXPECT_EQ(lines[1],
            gpu +
                "allocation at 0x7f1000000000 (4 bytes), offset 0: 1 page is not what was "
                "saved (" +
                pages_ + ", slot 6)");
  EXPECT_EQ(lines[2],
            "phos verify: " + dir_ + " is damaged: 2 of 10 pages; use another copy of the images");
  o = phos({"verify", dir_, "--json"});
  EXPECT_EQ(o.code, 1);
  EXPECT_EQ(o.err_lines().size(), 1u) << o.err;
  for (const char* text : {"\"ok\": false", "\"damaged_pages\": 2", "\"offset\": 65536",
                           "\"address\": \"0x7f1000000000\""}) {
    EXPECT_NE(o.out.find(text), std::string::npos) << text << " in " << o.out;
  }
}

TEST_F(Verify, MuchDamageIsCounted) {
  const std::string dir =
      dump("b", {{0x7f0000000000, text_pages(80, 1)}}, *PageHashKey::generate());
  for (size_t page = 0; page < 80; page += 2) {
    damage(dir + "/phos-pages-4242-0.img", (page + 1) * kPage);
  }
  Outcome o = phos({"verify", dir});
  EXPECT_EQ(o.code, 1);
  const Words lines = o.err_lines();
  ASSERT_EQ(lines.size(), 22u) << o.err;
  EXPECT_EQ(lines[20], "phos verify: and 20 more such places");
}

TEST_F(Verify, WhatTheDriverSavedIsSaid) {
  const std::string dir = dump("b",
                               {{0x7f0000000000, "by the driver", MemoryPath::kDriver, false},
                                {0x7f1000000000, "by both", MemoryPath::kDriver, true}},
                               *PageHashKey::generate());
  Outcome o = phos({"verify", dir});
  EXPECT_EQ(o.code, 0) << o.err;
  ASSERT_EQ(o.out_lines().size(), 2u) << o.out;
  EXPECT_EQ(o.out_lines()[1],
            "2 allocations (20 B): saved by NVIDIA's driver inside CRIU's images; not checked here "
            "(but phos's own, earlier copy of 1 was)");
}

TEST_F(Verify, WhatCannotBeVerifiedIsRefused) {
  expect_refused(phos({"verify", root("none")}), "there is no directory");
  std::filesystem::resize_file(pages_, 3 * kPage);
  expect_refused(phos({"verify", dir_}), pages_ + " is truncated");
  std::filesystem::remove(pages_);
  expect_refused(phos({"verify", dir_}), "phos-pages-4242-0.img, which is missing");
  damage(dir_ + "/phos-4242.img", 100);
  expect_refused(phos({"verify", dir_}), "phos-4242.img is damaged");
  std::filesystem::remove(dir_ + "/phos-4242.img");
  Outcome o = phos({"verify", dir_});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_NE(o.out.find("without CUDA"), std::string::npos) << o.out;
  std::filesystem::remove(dir_ + "/inventory.img");
  expect_refused(phos({"verify", dir_}), "inventory.img is missing");
}

TEST_F(Verify, UsageErrors) {
  for (const Words& args : {Words{"verify"}, Words{"verify", dir_, dir_},
                            Words{"verify", dir_, "-j", "0"}, Words{"verify", dir_, "-j", "x"}}) {
    SCOPED_TRACE(::testing::PrintToString(args));
    expect_refused(phos(args), "phos verify: ", 2);
  }
}

}  // namespace
}  // namespace phos::test
