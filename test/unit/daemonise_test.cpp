// SPDX-License-Identifier: GPL-2.0-only
// How phosd leaves the control groups of whoever started it. (That it leaves everything else behind
// is tested with a running phosd in test/criu/test_daemon.py.)
#include "gpu-tracker/daemon/daemonise.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace phos {
namespace {

TEST(CgroupTest, RootsAreFoundInMountinfo) {
  std::istringstream mountinfo(
      "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
      "31 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
      "32 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
      "33 22 0:28 /docker/abc /sys/fs/cgroup/pids rw master:2 propagate_from:1 - cgroup cgroup rw\n"
      "34 22 0:29 / /cgroup rw - tmpfs cgroup rw\n"
      "35 22 0:30 / /x rw - cgroupfs cgroup rw\n");
  EXPECT_EQ(cgroup_roots(mountinfo),
            (std::vector<std::string>{"/sys/fs/cgroup", "/sys/fs/cgroup/memory"}));
}

TEST(CgroupTest, MovesItselfWhereItMay) {
  char dir[] = "/tmp/phos-cgroup-XXXXXX";
  ASSERT_NE(mkdtemp(dir), nullptr);
  const std::string procs = std::string(dir) + "/cgroup.procs";
  std::ofstream(procs).close();
  leave_cgroups({"/nonexistent", dir});
  std::ifstream in(procs);
  std::string text;
  std::getline(in, text);
  EXPECT_EQ(text, "0");  // cgroups(7): the writer itself
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace phos
