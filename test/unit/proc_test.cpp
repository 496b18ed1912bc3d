// SPDX-License-Identifier: GPL-2.0-only
// /proc parsing, against this process and children made for the purpose.
#include "gpu-tracker/base/proc.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <sstream>

#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

// A child that runs `setup`, reports it done, and then sleeps until it is killed.
class Child {
 public:
  explicit Child(const std::function<void()>& setup, unsigned long clone_flags = 0) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) return;
    UniqueFd ready(ends[0]), report(ends[1]);
    pid_ = static_cast<int>(syscall(SYS_clone, clone_flags | SIGCHLD, 0, 0, 0, 0));
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      setup();
      if (write(report.get(), "", 1) != 1) _exit(1);
      for (;;) pause();
    }
    errno_ = errno;
    report.reset();
    char byte;
    ready_ = pid_ > 0 && read(ready.get(), &byte, 1) == 1;
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  ~Child() { reap(); }

  void reap() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }
  int pid() const { return pid_; }
  bool ready() const { return ready_; }
  int error() const { return errno_; }

 private:
  int pid_ = -1;
  int errno_ = 0;
  bool ready_ = false;
};

uint64_t boot_ticks() {
  timespec now;
  clock_gettime(CLOCK_BOOTTIME, &now);
  uint64_t per_second = static_cast<uint64_t>(sysconf(_SC_CLK_TCK));
  return static_cast<uint64_t>(now.tv_sec) * per_second +
         static_cast<uint64_t>(now.tv_nsec) * per_second / 1'000'000'000;
}

const ProcMapping* find_mapping(const std::vector<ProcMapping>& maps, const void* address) {
  auto at = std::find_if(maps.begin(), maps.end(), [&](const ProcMapping& m) {
    return m.start == reinterpret_cast<uint64_t>(address);
  });
  return at == maps.end() ? nullptr : &*at;
}

TEST(Proc, StatusOfThisProcess) {
  auto status = read_proc_status(getpid());
  ASSERT_TRUE(status) << status.error().message();
  char comm[16] = {};
  prctl(PR_GET_NAME, comm);
  EXPECT_EQ(status->comm, comm);
  EXPECT_EQ(status->tgid, getpid());
  EXPECT_EQ(status->uid, getuid());
  EXPECT_EQ(status->state, 'R');  // it is the one that reads
}

TEST(Proc, StatusOfAThreadNamesItsProcess) {
  auto status = read_proc_status(static_cast<int>(syscall(SYS_gettid)));
  ASSERT_TRUE(status);
  EXPECT_EQ(status->tgid, getpid());
}

TEST(Proc, OddCommandName) {
  for (const char* name : {"a) (b c", ") R 1 2 3 (", "Tgid: 5", ":)", "x"}) {
    uint64_t before = boot_ticks();
    Child child([&] { prctl(PR_SET_NAME, name); });
    uint64_t after = boot_ticks();
    ASSERT_TRUE(child.ready());
    auto status = read_proc_status(child.pid());
    ASSERT_TRUE(status) << status.error().message();
    EXPECT_EQ(status->tgid, child.pid()) << name;
    EXPECT_EQ(status->comm, name);

    auto start = read_start_time(child.pid());
    ASSERT_TRUE(start) << start.error().message();
    EXPECT_GE(*start + 1, before) << name;
    EXPECT_LE(*start, after + 1) << name;

    // Field 22, counted from behind the name, whose length is known here.
    std::ifstream in("/proc/" + std::to_string(child.pid()) + "/stat");
    std::string stat(std::istreambuf_iterator<char>(in), {});
    std::string prefix = std::to_string(child.pid()) + " (" + name + ") ";
    ASSERT_EQ(stat.substr(0, prefix.size()), prefix);
    std::istringstream fields(stat.substr(prefix.size()));
    std::string field;
    for (int number = 3; number <= 22; number++) fields >> field;
    EXPECT_EQ(std::to_string(*start), field) << name;
  }
}

TEST(Proc, StoppedTracedAndZombieStates) {
  Child child([] {});
  ASSERT_TRUE(child.ready());
  ASSERT_EQ(read_proc_status(child.pid())->tracer_pid, 0);
  ASSERT_EQ(kill(child.pid(), SIGSTOP), 0);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child.pid()), &info, WSTOPPED | WNOWAIT), 0);
  EXPECT_EQ(read_proc_status(child.pid())->state, 'T');

  if (ptrace(PTRACE_SEIZE, child.pid(), nullptr, nullptr) == 0) {
    EXPECT_EQ(read_proc_status(child.pid())->tracer_pid, getpid());
  }
  ASSERT_EQ(kill(child.pid(), SIGKILL), 0);
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child.pid()), &info, WEXITED | WNOWAIT), 0);
  EXPECT_EQ(read_proc_status(child.pid())->state, 'Z');
}

