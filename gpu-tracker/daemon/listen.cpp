// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/listen.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/client/phosd_connect.h"

namespace phos {
namespace {

// Clients that connect at once: the kernel caps it at net.core.somaxconn.
constexpr int kBacklog = 128;
// sd_listen_fds(3): SD_LISTEN_FDS_START.
constexpr int kFirstActivatedFd = 3;

template <typename T>
bool has_option(int fd, int option, T wanted) {
  T value{};
  socklen_t size = sizeof value;
  return getsockopt(fd, SOL_SOCKET, option, &value, &size) == 0 && value == wanted;
}

// Those that start phosd, and those that leave, take turns: between looking whether a socket is
// alive and replacing it, it must not change.
Result<UniqueFd> take_start_lock(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Error::from_errno(errno, "creating " + path);
  while (flock(fd.get(), LOCK_EX) < 0) {
    if (errno != EINTR) return Error::from_errno(errno, "locking " + path);
  }
  return fd;
}

Result<void> make_socket(const std::string& path, UniqueFd* out) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return Error::from_errno(ENAMETOOLONG, "the socket " + path);
  }
  memcpy(address.sun_path, path.c_str(), path.size() + 1);
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return Error::from_errno(errno, "socket");
  // From its first moment on nobody else's, whatever the directory's mode. Before threads exist.
  const mode_t mask = umask(0177);
  const int bound = bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address);
  const int code = errno;
  umask(mask);
  if (bound < 0) return Error::from_errno(code, "making the socket " + path);
  if (listen(fd.get(), kBacklog) < 0) {
    const int error = errno;
    unlink(path.c_str());
    return Error::from_errno(error, "listening on " + path);
  }
  *out = std::move(fd);
  return {};
}

}  // namespace

Result<Peer> read_peer(int socket) {
  ucred credentials = {};
  socklen_t size = sizeof credentials;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) < 0) {
    return Error::from_errno(errno, "asking who is at the other end of a socket");
  }
  Peer peer{credentials.pid, credentials.uid, false};
  struct stat theirs, ours;
  const std::string path = "/proc/" + std::to_string(peer.pid) + "/ns/pid";
  peer.same_pid_namespace = stat(path.c_str(), &theirs) == 0 &&
                            stat("/proc/self/ns/pid", &ours) == 0 && theirs.st_dev == ours.st_dev &&
                            theirs.st_ino == ours.st_ino;
  return peer;
}

Result<void> check_peer(const Peer& peer, uid_t own_uid) {
  auto refused = [](int code, const std::string& why) {
    return Error(Domain::kProtocol, code, "phosd refuses to serve " + why);
  };
  if (peer.uid != 0 && peer.uid != own_uid) {
    return refused(EPERM, "user " + std::to_string(peer.uid) + "; run as root");
  }
  if (!peer.same_pid_namespace) {
    return refused(EXDEV,
                   "a process of another pid namespace, whose pids mean other processes "
                   "here; run criu outside the container, or with a /run of its own");
  }
  return {};
}

Result<std::optional<UniqueFd>> take_activated_socket() {
  const char* pid = getenv("LISTEN_PID");
  const char* count = getenv("LISTEN_FDS");
  const bool ours = pid && count && std::to_string(getpid()) == pid;
  const std::string fds = ours ? count : "";
  for (const char* name : {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}) unsetenv(name);
  if (!ours) return std::optional<UniqueFd>();
  if (fds != "1") {
    return Error(Domain::kUsage, EINVAL, "LISTEN_FDS is " + fds + ": phosd takes one socket");
  }
  UniqueFd fd(kFirstActivatedFd);
  if (!has_option(fd.get(), SO_DOMAIN, AF_UNIX) || !has_option(fd.get(), SO_TYPE, SOCK_SEQPACKET) ||
      !has_option(fd.get(), SO_ACCEPTCONN, 1)) {
    return Error(Domain::kUsage, EINVAL,
                 "the file descriptor that was passed in is not a listening unix socket of type "
                 "SOCK_SEQPACKET (ListenSequentialPacket= in phosd.socket)");
  }
  const int flags = fcntl(fd.get(), F_GETFL);
  if (flags < 0 || fcntl(fd.get(), F_SETFL, flags | O_NONBLOCK) < 0 ||
      fcntl(fd.get(), F_SETFD, FD_CLOEXEC) < 0) {
    return Error::from_errno(errno, "the socket that was passed in");
  }
  return std::optional<UniqueFd>(std::move(fd));
}

