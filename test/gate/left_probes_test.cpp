// SPDX-License-Identifier: GPL-2.0-only
// Breakpoints that a dump has left in libcuda's code go, and nothing else changes.
#include "gpu-tracker/gate/left_probes.h"

#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"

namespace gate_test {
namespace {

constexpr char kBreakpoint = '\xcc';

std::string contents(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

// Where a function of this process is in its file, by the kernel's word.
uint64_t file_offset(const void* function) {
  const auto at = reinterpret_cast<uint64_t>(function);
  auto maps = phos::read_proc_maps(getpid());
  for (const phos::ProcMapping& m : maps ? *maps : std::vector<phos::ProcMapping>()) {
    if (at >= m.start && at < m.end) return m.offset + at - m.start;
  }
  return 0;
}

// A process that does nothing, but has files mapped as libraries are.
class LeftProbesTest : public testing::Test {
 protected:
  struct Library {
    std::string file;
    uint64_t size = 0, at = 0;
  };

  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root";
    ASSERT_NE(mkdtemp(directory_), nullptr);
    Dl_info info;
    ASSERT_NE(dladdr(reinterpret_cast<void*>(&cuInit), &info), 0);
    library_ = contents(info.dli_fname);
    for (const char* name :
         {"cuMemAlloc_v2", "cuMemFree_v2", "cuMemcpyHtoD_v2", "cuStreamCreate"}) {
      const uint64_t offset = file_offset(dlsym(RTLD_DEFAULT, name));
      ASSERT_NE(offset, 0u) << name;
      if (library_[offset] == 0x55) entries_.push_back(offset);  // push %rbp
    }
    ASSERT_GE(entries_.size(), 2u) << "nothing to probe";
  }
  void TearDown() override {
    end();
    for (const Library& l : libraries_) munmap(reinterpret_cast<void*>(l.at), l.size);
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
  void end() {
    if (child_ <= 0) return;
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
    child_ = -1;
  }

  void add(const std::string& name, const std::string& bytes) {
    const std::string path = std::string(directory_) + "/" + name;
    std::ofstream(path, std::ios::binary) << bytes;
    const phos::UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
    void* at = mmap(nullptr, bytes.size(), PROT_READ | PROT_EXEC, MAP_PRIVATE, fd.get(), 0);
    ASSERT_NE(at, MAP_FAILED);
    libraries_.push_back({bytes, bytes.size(), reinterpret_cast<uint64_t>(at)});
  }
  void start() {
    child_ = fork();
    ASSERT_GE(child_, 0);
    if (child_ == 0) {
      for (;;) pause();
    }
    memory_.reset(open(("/proc/" + std::to_string(child_) + "/mem").c_str(), O_RDWR | O_CLOEXEC));
    ASSERT_TRUE(memory_);
  }
  void leave_breakpoint(const Library& l, uint64_t offset) {
    ASSERT_EQ(pwrite(memory_.get(), &kBreakpoint, 1, static_cast<off_t>(l.at + offset)), 1);
  }
  std::string in_memory(const Library& l) {
    std::string bytes(l.size, '\0');
    EXPECT_EQ(pread(memory_.get(), bytes.data(), l.size, static_cast<off_t>(l.at)),
              static_cast<ssize_t>(l.size));
    return bytes;
  }

  char directory_[32] = "/tmp/phos-probes-XXXXXX";
  std::string library_;
  std::vector<uint64_t> entries_;  // in the file
  std::vector<Library> libraries_;
  pid_t child_ = -1;
  phos::UniqueFd memory_;
};

TEST_F(LeftProbesTest, OnlyWhatTheFileHasNot) {
  std::string file = library_;
  file[entries_[0]] = kBreakpoint;  // of its own
  ASSERT_NO_FATAL_FAILURE(add("libcuda.so.1", file));
  ASSERT_NO_FATAL_FAILURE(start());
  const Library& l = libraries_[0];
  for (const uint64_t offset : entries_) ASSERT_NO_FATAL_FAILURE(leave_breakpoint(l, offset));
  ASSERT_NO_FATAL_FAILURE(leave_breakpoint(l, entries_[1] + 1));  // no place for a probe
  auto removed = phos::remove_left_probes(child_);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(*removed, entries_.size() - 1);
  file[entries_[1] + 1] = kBreakpoint;
  EXPECT_TRUE(in_memory(l) == file);
}

// One has been mapped after the gate had closed; and what is no library at all.
TEST_F(LeftProbesTest, InEveryLibraryOfThatName) {
  ASSERT_NO_FATAL_FAILURE(add("libcuda.so.1", library_));
  ASSERT_NO_FATAL_FAILURE(add("libcuda.so.txt", std::string(4096, 'x')));
  ASSERT_NO_FATAL_FAILURE(add("libcuda.so.2", library_));
  ASSERT_NO_FATAL_FAILURE(start());
  for (const uint64_t offset : entries_) {
    ASSERT_NO_FATAL_FAILURE(leave_breakpoint(libraries_[0], offset));
  }
  ASSERT_NO_FATAL_FAILURE(leave_breakpoint(libraries_[2], entries_[0]));
  auto removed = phos::remove_left_probes(child_);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(*removed, entries_.size() + 1);
  for (const Library& l : libraries_) EXPECT_TRUE(in_memory(l) == l.file);
}

TEST_F(LeftProbesTest, ProcessWithoutLibcudaOrThatHasEnded) {
  child_ = fork();
  ASSERT_GE(child_, 0);
  if (child_ == 0) {
    execl("/bin/sleep", "sleep", "60", nullptr);
    _exit(1);
  }
  auto is_sleep = [&] {
    auto status = phos::read_proc_status(child_);
    return status && status->comm == "sleep";
  };
  while (!is_sleep()) usleep(1000);
  auto removed = phos::remove_left_probes(child_);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(*removed, 0u);
  const pid_t pid = child_;
  kill(pid, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOWAIT), 0);
  removed = phos::remove_left_probes(pid);  // a zombie
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(*removed, 0u);
  end();
  removed = phos::remove_left_probes(pid);
  ASSERT_TRUE(removed) << removed.error().message();
  EXPECT_EQ(*removed, 0u);
}

}  // namespace
}  // namespace gate_test
