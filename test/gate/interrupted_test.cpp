// SPDX-License-Identifier: GPL-2.0-only
// System calls in which a thread waits while it is kept stopped: they go on afterwards as if
// nothing had been, and none fails with EINTR that no signal has interrupted.
#include <linux/aio_abi.h>
#include <poll.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>

#include "gpu-tracker/gate/held_threads.h"
#include "test/gate/fixture.h"

namespace gate_test {
namespace {

using std::chrono::steady_clock;

// What a child waits at: a socket, the other end of which is the test's.
struct Ends {
  int own = -1, other = -1;
};

// Each returns what the call does; errno is the child's answer if that is negative.
long wait_epoll(int fd, int timeout) {
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event = {};
  event.events = EPOLLIN;
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  return epoll_wait(epoll, &event, 1, timeout);
}
long call_epoll_wait(int fd) {
  return wait_epoll(fd, -1);
}
long call_epoll_wait_for_a_minute(int fd) {
  return wait_epoll(fd, 60000);
}
long call_epoll_pwait(int fd) {
  const int epoll = epoll_create1(EPOLL_CLOEXEC);
  epoll_event event = {};
  event.events = EPOLLIN;
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
  sigset_t all;
  sigfillset(&all);
  return epoll_pwait(epoll, &event, 1, -1, &all);
}
long call_sigwaitinfo(int) {
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, SIGUSR1);
  return sigwaitinfo(&one, nullptr);
}
long call_sigtimedwait(int) {
  sigset_t one;
  sigemptyset(&one);
  sigaddset(&one, SIGUSR1);
  const timespec minute = {60, 0};
  return sigtimedwait(&one, nullptr, &minute);
}
void limit_to_a_minute(int fd) {
  const timeval minute = {60, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &minute, sizeof minute);
}
long call_recv(int fd) {
  char byte;
  limit_to_a_minute(fd);
  return recv(fd, &byte, 1, 0);
}
long call_recvmsg(int fd) {
  char byte;
  iovec to = {&byte, 1};
  msghdr message = {};
  message.msg_iov = &to;
  message.msg_iovlen = 1;
  limit_to_a_minute(fd);
  return recvmsg(fd, &message, 0);
}
long call_recvmmsg(int fd) {
  char byte;
  iovec to = {&byte, 1};
  mmsghdr message = {};
  message.msg_hdr.msg_iov = &to;
  message.msg_hdr.msg_iovlen = 1;
  limit_to_a_minute(fd);
  return recvmmsg(fd, &message, 1, 0, nullptr);
}
long call_read_of_a_socket(int fd) {
  char byte;
  limit_to_a_minute(fd);
  return read(fd, &byte, 1);
}
long call_read(int fd) {
  char byte;
  return read(fd, &byte, 1);
}
long call_poll(int fd) {
  pollfd p = {fd, POLLIN, 0};
  return poll(&p, 1, -1);
}
long call_select(int fd) {
  fd_set set;
  FD_ZERO(&set);
  FD_SET(fd, &set);
  timeval minute = {60, 0};
  return select(fd + 1, &set, nullptr, nullptr, &minute);
}
long call_nanosleep(int) {
  const timespec time = {1, 0};
  return nanosleep(&time, nullptr);
}
long call_clock_nanosleep(int) {
  const timespec time = {1, 0};
  errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &time, nullptr);
  return errno ? -1 : 0;
}
long call_io_getevents(int) {
  aio_context_t context = 0;
  io_event event;
  timespec time = {1, 0};
  if (syscall(SYS_io_setup, 1, &context)) return -1;
  return syscall(SYS_io_getevents, context, 1, 1, &event, &time);
}

struct Call {
  const char* name;
  long number;
  long (*make)(int fd);
  long expected;
};
constexpr Call kCalls[] = {
    {"EpollWait", SYS_epoll_wait, call_epoll_wait, 1},
    {"EpollWaitForAMinute", SYS_epoll_wait, call_epoll_wait_for_a_minute, 1},
    {"EpollPwait", SYS_epoll_pwait, call_epoll_pwait, 1},
    {"Sigwaitinfo", SYS_rt_sigtimedwait, call_sigwaitinfo, SIGUSR1},
    {"Sigtimedwait", SYS_rt_sigtimedwait, call_sigtimedwait, SIGUSR1},
    {"Recv", SYS_recvfrom, call_recv, 1},
    {"Recvmsg", SYS_recvmsg, call_recvmsg, 1},
    {"Recvmmsg", SYS_recvmmsg, call_recvmmsg, 1},
    {"ReadOfASocket", SYS_read, call_read_of_a_socket, 1},
    {"Read", SYS_read, call_read, 1},
    {"Poll", SYS_poll, call_poll, 1},
    {"Select", SYS_pselect6, call_select, 1},
    {"Nanosleep", SYS_clock_nanosleep, call_nanosleep, 0},
    {"ClockNanosleep", SYS_clock_nanosleep, call_clock_nanosleep, 0},
    {"IoGetevents", SYS_io_getevents, call_io_getevents, 0},
};

struct Answer {
  long result;
  int error;
  bool done;
};

