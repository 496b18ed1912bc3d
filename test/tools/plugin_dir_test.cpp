// SPDX-License-Identifier: GPL-2.0-only
// The directory that the front end makes for chosen plugins, also where somebody was there before.

#include "tools/criu/plugin_dir.h"

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>

#include "test/tools/harness.h"

namespace phos::criu {
namespace {

namespace fs = std::filesystem;
using test::list_dir;
using Names = std::vector<std::string>;

class PluginDir : public test::Installation {
 protected:
  void SetUp() override {
    Installation::SetUp();
    touch("plugins/cuda_plugin.so");
    touch("alone/solo_plugin.so");
    touch("alone/notes.txt");
  }

  // What would be made for phos alone, out of the directory that holds cuda too.
  Result<std::string> make() const {
    return plugin_dir_for({{"phos", root("plugins"), "phos_plugin.so"}}, root("state"));
  }

  void expect_phos_only(const std::string& dir) const {
    EXPECT_EQ(list_dir(dir), Names{"phos_plugin.so"});
    EXPECT_EQ(fs::read_symlink(dir + "/phos_plugin.so"), root("plugins/phos_plugin.so"));
  }

  // `make` must not have used root("state").
  void expect_private(const Result<std::string>& dir) const {
    ASSERT_TRUE(dir.ok()) << dir.error().message();
    EXPECT_EQ(dir->find("/tmp/phos-plugins-"), 0u) << *dir;
    expect_phos_only(*dir);
    fs::remove_all(*dir);
  }
};

TEST_F(PluginDir, UsesTheDirectoryThatHoldsNothingElse) {
  auto dir = plugin_dir_for({{"solo", root("alone"), "solo_plugin.so"}}, root("state"));
  ASSERT_TRUE(dir.ok());
  EXPECT_EQ(*dir, root("alone"));
  EXPECT_FALSE(test::exists(root("state")));
}

TEST_F(PluginDir, LinksTheChosenPluginsOnly) {
  umask(077);  // must not matter
  auto dir = make();
  umask(022);
  ASSERT_TRUE(dir.ok()) << dir.error().message();
  EXPECT_EQ(dir->find(root("state/plugins/phos-")), 0u) << *dir;
  expect_phos_only(*dir);
  struct stat st;
  ASSERT_EQ(stat(dir->c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0755u);
  EXPECT_EQ(st.st_uid, geteuid());
}

TEST_F(PluginDir, NamesAreSortedAndOrderDoesNotMatter) {
  Plugin phos = {"phos", root("plugins"), "phos_plugin.so"};
  Plugin solo = {"solo", root("alone"), "solo_plugin.so"};
  auto one = plugin_dir_for({solo, phos}, root("state"));
  auto two = plugin_dir_for({phos, solo}, root("state"));
  ASSERT_TRUE(one.ok() && two.ok());
  EXPECT_EQ(*one, *two);
  EXPECT_EQ(one->find(root("state/plugins/phos+solo-")), 0u) << *one;
  EXPECT_EQ(list_dir(*one), (Names{"phos_plugin.so", "solo_plugin.so"}));
}

TEST_F(PluginDir, SecondTimeChangesNothing) {
  auto one = make();
  ASSERT_TRUE(one.ok());
  struct stat before, after;
  ASSERT_EQ(stat(one->c_str(), &before), 0);
  auto two = make();
  ASSERT_TRUE(two.ok());
  EXPECT_EQ(*one, *two);
  ASSERT_EQ(stat(two->c_str(), &after), 0);
  EXPECT_EQ(before.st_ino, after.st_ino);
  EXPECT_EQ(list_dir(root("state/plugins")).size(), 1u);
}

TEST_F(PluginDir, RepairsADamagedDirectory) {
  auto dir = make();
  ASSERT_TRUE(dir.ok());
  fs::create_symlink("/nowhere", *dir + "/evil.so");
  auto again = make();
  ASSERT_TRUE(again.ok()) << again.error().message();
  EXPECT_EQ(*again, *dir);
  expect_phos_only(*again);
  EXPECT_EQ(list_dir(root("state/plugins")).size(), 1u);
}

TEST_F(PluginDir, DistrustsAStateDirectoryThatOthersMayWrite) {
  fs::create_directory(root("state"));
  ASSERT_EQ(chmod(root("state").c_str(), 0777), 0);
  expect_private(make());
}

TEST_F(PluginDir, DistrustsASymbolicLink) {
  fs::create_directory(root("elsewhere"));
  fs::create_directory_symlink(root("elsewhere"), root("state"));
  expect_private(make());
  EXPECT_TRUE(list_dir(root("elsewhere")).empty());
}

TEST_F(PluginDir, DistrustsAnotherUsersDirectory) {
  if (geteuid() != 0) GTEST_SKIP() << "giving a directory to another user needs root";
  fs::create_directories(root("state/plugins"));
  ASSERT_EQ(chown(root("state/plugins").c_str(), 65534, 65534), 0);
  expect_private(make());
}

TEST_F(PluginDir, ManyAtOnceAgree) {
  std::vector<std::string> dirs(8);
  std::vector<pid_t> children;
  // Processes, not threads: the temporary names carry the pid.
  for (size_t i = 0; i < dirs.size(); i++) {
    pid_t child = fork();
    if (child == 0) {
      auto dir = make();
      bool good = dir && dir->find(root("state/plugins/")) == 0 && list_dir(*dir).size() == 1;
      _exit(good ? 0 : 1);
    }
    children.push_back(child);
  }
  for (pid_t child : children) {
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(list_dir(root("state/plugins")).size(), 1u);
}

}  // namespace
}  // namespace phos::criu
