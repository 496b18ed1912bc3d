// SPDX-License-Identifier: GPL-2.0-only
// phosd's socket: made by phosd itself or handed over by systemd, and who may speak on it.
#pragma once

#include <sys/types.h>

#include <optional>
#include <string>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/config.h"

namespace phos {

// Who is at the other end of a connected socket.
struct Peer {
  pid_t pid = 0;  // in our pid namespace; 0: it is not in there
  uid_t uid = 0;
  bool same_pid_namespace = false;  // false also when that cannot be seen
};

Result<Peer> read_peer(int socket);

// Refuses all but root and the user that phosd runs as, `own_uid`. Also whoever counts processes
// in another pid namespace: the pids of its requests would be those of other processes here.
Result<void> check_peer(const Peer& peer, uid_t own_uid);

// The socket a service manager started us with (sd_listen_fds(3): LISTEN_PID, LISTEN_FDS; both are
// removed from the environment). Nothing: it did not. Fails if it is not a listening SOCK_SEQPACKET
// unix socket, or not alone.
Result<std::optional<UniqueFd>> take_activated_socket();

// Makes `path` with mode 0700, or checks that it is a directory which others cannot write.
Result<void> make_run_dir(const std::string& path);

// The listening socket. Used from one thread.
class Listener {
 public:
  // Takes over an activated socket, or binds config.socket, replacing one that a dead phosd left.
  // Error EADDRINUSE: another phosd, or its service manager, listens there.
  static Result<Listener> open(const DaemonConfig& config);

  int fd() const { return fd_.get(); }
  // The socket is the service manager's, which starts phosd anew for the next client.
  bool activated() const { return activated_; }
  // Its path.
  const std::string& socket() const { return socket_; }

  // A client that was waiting; nothing: none is. Fails for lack of file descriptors or memory.
  Result<std::optional<UniqueFd>> accept();

  // Lets no more clients in, atomically: every connect(2) either has succeeded before, and accept()
  // still returns it, or fails and makes its caller start another phosd. Not for an activated
  // socket: there, clients that were not accepted wait for the next phosd.
  void stop();

 private:
  Listener() = default;

  UniqueFd fd_;
  bool activated_ = false;
  std::string socket_, lock_path_;
  dev_t device_ = 0;  // of the socket's name
  ino_t inode_ = 0;
};

}  // namespace phos
