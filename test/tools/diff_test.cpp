// SPDX-License-Identifier: GPL-2.0-only
// phos diff as a program.
#include "test/tools/images_fixture.h"

namespace phos::test {
namespace {

class Diff : public Images {
 protected:
  const PageHashKey key_ = *PageHashKey::generate();
};

TEST_F(Diff, TellsWhatChanged) {
  const std::string before = text_pages(10, 1);
  std::string after = before;
  after[0]++;
  after[5 * kPage]++;
  after.back()++;
  const SavedMemory driver = {0x7f9000000000, "by the driver", MemoryPath::kDriver, false};
  const std::string a = dump(
      "a", {{0x7f0000000000, before}, {0x7f1000000000, "went"}, {0x7f3000000000, "stays"}, driver},
      key_);
  const std::vector<SavedMemory> second = {
      {0x7f0000000000, after}, {0x7f2000000000, "appeared"}, {0x7f3000000000, "stays"}, driver};
  // With the same key, and with another one.
  for (const std::string& b :
       {dump("b", second, key_), dump("c", second, *PageHashKey::generate())}) {
    Outcome o = phos({"diff", a, b});
    EXPECT_EQ(o.code, 0) << o.err;
    EXPECT_EQ(o.err, "");
    EXPECT_EQ(o.out_lines(),
              (Words{"PID   ADDRESS         SIZE       KIND    CHANGE",
                     "4242  0x7f0000000000  640.0 KiB  device  3 of 10 pages",
                     "4242  0x7f1000000000  4 B        device  went",
                     "4242  0x7f2000000000  8 B        device  appeared", "",
                     "processes: 1 in both, 0 went, 0 appeared",
                     "allocations: 3 (640.0 KiB) in both, 1 (4 B) went, 1 (8 B) appeared",
                     "pages: 3 of 11 differ (192.0 KiB), in 1 of the allocations",
                     "not compared: 1 (13 B), of which A or B has no pages (saved by NVIDIA's "
                     "driver inside CRIU's images)"}));
    o = phos({"diff", "--json", a, b});
    EXPECT_EQ(o.code, 0) << o.err;
    for (const char* text : {"\"differing_pages\": 3", "\"presence\": \"went\"",
                             "\"address\": \"0x7f3000000000\"", "\"compared\": false"}) {
      EXPECT_NE(o.out.find(text), std::string::npos) << text << " in " << o.out;
    }
    EXPECT_NE(o.out.find(b.back() == 'b' ? "\"by_hashes\": true" : "\"by_hashes\": false"),
              std::string::npos);
  }
}

TEST_F(Diff, OfTheSameDumpThereIsNone) {
  const std::string a = dump("a", {{0x7f0000000000, "text"}}, key_);
  Outcome o = phos({"diff", a, a});
  EXPECT_EQ(o.code, 0) << o.err;
  EXPECT_EQ(o.out_lines(), (Words{"processes: 1 in both, 0 went, 0 appeared",
                                  "allocations: 1 (4 B) in both, 0 (0 B) went, 0 (0 B) appeared",
                                  "pages: 0 of 1 differ (0 B), in 0 of the allocations"}));
}

TEST_F(Diff, WhatCannotBeComparedIsRefused) {
  const std::string a = dump("a", {{0x7f0000000000, "text"}}, key_);
  const std::string b = dump("b", {{0x7f0000000000, "text"}}, *PageHashKey::generate());
  expect_refused(phos({"diff", a, root("none")}), "there is no directory");
  expect_refused(phos({"diff", root("plugins"), a}), "inventory.img is missing");
  damage(b + "/phos-pages-4242-0.img", kPage);
  expect_refused(phos({"diff", a, b}), "offset 0: 1 page is not what was saved");
  damage(b + "/phos-4242.img", 50);
  expect_refused(phos({"diff", a, b}), "phos-4242.img is damaged");
  for (const Words& args : {Words{"diff"}, Words{"diff", a}, Words{"diff", a, a, a}}) {
    expect_refused(phos(args), "give two directories", 2);
  }
}

}  // namespace
}  // namespace phos::test
