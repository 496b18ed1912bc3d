// SPDX-License-Identifier: GPL-2.0-only
// The order in which CRIU goes through a restored tree, from pstree.img; test/criu/test_order.py
// compares it with what CRIU does.
#include "gpu-tracker/image/criu_tree.h"

#include "test/unit/image_fixture.h"

namespace phos::image_test {
namespace {

constexpr uint32_t kCommonMagic = 0x54564319, kPstreeMagic = 0x50273030;

struct Task {
  uint64_t pid, parent;
  std::vector<uint64_t> threads{};
};

Bytes pstree(const std::vector<Task>& tasks) {
  Bytes bytes;
  put(bytes, kCommonMagic, 4);
  put(bytes, kPstreeMagic, 4);
  for (const Task& task : tasks) {
    Message m;
    m.number(1, task.pid).number(2, task.parent).number(3, task.pid).number(4, 1);
    for (uint64_t thread : task.threads) m.number(5, thread);
    put(bytes, m.bytes.size(), 4);
    bytes.insert(bytes.end(), m.bytes.begin(), m.bytes.end());
  }
  return bytes;
}

class CriuTree : public testing::Test {
 protected:
  using Pids = std::vector<int>;

  Pids order(const Bytes& bytes) {
    write_bytes(dir_.path("pstree.img"), bytes);
    return order_of_restore(dir_.fd());
  }

  TempDir dir_;
};

TEST_F(CriuTree, ParentsFirstAndTheLastOfTheirChildren) {
  EXPECT_EQ(order(pstree({{7, 0, {7, 8, 300}}})), Pids{7});
  //       1
  //   20  30  3
  //  21     31 32
  //            33
  EXPECT_EQ(order(pstree({{1, 0},
                          {20, 1},
                          {21, 20, {21, 22}},
                          {30, 1},
                          {31, 30},
                          {32, 30},
                          {33, 32, {33}},
                          {3, 1}})),
            (Pids{1, 3, 30, 32, 33, 31, 20, 21}));
}

TEST_F(CriuTree, ADeepOneAndAWideOne) {
  std::vector<Task> deep{{1, 0}}, wide{{1, 0}};
  Pids down{1}, across{1};
  for (int i = 2; i <= 50'000; i++) {
    const auto pid = static_cast<uint64_t>(i);
    deep.push_back({pid, pid - 1});
    wide.push_back({pid, 1});
    down.push_back(i);
    across.push_back(50'002 - i);
  }
  EXPECT_EQ(order(pstree(deep)), down);
  EXPECT_EQ(order(pstree(wide)), across);
}

TEST_F(CriuTree, WhatIsNoTreeHasNoOrder) {
  EXPECT_EQ(order_of_restore(dir_.fd()), Pids());
  const std::vector<std::vector<Task>> wrong = {
      {},                                // no root
      {{7, 8}},                          // which is a child
      {{7, 7}},                          // or its own
      {{7, 0}, {8, 0}},                  // two of them
      {{7, 0}, {9, 8}, {8, 7}},          // a child before its parent
      {{7, 0}, {8, 7}, {8, 7}},          // one that is there twice
      {{7, 0}, {7, 7}},                  // the root, too
      {{7, 0}, {0, 7}},                  // no pid
      {{7, 0}, {uint64_t{1} << 31, 7}},  // none that there can be
  };
  for (size_t i = 0; i < wrong.size(); i++) EXPECT_EQ(order(pstree(wrong[i])), Pids()) << i;
}

TEST_F(CriuTree, FilesThatAreCutOffOrDamaged) {
  const Bytes whole = pstree({{1, 0}, {200, 1, {200, 201}}, {5, 200}});
  ASSERT_EQ(order(whole), (Pids{1, 200, 5}));
  const std::set<Pids> shorter{{}, {1}, {1, 200}};
  for (size_t length = 0; length < whole.size(); length++) {
    const Pids found = order(Bytes(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(length)));
    EXPECT_TRUE(shorter.contains(found)) << length;
  }
  for (size_t bit = 0; bit < whole.size() * 8; bit++) {
    Bytes flipped = whole;
    flipped[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    EXPECT_LE(order(flipped).size(), 3u) << bit;
    if (bit >= 64) continue;
    EXPECT_EQ(order(flipped), Pids()) << bit;
  }
  std::filesystem::remove(dir_.path("pstree.img"));
  ASSERT_EQ(symlink("elsewhere", dir_.path("pstree.img").c_str()), 0);
  write_bytes(dir_.path("elsewhere"), whole);
  EXPECT_EQ(order_of_restore(dir_.fd()), Pids());
  std::filesystem::remove(dir_.path("pstree.img"));
  ASSERT_EQ(mkfifo(dir_.path("pstree.img").c_str(), 0600), 0);
  EXPECT_EQ(order_of_restore(dir_.fd()), Pids());
}

}  // namespace
}  // namespace phos::image_test