// A child that makes one such call.
class Waiting {
 public:
  Waiting(const Call& call, bool block_signals) : call_(call) {
    answer_ = static_cast<Answer*>(
        mmap(nullptr, sizeof(Answer), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    int pair[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    ends_ = {pair[0], pair[1]};
    pid_ = fork();
    if (pid_) return;
    if (block_signals) {
      sigset_t all;
      sigfillset(&all);
      sigprocmask(SIG_SETMASK, &all, nullptr);
    }
    errno = 0;
    answer_->result = call_.make(ends_.own);
    answer_->error = errno;
    answer_->done = true;
    _exit(0);
  }
  ~Waiting() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, __WALL);
    close(ends_.own);
    close(ends_.other);
    munmap(answer_, sizeof *answer_);
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

  pid_t pid() const { return pid_; }
  bool sleeps_in_it() const {
    const auto sleep = phos::find_asleep(pid_, pid_);
    return sleep && (sleep->number == call_.number || sleep->number == SYS_restart_syscall);
  }
  // What it waits for happens.
  void wake() const {
    kill(pid_, SIGUSR1);
    EXPECT_EQ(write(ends_.other, "x", 1), 1);
  }
  // The child's answer, once it has ended.
  Answer answer() {
    EXPECT_TRUE(eventually([&] { return __atomic_load_n(&answer_->done, __ATOMIC_ACQUIRE); }));
    return *answer_;
  }

 private:
  const Call& call_;
  Ends ends_;
  pid_t pid_ = -1;
  Answer* answer_ = nullptr;
};

class InterruptedCall : public testing::TestWithParam<Call> {
 protected:
  static bool hold(phos::HeldThreads* held, pid_t pid, milliseconds time) {
    auto threads = phos::list_threads(pid);
    return threads && held->hold(pid, *threads, steady_clock::now() + time);
  }
};

TEST_P(InterruptedCall, GoesOn) {
  Waiting child(GetParam(), true);
  ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); }));
  phos::HeldThreads held;
  for (int i = 0; i < 20; i++) {
    ASSERT_TRUE(hold(&held, child.pid(), milliseconds(5000))) << i;
    held.let_go();
    ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); })) << i;
  }
  child.wake();
  const Answer answer = child.answer();
  EXPECT_EQ(answer.result, GetParam().expected) << strerror(answer.error);
}

// What it waits for happens while it is stopped.
TEST_P(InterruptedCall, FindsWhatHasHappened) {
  Waiting child(GetParam(), true);
  ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); }));
  phos::HeldThreads held;
  ASSERT_TRUE(hold(&held, child.pid(), milliseconds(5000)));
  child.wake();
  held.let_go();
  const Answer answer = child.answer();
  EXPECT_EQ(answer.result, GetParam().expected) << strerror(answer.error);
}

// It is let go when it has stopped, and no earlier.
TEST_P(InterruptedCall, GoesOnWhenItStopsTooLate) {
  Waiting child(GetParam(), true);
  ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); }));
  phos::HeldThreads held;
  for (int i = 0; i < 20; i++) {
    EXPECT_FALSE(hold(&held, child.pid(), milliseconds(-1)));
    ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); })) << i;
  }
  child.wake();
  const Answer answer = child.answer();
  EXPECT_EQ(answer.result, GetParam().expected) << strerror(answer.error);
}

TEST_P(InterruptedCall, GoesOnAfterALook) {
  Waiting child(GetParam(), true);
  ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); }));
  for (int i = 0; i < 20; i++) {
    auto threads = phos::list_threads(child.pid());
    ASSERT_TRUE(threads);
    unsigned looks = 0;
    phos::stop_each(*threads, steady_clock::now() + milliseconds(5000), [&](size_t) { looks++; });
    ASSERT_EQ(looks, 1u);
    ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); })) << i;
  }
  child.wake();
  const Answer answer = child.answer();
  EXPECT_EQ(answer.result, GetParam().expected) << strerror(answer.error);
}

INSTANTIATE_TEST_SUITE_P(Each, InterruptedCall, testing::ValuesIn(kCalls),
                         [](const auto& info) { return std::string(info.param.name); });

// A signal of the application's, which has a handler, interrupts what it always did.
TEST(InterruptedBySignal, Fails) {
  struct sigaction before = {}, action = {};
  action.sa_handler = [](int) {};
  ASSERT_EQ(sigaction(SIGUSR1, &action, &before), 0);
  Waiting child(kCalls[0], false);
  ASSERT_EQ(sigaction(SIGUSR1, &before, nullptr), 0);
  ASSERT_TRUE(eventually([&] { return child.sleeps_in_it(); }));
  auto threads = phos::list_threads(child.pid());
  ASSERT_TRUE(threads);
  phos::HeldThreads held;
  ASSERT_TRUE(held.hold(child.pid(), *threads, steady_clock::now() + milliseconds(5000)));
  kill(child.pid(), SIGUSR1);
  held.let_go();
  const Answer answer = child.answer();
  EXPECT_EQ(answer.result, -1);
  EXPECT_EQ(answer.error, EINTR);
}

// As the gate does it, to a thread that has all signals blocked.
TEST_F(GateTest, ThreadThatWaitsWithSignalsBlockedIsNotInterrupted) {
  ASSERT_EQ(target_.ask("start memset 2"), "ok");
  ASSERT_EQ(target_.ask("start-blocked epoll"), "ok");
  for (int i = 0; i < 10; i++) {
    ASSERT_NO_FATAL_FAILURE(close_gate());
    ASSERT_TRUE(wait_parked(2));
    phos::Result<void> quiet;
    ASSERT_TRUE(eventually([&] { return static_cast<bool>(quiet = gate_->check_quiet()); }))
        << quiet.error().message();
    EXPECT_TRUE(status().blocked_threads.empty());
    ASSERT_TRUE(gate_->open());
    gate_.reset();
  }
  expect_works();
}

}  // namespace
}  // namespace gate_test
