// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/wire.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/abi/version.h"

namespace phos {
namespace {

Error protocol_error(const std::string& what) {
  return Error(Domain::kProtocol, EPROTO, what);
}

// Protobuf-c wants mutable strings; it does not write to them when packing.
char* mutable_string(const std::string& s) {
  return const_cast<char*>(s.c_str());
}

// A status as a message; the message refers to it.
class PackedStatus {
 public:
  explicit PackedStatus(const NodeStatus& status) : sessions_(status.sessions.size()) {
    phos__wire__daemon_status__init(&message_);
    message_.pid = status.pid;
    message_.version = mutable_string(version_);
    message_.protocol = PHOS_PROTOCOL_VERSION;
    message_.socket = mutable_string(status.config.socket);
    message_.max_sessions = status.config.max_sessions;
    message_.pool_size = status.config.pool_size;
    message_.has_pool_made = message_.has_pool_peak = true;
    message_.pool_made = status.pool_made;
    message_.pool_peak = status.pool_peak;
    message_.idle_timeout = static_cast<uint32_t>(status.config.idle_timeout.count());
    for (size_t i = 0; i < sessions_.size(); i++) {
      const SessionStatus& from = status.sessions[i];
      Phos__Wire__SessionStatus& to = sessions_[i];
      phos__wire__session_status__init(&to);
      to.id = from.id;
      to.client_pid = from.client_pid;
      to.stage = from.stage;
      to.has_pid = from.pid != 0;
      to.pid = from.pid;
      if (!from.checkpoint.empty()) to.checkpoint = mutable_string(from.checkpoint);
      to.has_recovering = true;
      to.recovering = from.recovering;
      to.has_unsynced_bytes = from.unsynced_bytes != 0;
      to.unsynced_bytes = from.unsynced_bytes;
      pointers_.push_back(&to);
    }
    message_.n_sessions = pointers_.size();
    message_.sessions = pointers_.data();
  }
  PackedStatus(const PackedStatus&) = delete;
  PackedStatus& operator=(const PackedStatus&) = delete;

  Phos__Wire__DaemonStatus* get() { return &message_; }

 private:
  const std::string version_ = PHOS_VERSION;
  Phos__Wire__DaemonStatus message_;
  std::vector<Phos__Wire__SessionStatus> sessions_;
  std::vector<Phos__Wire__SessionStatus*> pointers_;
};

}  // namespace

Result<std::optional<ReceivedRequest>> receive_request(int socket) {
  std::vector<uint8_t> buffer(PHOS_MAX_PACKET);
  iovec io = {buffer.data(), buffer.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
  msghdr msg = {};
  msg.msg_iov = &io;
  msg.msg_iovlen = 1;
  msg.msg_control = control;
  msg.msg_controllen = sizeof control;
  ssize_t n;
  do {
    n = recvmsg(socket, &msg, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return Error::from_errno(errno, "receiving a request");
  ReceivedRequest received;
  for (cmsghdr* c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    int fd;
    memcpy(&fd, CMSG_DATA(c), sizeof fd);
    received.fd.reset(fd);
  }
  if (n == 0) return std::optional<ReceivedRequest>();
  if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) return protocol_error("request too large");
  received.request.reset(
      phos__wire__request__unpack(nullptr, static_cast<size_t>(n), buffer.data()));
  if (!received.request) return protocol_error("malformed request");
  return std::optional<ReceivedRequest>(std::move(received));
}

Result<void> send_reply(int socket, const ReplyData& data) {
  Phos__Wire__Reply reply = PHOS__WIRE__REPLY__INIT;
  reply.ok = data.error.empty();
  if (!reply.ok) reply.error = mutable_string(data.error);
  reply.has_remaining = data.remaining.has_value();
  reply.remaining = data.remaining.value_or(0);

  std::vector<Phos__Wire__Found> found(data.found.size());
  std::vector<Phos__Wire__Found*> found_pointers;
  for (size_t i = 0; i < found.size(); i++) {
    phos__wire__found__init(&found[i]);
    found[i].pid = data.found[i].pid;
    found[i].restore_tid = data.found[i].restore_tid;
    // The wire's states are numbered as the driver's.
    found[i].state = static_cast<Phos__Wire__CudaState>(data.found[i].state);
    found_pointers.push_back(&found[i]);
  }
  reply.n_found = found.size();
  reply.found = found_pointers.data();

  std::vector<Phos__Wire__DeviceFile> files(data.files.size());
  std::vector<Phos__Wire__DeviceFile*> file_pointers;
  for (size_t i = 0; i < files.size(); i++) {
    phos__wire__device_file__init(&files[i]);
    files[i].id = data.files[i].id;
    files[i].path = mutable_string(data.files[i].path);
    files[i].flags = data.files[i].flags;
    file_pointers.push_back(&files[i]);
  }
  reply.n_files = files.size();
  reply.files = file_pointers.data();

  std::vector<Phos__Wire__Round> rounds(data.rounds.size());
  std::vector<Phos__Wire__Round*> round_pointers;
  for (size_t i = 0; i < rounds.size(); i++) {
    const RoundReport& report = data.rounds[i].report;
    phos__wire__round__init(&rounds[i]);
    rounds[i].pid = data.rounds[i].pid;
    rounds[i].number = data.rounds[i].number;
    rounds[i].checked_bytes = report.checked_bytes;
    rounds[i].copied_bytes = report.round.bytes;
    rounds[i].total_bytes = report.total_bytes;
    rounds[i].microseconds = report.round.us;
    rounds[i].copy_microseconds = report.round.copy_us;
    rounds[i].pages = report.round.pages;
    rounds[i].dirty_pages = report.round.dirty_pages;
    rounds[i].since_microseconds = report.round.since_us;
    rounds[i].has_pages = rounds[i].has_dirty_pages = rounds[i].has_since_microseconds = true;
    round_pointers.push_back(&rounds[i]);
  }
  reply.n_rounds = rounds.size();
  reply.rounds = round_pointers.data();
  reply.has_more = data.more;
  reply.more = data.more;

  std::vector<Phos__Wire__LogLine> lines(data.log.size());
  std::vector<Phos__Wire__LogLine*> line_pointers;
  for (size_t i = 0; i < lines.size(); i++) {
    phos__wire__log_line__init(&lines[i]);
    lines[i].level = static_cast<uint32_t>(data.log[i].first);
    lines[i].text = mutable_string(data.log[i].second);
    line_pointers.push_back(&lines[i]);
  }
  reply.n_log = lines.size();
  reply.log = line_pointers.data();

  std::optional<PackedStatus> daemon;
  if (data.daemon) reply.daemon = daemon.emplace(*data.daemon).get();

  std::vector<uint8_t> packet(phos__wire__reply__get_packed_size(&reply));
  if (packet.size() > PHOS_MAX_PACKET) return protocol_error("reply too large");
  phos__wire__reply__pack(&reply, packet.data());
  ssize_t n;
  do {
    n = send(socket, packet.data(), packet.size(), MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return Error::from_errno(errno, "replying");
  return {};
}

}  // namespace phos
