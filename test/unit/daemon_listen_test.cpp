// SPDX-License-Identifier: GPL-2.0-only
// phosd's socket: who may speak, what a service manager may hand over, and what is replaced.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "gpu-tracker/client/phosd_connect.h"
#include "gpu-tracker/daemon/listen.h"

namespace phos {
namespace {

TEST(PeerTest, RootAndPhosdsOwnUserAreServed) {
  EXPECT_TRUE(check_peer({100, 0, true}, 1000).ok());
  EXPECT_TRUE(check_peer({100, 1000, true}, 1000).ok());
}

TEST(PeerTest, OthersAreRefusedByName) {
  auto r = check_peer({100, 1001, true}, 1000);
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.error().message(), "phosd refuses to serve user 1001; run as root");
  EXPECT_FALSE(check_peer({100, 1001, true}, 0).ok());
}

TEST(PeerTest, RootOfAnotherPidNamespaceIsRefused) {
  auto r = check_peer({0, 0, false}, 0);
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message().find("another pid namespace"), std::string::npos);
}

TEST(PeerTest, IsReadFromTheSocket) {
  int pair[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
  auto peer = read_peer(pair[0]);
  ASSERT_TRUE(peer.ok());
  EXPECT_EQ(peer->pid, getpid());
  EXPECT_EQ(peer->uid, geteuid());
  EXPECT_TRUE(peer->same_pid_namespace);
  close(pair[0]);
  close(pair[1]);
}

class ListenTest : public testing::Test {
 protected:
  ListenTest() {
    char path[] = "/tmp/phos-listen-XXXXXX";
    dir_ = mkdtemp(path);
    config_ = default_config(dir_);
  }
  ~ListenTest() override { std::filesystem::remove_all(dir_); }

  UniqueFd connect() const { return UniqueFd(phosd_connect(config_.socket.c_str())); }
  // A bound and listening socket at config_.socket.
  UniqueFd bound(int type) const {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    strcpy(address.sun_path, config_.socket.c_str());
    UniqueFd fd(socket(AF_UNIX, type, 0));
    EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    EXPECT_EQ(listen(fd.get(), 1), 0);
    return fd;
  }
  // Runs `check` in a child that was handed `fd` as a service manager does; its exit status.
  template <typename Check>
  int activated(int fd, const char* count, bool right_pid, Check&& check) {
    pid_t child = fork();
    if (child == 0) {
      dup2(fd, 3);
      setenv("LISTEN_PID", std::to_string(right_pid ? getpid() : getppid()).c_str(), 1);
      setenv("LISTEN_FDS", count, 1);
      _exit(check());
    }
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  std::string dir_;
  DaemonConfig config_;
};

TEST_F(ListenTest, SocketIsItsOwnersOnly) {
  auto listener = Listener::open(config_);
  ASSERT_TRUE(listener.ok()) << listener.error().message();
  struct stat st;
  ASSERT_EQ(stat(config_.socket.c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0600u);
  EXPECT_FALSE(listener->activated());
  EXPECT_EQ(listener->socket(), config_.socket);
  EXPECT_FALSE(listener->accept()->has_value());
  UniqueFd client = connect();
  EXPECT_TRUE(client);
  EXPECT_TRUE(listener->accept()->has_value());
}

TEST_F(ListenTest, SecondOneFindsTheFirst) {
  auto first = Listener::open(config_);
  ASSERT_TRUE(first.ok());
  auto second = Listener::open(config_);
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.error().code(), EADDRINUSE);
}

TEST_F(ListenTest, SocketOfADeadPhosdIsReplaced) {
  bound(SOCK_SEQPACKET).reset();
  EXPECT_EQ(phosd_connect(config_.socket.c_str()), -ECONNREFUSED);
  auto listener = Listener::open(config_);
  ASSERT_TRUE(listener.ok()) << listener.error().message();
  EXPECT_TRUE(connect());
}

TEST_F(ListenTest, WhatIsNoSocketIsLeftAlone) {
  std::ofstream(config_.socket) << "precious";
  auto listener = Listener::open(config_);
  ASSERT_FALSE(listener.ok());
  EXPECT_NE(listener.error().message().find("it is no socket"), std::string::npos);
  EXPECT_TRUE(std::filesystem::exists(config_.socket));
}

TEST_F(ListenTest, SocketOfAnotherKindIsLeftAlone) {
  UniqueFd stream = bound(SOCK_STREAM);
  EXPECT_FALSE(Listener::open(config_).ok());
  EXPECT_TRUE(std::filesystem::exists(config_.socket));
}

TEST_F(ListenTest, StopKeepsWhoCameBeforeAndRefusesWhoComesAfter) {
  auto listener = Listener::open(config_);
  ASSERT_TRUE(listener.ok());
  UniqueFd before = connect();
  // Another name for the socket, as of a client that has looked the path up already.
  std::filesystem::create_hard_link(config_.socket, dir_ + "/alias");
  listener->stop();
  EXPECT_EQ(phosd_connect(config_.socket.c_str()), -ENOENT);
  EXPECT_EQ(phosd_connect((dir_ + "/alias").c_str()), -ECONNREFUSED);
  EXPECT_TRUE(listener->accept()->has_value());
  EXPECT_FALSE(listener->accept()->has_value());
}

TEST_F(ListenTest, StopLeavesTheSocketOfAnotherAlone) {
  auto listener = Listener::open(config_);
  ASSERT_TRUE(listener.ok());
  std::filesystem::remove(config_.socket);
  UniqueFd other = bound(SOCK_SEQPACKET);
  listener->stop();
  EXPECT_TRUE(connect());
}

TEST_F(ListenTest, ServiceManagersSocketIsTakenAndOutlivesUs) {
  UniqueFd fd = bound(SOCK_SEQPACKET);
  EXPECT_EQ(activated(fd.get(), "1", true,
                      [&] {
                        auto listener = Listener::open(config_);
                        if (!listener || !listener->activated()) return 1;
                        if (getenv("LISTEN_FDS") || getenv("LISTEN_PID")) return 2;
                        if (listener->socket() != config_.socket) return 3;
                        if (fcntl(listener->fd(), F_GETFD) != FD_CLOEXEC) return 4;
                        listener->stop();
                        return 0;
                      }),
            0);
  EXPECT_TRUE(connect());
}

TEST_F(ListenTest, AnotherProcessesActivationIsIgnored) {
  UniqueFd fd = bound(SOCK_SEQPACKET);
  EXPECT_EQ(activated(fd.get(), "1", false,
                      [] {
                        auto taken = take_activated_socket();
                        return taken && !taken->has_value() && !getenv("LISTEN_FDS") ? 0 : 1;
                      }),
            0);
}

TEST_F(ListenTest, UnsuitableActivationIsRefused) {
  UniqueFd two = bound(SOCK_SEQPACKET);
  auto refused = [] { return take_activated_socket() ? 1 : 0; };
  EXPECT_EQ(activated(two.get(), "2", true, refused), 0);
  std::filesystem::remove(config_.socket);
  UniqueFd stream = bound(SOCK_STREAM);
  EXPECT_EQ(activated(stream.get(), "1", true, refused), 0);
  UniqueFd deaf(socket(AF_UNIX, SOCK_SEQPACKET, 0));
  EXPECT_EQ(activated(deaf.get(), "1", true, refused), 0);
}

TEST_F(ListenTest, RunDirectoryThatOthersWriteIsRefused) {
  EXPECT_TRUE(make_run_dir(dir_ + "/run").ok());
  struct stat st;
  ASSERT_EQ(stat((dir_ + "/run").c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 07777, 0700u);
  ASSERT_EQ(chmod((dir_ + "/run").c_str(), 0777), 0);
  EXPECT_FALSE(make_run_dir(dir_ + "/run").ok());
  std::filesystem::create_directory_symlink(dir_, dir_ + "/link");
  EXPECT_FALSE(make_run_dir(dir_ + "/link").ok());
}

}  // namespace
}  // namespace phos
