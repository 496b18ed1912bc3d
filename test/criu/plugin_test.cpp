// SPDX-License-Identifier: GPL-2.0-only
// The plugin file as CRIU 4.0 would load it: that release exports none of the symbols the plugin
// holds for optional, and refuses a plugin that announces more hooks than it knows.
#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>

extern "C" {
#include "criu-plugin.h"

// What criu itself exports (this program is linked with -rdynamic).
static std::string g_criu_log;
__attribute__((visibility("default"))) void print_on_level(unsigned int, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  g_criu_log += text;
}
__attribute__((visibility("default"))) int criu_get_image_dir(void) {
  static int fd = open("/tmp", O_RDONLY | O_DIRECTORY);
  return fd;
}
}

namespace {

// CR_PLUGIN_HOOK__MAX of CRIU 4.0 and 4.1.
constexpr unsigned kHooksOfCriu40 = 12;

std::string plugin_path() {
  char self[PATH_MAX];
  ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  std::string path(self, n > 0 ? static_cast<size_t>(n) : 0);
  for (int i = 0; i < 2; i++) path.resize(path.rfind('/'));
  return path + "/lib/criu/phos_plugin.so";
}

class Plugin : public testing::Test {
 protected:
  void SetUp() override {
    handle_ = dlopen(plugin_path().c_str(), RTLD_LAZY);
    ASSERT_NE(handle_, nullptr) << dlerror();
    desc_ = static_cast<cr_plugin_desc_t*>(dlsym(handle_, "CR_PLUGIN_DESC"));
    ASSERT_NE(desc_, nullptr);
    g_criu_log.clear();
    setenv("PHOS_SIMULATED_GPU", "1", 1);
  }
  void TearDown() override {
    if (handle_) dlclose(handle_);
  }
  template <typename Hook>
  Hook* hook(int number) {
    return reinterpret_cast<Hook*>(desc_->hooks[number]);
  }
  void* handle_ = nullptr;
  cr_plugin_desc_t* desc_ = nullptr;
};

TEST_F(Plugin, AnnouncesWhatCriu40Accepts) {
  EXPECT_STREQ(desc_->name, "phos");
  EXPECT_EQ(desc_->version, 0x000200u);
  EXPECT_EQ(desc_->max_hooks, kHooksOfCriu40);
}

TEST_F(Plugin, HasTheHooksOfADeviceAndNoOthers) {
  std::set<unsigned> set;
  for (unsigned i = 0; i < desc_->max_hooks; i++) {
    if (desc_->hooks[i]) set.insert(i);
  }
  EXPECT_EQ(set,
            (std::set<unsigned>{CR_PLUGIN_HOOK__DUMP_EXT_FILE, CR_PLUGIN_HOOK__RESTORE_EXT_FILE,
                                CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA, CR_PLUGIN_HOOK__UPDATE_VMA_MAP,
                                CR_PLUGIN_HOOK__RESUME_DEVICES_LATE, CR_PLUGIN_HOOK__PAUSE_DEVICES,
                                CR_PLUGIN_HOOK__CHECKPOINT_DEVICES}));
}

TEST_F(Plugin, DeclinesProcessesWithoutCudaQuietly) {
  ASSERT_EQ(desc_->init(CR_PLUGIN_STAGE__DUMP), 0);
  pid_t child = fork();
  if (child == 0) {
    for (;;) pause();
  }
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__PAUSE_DEVICES_t>(CR_PLUGIN_HOOK__PAUSE_DEVICES)(child), -ENOTSUP);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__CHECKPOINT_DEVICES_t>(CR_PLUGIN_HOOK__CHECKPOINT_DEVICES)(child),
            -ENOTSUP);
  desc_->exit(CR_PLUGIN_STAGE__DUMP, 0);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  EXPECT_EQ(g_criu_log, "");
}

TEST_F(Plugin, DeclinesFilesThatAreNotNvidias) {
  ASSERT_EQ(desc_->init(CR_PLUGIN_STAGE__DUMP), 0);
  int null = open("/dev/null", O_RDWR);
  struct stat st;
  ASSERT_EQ(fstat(null, &st), 0);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__DUMP_EXT_FILE_t>(CR_PLUGIN_HOOK__DUMP_EXT_FILE)(null, 1),
            -ENOTSUP);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA_t>(CR_PLUGIN_HOOK__HANDLE_DEVICE_VMA)(null, &st),
            -ENOTSUP);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__RESTORE_EXT_FILE_t>(CR_PLUGIN_HOOK__RESTORE_EXT_FILE)(1),
            -ENOTSUP);
  close(null);
  desc_->exit(CR_PLUGIN_STAGE__DUMP, 0);
}

TEST_F(Plugin, DoesNothingInAPreDump) {
  ASSERT_EQ(desc_->init(CR_PLUGIN_STAGE__PRE_DUMP), 0);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__PAUSE_DEVICES_t>(CR_PLUGIN_HOOK__PAUSE_DEVICES)(getpid()),
            -ENOTSUP);
}

TEST_F(Plugin, MissingPhosdIsNamedWithTheRemedy) {
  ASSERT_EQ(desc_->init(CR_PLUGIN_STAGE__DUMP), 0);
  // A thread with the name of CUDA's restore thread makes a process look like one that uses CUDA.
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  pid_t child = fork();
  if (child == 0) {
    int comm = open("/proc/self/comm", O_WRONLY);
    bool named = write(comm, "cuda00001400006", 15) == 15;
    if (write(ready[1], named ? "1" : "0", 1) != 1) _exit(1);
    for (;;) pause();
  }
  char named = '0';
  ASSERT_EQ(read(ready[0], &named, 1), 1);
  ASSERT_EQ(named, '1');
  setenv("PHOS_PHOSD", "/nonexistent/phosd", 1);
  EXPECT_EQ(hook<CR_PLUGIN_HOOK__PAUSE_DEVICES_t>(CR_PLUGIN_HOOK__PAUSE_DEVICES)(child), -1);
  unsetenv("PHOS_PHOSD");
  EXPECT_NE(g_criu_log.find("/nonexistent/phosd"), std::string::npos) << g_criu_log;
  EXPECT_NE(g_criu_log.find("PHOS_PHOSD"), std::string::npos);
  desc_->exit(CR_PLUGIN_STAGE__DUMP, -1);
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(ready[0]);
  close(ready[1]);
}

}  // namespace
