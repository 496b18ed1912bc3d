// SPDX-License-Identifier: GPL-2.0-only
// Chains that must be refused, with the level and the reason; links that are followed or not; pages
// files as part of an image set.
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

using Names = std::set<std::string>;

// Three dumps of one page more each; the last takes two pages from its parents.
class BrokenChain : public ChainTest {
 protected:
  BrokenChain() {
    Memory memory{0, Bytes(3 * kPage, 'a')};
    for (uint8_t level = 1; level <= 3; level++) {
      images_[level] = dump(level, {{0x1000000, memory}});
      memory.bytes[(3u - level) * kPage] = 'b';
    }
    auto chain = open_chain(3);
    EXPECT_TRUE(chain) << chain.error().message();
  }
  void rewrite(uint8_t level, const ProcessImage& image) {
    auto written = write_process_image(fd(level), image);
    ASSERT_TRUE(written) << written.error().message();
  }
  void relink(uint8_t level, const std::string& target) {
    ASSERT_EQ(unlink(path(level, "parent").c_str()), 0);
    ASSERT_EQ(symlink(target.c_str(), path(level, "parent").c_str()), 0);
  }

  std::map<uint8_t, ProcessImage> images_;
};

TEST_F(BrokenChain, NoLink) {
  ASSERT_EQ(unlink(path(2, "parent").c_str()), 0);
  expect_refused(3, ImageError::kBrokenChain, "broken at level 2: ");
  expect_refused(3, ImageError::kBrokenChain, "no link `parent`");
  EXPECT_TRUE(open_chain(1));
}

TEST_F(BrokenChain, ParentDirectoryGone) {
  std::filesystem::remove_all(path(2));
  auto chain = open_chain(3);
  ASSERT_FALSE(chain);
  EXPECT_EQ(chain.error().code(), ENOTDIR);
  EXPECT_NE(chain.error().message().find("broken at level 1: " + path(3, "parent")),
            std::string::npos)
      << chain.error().message();
  EXPECT_FALSE(read_image_set(fd(3)));
}

TEST_F(BrokenChain, ParentWithoutTheProcess) {
  ASSERT_EQ(unlink(path(1, "phos-7.img").c_str()), 0);
  expect_refused(3, ImageError::kBrokenChain, path(1, "phos-7.img") + " does not exist");
}

TEST_F(BrokenChain, ParentWasDumpedAgain) {
  ProcessImage image = images_[1];
  image.dump_id = dump_id(99);
  rewrite(1, image);
  expect_refused(3, ImageError::kBrokenChain,
                 path(2, "phos-7.img") + " needs pages of parent dump " +
                     format_dump_id(dump_id(1)) + ", but " + path(1) + " holds dump " +
                     format_dump_id(dump_id(99)));
}

TEST_F(BrokenChain, LinkLeadsToAnotherDump) {
  relink(3, "../1");
  expect_refused(3, ImageError::kBrokenChain,
                 path(1) + " holds dump " + format_dump_id(dump_id(1)));
}

TEST_F(BrokenChain, AnotherKey) {
  ProcessImage image = images_[2];
  image.hash_key[0] ^= 1;
  rewrite(2, image);
  expect_refused(3, ImageError::kBrokenChain, "another key");
}

// What was opened before is not what the image builds on, or does not have it all.
TEST_F(BrokenChain, OpenedParentIsAnother) {
  auto first = open_chain(1), second = open_chain(2);
  ASSERT_TRUE(first && second);
  EXPECT_TRUE(PageChain::open_on(*second, fd(3), images_[3], PageIo::kCached));
  auto refused = [&](const PageChain& parent, const ProcessImage& image) {
    auto chain = PageChain::open_on(parent, fd(3), image, PageIo::kCached);
    EXPECT_EQ(image_error_of(chain), ImageError::kBrokenChain);
  };
  refused(*first, images_[3]);
  ProcessImage image = images_[3];
  image.hash_key[0] ^= 1;
  refused(*second, image);
  image = images_[3];
  image.allocations[0].hashes[0][5] ^= 1;
  refused(*second, image);
  image = images_[3];
  image.allocations[0].address += kPage;
  refused(*second, image);
}