Result<void> make_run_dir(const std::string& path) {
  if (mkdir(path.c_str(), 0700) < 0 && errno != EEXIST) {
    return Error::from_errno(errno, "creating " + path);
  }
  struct stat st;
  if (lstat(path.c_str(), &st) < 0) return Error::from_errno(errno, "looking at " + path);
  if (!S_ISDIR(st.st_mode) || (st.st_uid != 0 && st.st_uid != geteuid()) ||
      (st.st_mode & (S_IWGRP | S_IWOTH))) {
    return Error(Domain::kUsage, EPERM,
                 path + " is not a directory that only its owner, root, can write; remove it");
  }
  return {};
}

Result<Listener> Listener::open(const DaemonConfig& config) {
  Listener listener;
  auto activated = take_activated_socket();
  if (!activated) return activated.error();
  if (activated->has_value()) {
    listener.fd_ = std::move(**activated);
    listener.activated_ = true;
    sockaddr_un address = {};
    socklen_t size = sizeof address - 1;  // the path may lack its NUL
    if (getsockname(listener.fd_.get(), reinterpret_cast<sockaddr*>(&address), &size) < 0) {
      return Error::from_errno(errno, "asking for the path of the socket that was passed in");
    }
    listener.socket_ = address.sun_path;
    return listener;
  }
  listener.socket_ = config.socket;
  listener.lock_path_ = config.run_dir + "/phosd.lock";
  auto lock = take_start_lock(listener.lock_path_);
  if (!lock) return lock.error();
  UniqueFd other(phosd_connect(config.socket.c_str()));
  const int answer = other ? 0 : other.get();
  if (answer != -ENOENT && answer != -ECONNREFUSED) {
    if (answer == 0 || answer == -EAGAIN) {
      return Error(Domain::kErrno, EADDRINUSE, "a phosd listens on " + config.socket + " already");
    }
    return Error::from_errno(-answer, "looking for another phosd at " + config.socket);
  }
  struct stat st;
  if (answer == -ECONNREFUSED) {
    // Nobody listens, and under the lock nobody is about to.
    if (lstat(config.socket.c_str(), &st) == 0 && !S_ISSOCK(st.st_mode)) {
      return Error(Domain::kUsage, ENOTSOCK, config.socket + " is in the way: it is no socket");
    }
    if (unlink(config.socket.c_str()) < 0 && errno != ENOENT) {
      return Error::from_errno(errno, "removing " + config.socket + ", which a dead phosd left");
    }
  }
  if (auto r = make_socket(config.socket, &listener.fd_); !r) return r.error();
  if (stat(config.socket.c_str(), &st) < 0) {
    return Error::from_errno(errno, "looking at " + config.socket);
  }
  listener.device_ = st.st_dev;
  listener.inode_ = st.st_ino;
  return listener;
}

Result<std::optional<UniqueFd>> Listener::accept() {
  for (;;) {
    UniqueFd client(accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (client) return std::optional<UniqueFd>(std::move(client));
    switch (errno) {
      case EINTR:
      case ECONNABORTED:
        continue;
      case EAGAIN:
      case EINVAL:  // shut down by stop(), and its queue is empty
        return std::optional<UniqueFd>();
      default:
        return Error::from_errno(errno, "accepting a client");
    }
  }
}

void Listener::stop() {
  if (activated_) return;
  auto lock = take_start_lock(lock_path_);
  if (!lock) log(LogLevel::kWarn, "daemon", "%s", lock.error().message().c_str());
  // unix_stream_connect() looks at this flag under the lock under which it queues a client.
  shutdown(fd_.get(), SHUT_RDWR);
  struct stat st;
  if (stat(socket_.c_str(), &st) == 0 && st.st_dev == device_ && st.st_ino == inode_) {
    unlink(socket_.c_str());
  }
}

}  // namespace phos
