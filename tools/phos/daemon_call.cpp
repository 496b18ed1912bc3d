// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/daemon_call.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <vector>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/client/phosd_connect.h"
#include "tools/criu/locate.h"

namespace phos::cli {
namespace {

Error no_answer(const std::string& why) {
  return Error(Domain::kProtocol, EPROTO,
               "phosd at " + daemon_socket_path() + " does not answer: " + why);
}

Error ended() {
  return Error(Domain::kProtocol, ECONNRESET,
               "phosd at " + daemon_socket_path() + " has ended before it answered");
}

Result<void> send_request(int socket, const Phos__Wire__Request& request, int fd) {
  std::vector<uint8_t> packet(phos__wire__request__get_packed_size(&request));
  phos__wire__request__pack(&request, packet.data());
  iovec data = {packet.data(), packet.size()};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* c = CMSG_FIRSTHDR(&message);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(c), &fd, sizeof fd);
  }
  // One that turns us away answers before it is asked, and hangs up.
  if (sendmsg(socket, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET) {
    return no_answer(strerror(errno));
  }
  return {};
}

// 0: it hung up, for which an error may come first.
ssize_t receive_packet(int socket, std::vector<uint8_t>* packet) {
  ssize_t n;
  do {
    n = recv(socket, packet->data(), packet->size(), 0);
  } while (n < 0 && (errno == EINTR || errno == ECONNRESET));
  return n;
}

}  // namespace

std::string daemon_socket_path() {
  char path[PATH_MAX];
  phosd_socket_path(path, sizeof path);
  return path;
}

Result<bool> wait_for_daemon(int socket, int timeout_ms) {
  pollfd p = {socket, POLLIN, 0};
  int n;
  do {
    n = poll(&p, 1, timeout_ms);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return no_answer(strerror(errno));
  if (n == 0) return no_answer("it has had " + std::to_string(timeout_ms / 1000) + " s");
  return (p.revents & POLLIN) != 0;
}

Result<ReplyPtr> call_daemon(int socket, const Phos__Wire__Request& request, int fd, int timeout_ms,
                             const std::function<void(const Phos__Wire__Reply&)>& on_progress) {
  if (auto sent = send_request(socket, request, fd); !sent) return sent.error();
  std::vector<uint8_t> packet(PHOS_MAX_PACKET);
  for (;;) {
    auto readable = wait_for_daemon(socket, timeout_ms);
    if (!readable) return readable.error();
    const ssize_t n = receive_packet(socket, &packet);
    if (n < 0) return no_answer(strerror(errno));
    if (n == 0) return ended();
    ReplyPtr reply(phos__wire__reply__unpack(nullptr, static_cast<size_t>(n), packet.data()));
    if (!reply) return no_answer("what came is no reply");
    if (on_progress) on_progress(*reply);
    if (reply->has_more && reply->more) continue;
    if (reply->ok) return reply;
    return Error(Domain::kProtocol, EPROTO, reply->error ? reply->error : "phosd gave no reason");
  }
}

bool is_end_of_daemon(const Error& error) {
  return error.domain() == Domain::kProtocol && error.code() == ECONNRESET;
}

Result<UniqueFd> connect_or_start_daemon() {
  char program[PATH_MAX], why[1024];
  const std::string beside = criu::self_dir();
  if (!phosd_program(beside.c_str(), "../libexec/phos/phosd", program, sizeof program)) {
    return Error(Domain::kUsage, ENOENT,
                 std::string("phosd is not where it should be (") + program +
                     "); install phos again, or name phosd in the environment variable PHOS_PHOSD");
  }
  UniqueFd socket(phosd_connect_or_start(daemon_socket_path().c_str(), program, why, sizeof why));
  if (socket) return socket;
  return Error(Domain::kUsage, -socket.get(), std::string("phosd cannot be started: ") + why);
}

}  // namespace phos::cli