// It could be read all the same, as long as it is open: but not by a restore.
TEST_F(BrokenChain, OpenedParentIsRemovedMeanwhile) {
  auto parent = open_chain(2);
  ASSERT_TRUE(parent) << parent.error().message();
  auto with = [&](const std::string& file, const char* what) {
    const std::string aside = dir_.path("aside");
    ASSERT_EQ(rename(file.c_str(), aside.c_str()), 0);
    auto chain = PageChain::open_on(*parent, fd(3), images_[3], PageIo::kCached);
    EXPECT_EQ(image_error_of(chain), ImageError::kBrokenChain);
    EXPECT_NE(chain.error().message().find(what), std::string::npos) << chain.error().message();
    ASSERT_EQ(rename(aside.c_str(), file.c_str()), 0);
    EXPECT_TRUE(PageChain::open_on(*parent, fd(3), images_[3], PageIo::kCached));
  };
  with(path(2, "phos-7.img"), "which has been removed");
  with(path(2, "phos-pages-7-0.img"), "which has been removed or replaced");
  relink(3, "../1");
  EXPECT_FALSE(PageChain::open_on(*parent, fd(3), images_[3], PageIo::kCached));
  relink(3, "../2");
  // Of a parent further down a file that has no name any more.
  ASSERT_EQ(unlink(path(1, "phos-pages-7-0.img").c_str()), 0);
  auto chain = PageChain::open_on(*parent, fd(3), images_[3], PageIo::kCached);
  EXPECT_EQ(image_error_of(chain), ImageError::kBrokenChain);
}

TEST_F(BrokenChain, Circle) {
  ProcessImage image = images_[1];
  image.parent_dump_id = dump_id(3);
  rewrite(1, image);
  ASSERT_EQ(symlink("../3", path(1, "parent").c_str()), 0);
  expect_refused(3, ImageError::kBrokenChain, "in a circle, back to " + path(3));
}

TEST_F(BrokenChain, ParentHasAnotherPage) {
  ProcessImage image = images_[1];
  image.allocations[0].hashes[0][5] ^= 1;
  rewrite(1, image);
  expect_refused(3, ImageError::kBrokenChain,
                 "the allocation at 0x1000000 takes page 0 from its parent, but " + path(1));
}

TEST_F(BrokenChain, ParentHasNotThatMemory) {
  ProcessImage image = images_[1];
  image.allocations[0].address += kPage;
  rewrite(1, image);
  expect_refused(3, ImageError::kBrokenChain, path(1) + " has none of that memory");
  image = images_[1];
  image.allocations[0].path = MemoryPath::kDriver;
  image.allocations[0].hashes.clear();
  image.allocations[0].extents.clear();
  rewrite(1, image);
  expect_refused(3, ImageError::kBrokenChain, path(1) + " has none of that memory");
}

TEST_F(BrokenChain, PagesFileMissingOrShort) {
  const Bytes whole = read_bytes(path(1, "phos-pages-7-0.img"));
  ASSERT_EQ(unlink(path(1, "phos-pages-7-0.img").c_str()), 0);
  expect_refused(3, ImageError::kIncomplete, "phos-pages-7-0.img, which is missing");
  write_bytes(path(1, "phos-pages-7-0.img"), Bytes(whole.begin(), whole.end() - 1));
  expect_refused(3, ImageError::kTruncated, "phos-pages-7-0.img is truncated");
  // Sound in itself, but of too few pages.
  auto writer = create(1, 7, 0);
  AlignedPages pages(2);
  ASSERT_TRUE(writer->write(0, pages[0], 2));
  ASSERT_TRUE(writer->finish());
  expect_refused(3, ImageError::kIncomplete, "slot 2 of phos-pages-7-0.img, which has 2 slots");
  // Of another dump.
  write_bytes(path(1, "phos-pages-7-0.img"), read_bytes(path(2, "phos-pages-7-0.img")));
  expect_refused(3, ImageError::kMixedDumps, "is from dump " + format_dump_id(dump_id(2)));
}

TEST_F(BrokenChain, DamagedParentImage) {
  Bytes bytes = read_bytes(path(1, "phos-7.img"));
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(path(1, "phos-7.img"), bytes);
  expect_refused(3, ImageError::kChecksum, "broken at level 2: " + path(1, "phos-7.img"));
}

// ---- links ----

TEST_F(BrokenChain, LinkMayBeADirectoryOrLeadThroughLinks) {
  ASSERT_EQ(symlink("1", dir_.path("latest").c_str()), 0);
  relink(2, "../latest/../latest");
  EXPECT_TRUE(open_chain(3));
  ASSERT_EQ(unlink(path(2, "parent").c_str()), 0);
  ASSERT_EQ(rename(path(1).c_str(), path(2, "parent").c_str()), 0);
  auto chain = open_chain(3);
  ASSERT_TRUE(chain) << chain.error().message();
  EXPECT_EQ(chain->levels()[2].directory, path(2, "parent"));
}

