// SPDX-License-Identifier: GPL-2.0-only
// Whose directories images are taken from, and where a link `parent` may lead.
#include <sys/stat.h>

#include "test/image/examine.h"
#include "test/unit/image_chain_fixture.h"

namespace phos::image_test {
namespace {

// Two dumps of one page, the second with a page in the first.
class ImageTrust : public ChainTest {
 protected:
  ImageTrust() {
    Memory memory{0, Bytes(2 * kPage, 'a')};
    dump(1, {{0x1000000, memory}});
    memory.bytes[0] = 'b';
    dump(2, {{0x1000000, memory}});
    EXPECT_EQ(refusal(), "");
  }
  std::string refusal() {
    const Examination examined = examine(fd(2));
    EXPECT_EQ(examined.wrong, "");
    code_ = static_cast<ImageError>(examined.refusal_code);
    return examined.refusal;
  }
  void relink(const std::string& target) {
    unlink(path(2, "parent").c_str());
    ASSERT_EQ(symlink(target.c_str(), path(2, "parent").c_str()), 0) << strerror(errno);
  }
  void set_mode(uint8_t level, mode_t mode) { ASSERT_EQ(chmod(path(level).c_str(), mode), 0); }

  ImageError code_{};  // of the last refusal
};

TEST_F(ImageTrust, LinksThatLeadBackOrNowhere) {
  // To the directory itself, by every name it has: no dump is its own parent.
  for (const char* target : {".", "./.", "./././.", "../2", "../1/../2", "../../../../../../.."}) {
    relink(target);
    EXPECT_NE(refusal(), "") << target;
  }
  relink("../2");
  EXPECT_NE(refusal().find("holds dump " + format_dump_id(dump_id(2))), std::string::npos);
  // Through more directories than there are, and through links that never end.
  relink("../1/../2/../1/../2/../1");
  EXPECT_EQ(refusal(), "");
  relink("parent/parent");
  EXPECT_NE(refusal().find("cannot be followed"), std::string::npos);
  ASSERT_EQ(symlink("back", dir_.path("forth").c_str()), 0);
  ASSERT_EQ(symlink("forth", dir_.path("back").c_str()), 0);
  relink("../forth");
  EXPECT_NE(refusal().find("cannot be followed"), std::string::npos);
}

// Links have no NUL, Linux sees to that; any other byte may be in them.
TEST_F(ImageTrust, LinksWithHostileNames) {
  relink("../no\nsuch\033[2Jdirectory\xff");
  EXPECT_NE(refusal().find("../no?such?[2Jdirectory?"), std::string::npos) << refusal();
  ASSERT_EQ(rename(path(1).c_str(), dir_.path("1\n\033[2J").c_str()), 0);
  relink("../1\n\033[2J");
  EXPECT_EQ(refusal(), "");
  ASSERT_EQ(unlink((dir_.path("1\n\033[2J") + "/phos-7.img").c_str()), 0);
  EXPECT_NE(refusal().find("does not exist"), std::string::npos);
  // As long as a link can be.
  relink(std::string(4095, 'x'));
  EXPECT_NE(refusal().find("File name too long"), std::string::npos) << refusal();
}

TEST_F(ImageTrust, LongDetourIsFollowed) {
  std::string detour;
  while (detour.size() + 10 < 4095) detour += "./";
  relink(detour + "../1");
  EXPECT_EQ(refusal(), "");
}

TEST_F(ImageTrust, ParentThatIsNoDirectory) {
  const std::string parent = path(2, "parent");
  ASSERT_EQ(unlink(parent.c_str()), 0);
  ASSERT_EQ(mkfifo(parent.c_str(), 0600), 0);  // opening it must not wait for a writer
  EXPECT_NE(refusal().find("cannot be followed"), std::string::npos);
  ASSERT_EQ(unlink(parent.c_str()), 0);
  write_bytes(parent, {'x'});
  EXPECT_NE(refusal().find("cannot be followed"), std::string::npos);
  relink("../../../../../../../../../../../dev/null");
  EXPECT_NE(refusal().find("cannot be followed"), std::string::npos);
}

// A directory in which others may rename files can be given older images of root's, and other files
// of CRIU's. Not one with the sticky bit, and never its owner's fault.
TEST_F(ImageTrust, DirectoriesThatOthersCanChange) {
  for (uint8_t level : {1, 2}) {
    for (mode_t mode : {0720u, 0702u, 0777u, 02775u, 0770u}) {
      set_mode(level, mode);
      EXPECT_NE(refusal().find("run: chmod go-w " + path(level)), std::string::npos)
          << refusal() << std::oct << mode;
      EXPECT_EQ(code_, ImageError::kUntrusted);
      EXPECT_EQ(image_error_of(PreviousPages::open(fd(2), 7)), ImageError::kUntrusted);
      // Memory that was taken away is brought back even so.
      EXPECT_TRUE(open_chain(2));
      EXPECT_EQ(image_error_of(check_image_directory(fd(level))), ImageError::kUntrusted);
    }
    for (mode_t mode : {0700u, 0755u, 01777u, 01770u, 0500u}) {
      set_mode(level, mode);
      EXPECT_EQ(refusal(), "") << std::oct << mode;
      EXPECT_TRUE(check_image_directory(fd(level)));
    }
    set_mode(level, 0700);
  }
}

// CRIU alone does not care, and without images of ours neither do we.
TEST_F(ImageTrust, DirectoryWithoutImagesMayHaveAnyMode) {
  ASSERT_TRUE(remove_all_images(fd(2)));
  set_mode(2, 0777);
  EXPECT_EQ(refusal(), "");
  ASSERT_TRUE(write_files_image(fd(2), {dump_id(2), {{7, "/dev/nvidiactl", 2}}}));
  EXPECT_NE(refusal().find("chmod go-w"), std::string::npos);
}

TEST_F(ImageTrust, DirectoryMayBelongToAnybody) {
  if (geteuid() != 0) GTEST_SKIP() << "giving a directory away needs root";
  for (uint8_t level : {1, 2}) ASSERT_EQ(chown(path(level).c_str(), 12345, 12345), 0);
  EXPECT_EQ(refusal(), "");
  // But what its owner puts there himself is not taken.
  for (const char* name : {"phos-7.img", "phos-pages-7-0.img"}) {
    for (uint8_t level : {1, 2}) {
      ASSERT_EQ(chown(path(level, name).c_str(), 12345, 12345), 0);
      EXPECT_NE(refusal().find(path(level, name) + " belongs to user 12345"), std::string::npos);
      EXPECT_EQ(code_, ImageError::kUntrusted);
      ASSERT_EQ(chown(path(level, name).c_str(), 0, 0), 0);
    }
  }
}

TEST_F(ImageTrust, FilesThatOthersCanChange) {
  for (const char* name : {"phos-7.img", "phos-pages-7-0.img"}) {
    for (uint8_t level : {1, 2}) {
      for (mode_t mode : {0620u, 0602u}) {
        ASSERT_EQ(chmod(path(level, name).c_str(), mode), 0);
        EXPECT_NE(refusal().find("run: chmod go-w " + path(level, name)), std::string::npos);
        EXPECT_EQ(code_, ImageError::kUntrusted);
      }
      ASSERT_EQ(chmod(path(level, name).c_str(), 0444), 0);
      EXPECT_EQ(refusal(), "");
    }
  }
}

}  // namespace
}  // namespace phos::image_test