TEST(Proc, SeccompMode) {
  Child child([] {
    sock_filter allow[] = {BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    sock_fprog program = {1, allow};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) _exit(1);
  });
  if (!child.ready()) GTEST_SKIP() << "no seccomp filters on this kernel";
  EXPECT_EQ(read_proc_status(child.pid())->seccomp_mode, 2);
}

TEST(Proc, PidInTheInnermostNamespace) {
  Child child([] {}, CLONE_NEWPID);
  if (child.pid() < 0) {
    GTEST_SKIP() << "cannot make a pid namespace: " << strerror(child.error());
  }
  ASSERT_TRUE(child.ready());
  EXPECT_EQ(read_proc_status(child.pid())->vpid, 1);
  EXPECT_NE(child.pid(), 1);

  Child plain([] {});
  ASSERT_TRUE(plain.ready());
  // The whole test may run in a namespace of its own, as in a container: its own view counts.
  EXPECT_EQ(read_proc_status(plain.pid())->vpid, plain.pid());
}

TEST(Proc, MappingsOfThisProcess) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  // Fenced, so that the kernel cannot merge them with a neighbour.
  char* base =
      static_cast<char*>(mmap(nullptr, 5 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(base, MAP_FAILED);
  ASSERT_EQ(mprotect(base + page, page, PROT_READ | PROT_WRITE), 0);
  UniqueFd file(memfd_create("a b) c", MFD_CLOEXEC));
  ASSERT_EQ(ftruncate(file.get(), static_cast<off_t>(3 * page)), 0);
  ASSERT_NE(mmap(base + 3 * page, page, PROT_READ, MAP_SHARED | MAP_FIXED, file.get(),
                 static_cast<off_t>(2 * page)),
            MAP_FAILED);

  auto maps = read_proc_maps(getpid());
  ASSERT_TRUE(maps) << maps.error().message();
  EXPECT_TRUE(std::is_sorted(maps->begin(), maps->end(),
                             [](const auto& a, const auto& b) { return a.start < b.start; }));
  const ProcMapping* anonymous = find_mapping(*maps, base + page);
  ASSERT_NE(anonymous, nullptr);
  EXPECT_EQ(anonymous->end, reinterpret_cast<uint64_t>(base + 2 * page));
  EXPECT_STREQ(anonymous->perms, "rw-p");
  EXPECT_EQ(anonymous->path, "");
  const ProcMapping* mapped = find_mapping(*maps, base + 3 * page);
  ASSERT_NE(mapped, nullptr);
  EXPECT_EQ(mapped->end, reinterpret_cast<uint64_t>(base + 4 * page));
  EXPECT_EQ(mapped->offset, 2 * page);
  EXPECT_STREQ(mapped->perms, "r--s");
  EXPECT_EQ(mapped->path, "/memfd:a b) c (deleted)");
  munmap(base, 5 * page);
}

// Reading it fails, as of a task that has ended since its file was opened.
TEST(Proc, TextThatCannotBeReadIsEmpty) {
  EXPECT_EQ(read_proc_text("/proc/sys/kernel/ostype"), "Linux\n");
  EXPECT_GT(read_proc_text("/proc/kallsyms").size(), 4096u);
  EXPECT_EQ(read_proc_text("/proc/self"), "");
  EXPECT_EQ(read_proc_text("/proc/self/no-such-file"), "");
}

TEST(Proc, GoneProcessIsEsrch) {
  Child child([] {});
  ASSERT_TRUE(child.ready());
  int pid = child.pid();
  child.reap();
  EXPECT_EQ(read_proc_status(pid).error().code(), ESRCH);
  EXPECT_EQ(read_start_time(pid).error().code(), ESRCH);
  EXPECT_EQ(read_proc_maps(pid).error().code(), ESRCH);
}

TEST(IsEnding, OnlyOfWhatHasEndedOrIsAboutTo) {
  EXPECT_FALSE(is_ending(getpid()));
  EXPECT_TRUE(is_ending(999999999));
  const pid_t child = fork();
  if (child == 0) pause();
  EXPECT_FALSE(is_ending(child));
  EXPECT_TRUE(any_thread_lives(child));
  kill(child, SIGKILL);
  siginfo_t info;
  ASSERT_EQ(waitid(P_PID, static_cast<id_t>(child), &info, WEXITED | WNOWAIT), 0);
  EXPECT_TRUE(is_ending(child));  // a zombie
  EXPECT_FALSE(any_thread_lives(child));
  waitpid(child, nullptr, 0);
  EXPECT_TRUE(is_ending(child));
}

}  // namespace
}  // namespace phos