TEST_F(BrokenChain, AbsoluteLink) {
  relink(2, path(1));
  expect_refused(3, ImageError::kUntrusted, "make it relative");
}

TEST_F(BrokenChain, LinkToSomethingElse) {
  write_bytes(dir_.path("file"), {'x'});
  for (const char* target : {"../file", "../nothing", "parent"}) {
    relink(2, target);
    auto chain = open_chain(3);
    ASSERT_FALSE(chain) << target;
    EXPECT_EQ(chain.error().domain(), Domain::kErrno);
    EXPECT_NE(chain.error().message().find(path(2, "parent")), std::string::npos);
    EXPECT_NE(chain.error().code(), ENOENT) << "which stands for no link at all";
  }
}

TEST_F(BrokenChain, NoLinkIsEnoent) {
  auto parent = open_parent(fd(1));
  ASSERT_FALSE(parent);
  EXPECT_EQ(parent.error().domain(), Domain::kErrno);
  EXPECT_EQ(parent.error().code(), ENOENT);
}

// ---- sets ----

TEST_F(BrokenChain, SetHasTheChainOfEachProcess) {
  ASSERT_TRUE(write_process_image(fd(3), small_process(5, dump_id(3))));
  auto set = read_image_set(fd(3));
  ASSERT_TRUE(set) << set.error().message();
  ASSERT_EQ(set->processes.size(), 2u);
  expect_equal(set->processes[1], images_[3]);
  ASSERT_EQ(set->chains.size(), 2u);
  EXPECT_EQ(set->chains[0].size(), 1u);
  EXPECT_EQ(set->chains[1].size(), 3u);
  EXPECT_TRUE(check_stage(*set));
}

TEST_F(BrokenChain, StrayPagesFiles) {
  ASSERT_TRUE(create(3, 8, 0)->finish());
  auto set = read_image_set(fd(3));
  ASSERT_EQ(image_error_of(set), ImageError::kIncomplete);
  EXPECT_NE(set.error().message().find("phos-pages-8-0.img is there, but no phos-8.img"),
            std::string::npos)
      << set.error().message();
  ASSERT_EQ(unlink(path(3, "phos-pages-8-0.img").c_str()), 0);
  // One that nothing refers to, but of this dump, does no harm; of another, it is a mixture.
  ASSERT_TRUE(create(3, 7, 1)->finish());
  EXPECT_TRUE(read_image_set(fd(3)));
  ASSERT_TRUE((*PageFileWriter::create(fd(3), 7, 1, kDump))->finish());
  EXPECT_EQ(image_error_of(read_image_set(fd(3))), ImageError::kMixedDumps);
}

TEST_F(BrokenChain, PreDumpsAreNotRestoredFrom) {
  images_[3].stage = DumpStage::kPreDump;
  rewrite(3, images_[3]);
  auto set = read_image_set(fd(3));
  ASSERT_TRUE(set) << set.error().message();
  auto refused = check_stage(*set);
  ASSERT_EQ(image_error_of(refused), ImageError::kPreDumpOnly);
  EXPECT_NE(refused.error().message().find("phos-7.img was made by a pre-dump"), std::string::npos);
  ASSERT_TRUE(write_process_image(fd(3), small_process(5, dump_id(3))));
  EXPECT_EQ(image_error_of(read_image_set(fd(3))), ImageError::kMixedDumps);
}

TEST_F(BrokenChain, RemovesPagesFilesOfThatDumpOnly) {
  write_bytes(path(3, "phos-pages-9-0.img"), read_bytes(path(2, "phos-pages-7-0.img")));
  write_bytes(path(3, "phos-pages-9-1.img"), {'?'});
  auto removed = remove_images(fd(3), dump_id(3));
  ASSERT_TRUE(removed) << removed.error().message();
  Names left;
  for (const auto& entry : std::filesystem::directory_iterator(path(3))) {
    left.insert(entry.path().filename());
  }
  EXPECT_EQ(left, (Names{"parent", "phos-pages-9-0.img", "phos-pages-9-1.img"}));
  write_bytes(path(3, "phos-pages-9-1.img.tmp"), {'?'});
  ASSERT_TRUE(remove_all_images(fd(3)));
  left.clear();
  for (const auto& entry : std::filesystem::directory_iterator(path(3))) {
    left.insert(entry.path().filename());
  }
  EXPECT_EQ(left, Names{"parent"});
  EXPECT_TRUE(open_chain(2)) << "the parent is not ours to remove";
}

}  // namespace
}  // namespace phos::image_test
