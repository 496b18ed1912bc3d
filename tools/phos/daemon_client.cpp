// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/daemon_client.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <memory>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/client/phosd_connect.h"
#include "tools/criu/locate.h"
#include "tools/phos/command.h"

namespace phos::cli {
namespace {

// Both questions are answered from memory.
constexpr int kAnswerMs = 5000;

struct ReplyDeleter {
  void operator()(Phos__Wire__Reply* r) const { phos__wire__reply__free_unpacked(r, nullptr); }
};
using ReplyPtr = std::unique_ptr<Phos__Wire__Reply, ReplyDeleter>;

std::string socket_path() {
  char path[PATH_MAX];
  phosd_socket_path(path, sizeof path);
  return path;
}

// Nothing: none runs.
Result<std::optional<UniqueFd>> connect_to_daemon() {
  const std::string path = socket_path();
  UniqueFd fd(phosd_connect(path.c_str()));
  if (fd) return std::optional<UniqueFd>(std::move(fd));
  const int code = -fd.get();
  if (code == ENOENT || code == ECONNREFUSED) return std::optional<UniqueFd>();
  Error error = Error::from_errno(code, "phosd cannot be reached at " + path);
  if (code != EACCES) return error;
  return Error(Domain::kErrno, code, error.message() + "; run phos as root");
}

Error no_answer(const std::string& why) {
  return Error(Domain::kProtocol, EPROTO, "phosd at " + socket_path() + " does not answer: " + why);
}

// False: it was hung up.
Result<bool> wait_readable(int socket) {
  pollfd p = {socket, POLLIN, 0};
  int n;
  do {
    n = poll(&p, 1, kAnswerMs);
  } while (n < 0 && errno == EINTR);
  if (n < 0) return no_answer(strerror(errno));
  if (n == 0) return no_answer("it has had " + std::to_string(kAnswerMs / 1000) + " s");
  return (p.revents & POLLIN) != 0;
}

Result<ReplyPtr> call(int socket, Phos__Wire__Request__OpCase op) {
  Phos__Wire__Nothing nothing = PHOS__WIRE__NOTHING__INIT;
  Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
  request.op_case = op;
  request.daemon_status = &nothing;  // the members of the oneof share their storage
  std::vector<uint8_t> packet(phos__wire__request__get_packed_size(&request));
  phos__wire__request__pack(&request, packet.data());
  // One that turns us away answers before it is asked, and hangs up.
  if (send(socket, packet.data(), packet.size(), MSG_NOSIGNAL) < 0 && errno != EPIPE) {
    return no_answer(strerror(errno));
  }
  auto readable = wait_readable(socket);
  if (!readable) return readable.error();
  packet.resize(PHOS_MAX_PACKET);
  ssize_t n = recv(socket, packet.data(), packet.size(), 0);
  if (n < 0) return no_answer(strerror(errno));
  if (n == 0) return no_answer("it hung up");
  ReplyPtr reply(phos__wire__reply__unpack(nullptr, static_cast<size_t>(n), packet.data()));
  if (!reply) return no_answer("what came is no reply");
  if (!reply->ok) {
    return Error(Domain::kProtocol, EPROTO, reply->error ? reply->error : "phosd gave no reason");
  }
  return reply;
}

const char* name_of(Phos__Wire__Stage stage) {
  switch (stage) {
    case PHOS__WIRE__STAGE__DUMP:
      return "dump";
    case PHOS__WIRE__STAGE__RESTORE:
      return "restore";
    case PHOS__WIRE__STAGE__TAKE_OVER:
      return "take-over";
    default:
      return "unknown";
  }
}

Result<DaemonInfo> ask(int socket) {
  auto reply = call(socket, PHOS__WIRE__REQUEST__OP_DAEMON_STATUS);
  if (!reply) return reply.error();
  const Phos__Wire__DaemonStatus* status = (*reply)->daemon;
  if (!status) return no_answer("what came is no status");
  DaemonInfo info;
  info.pid = status->pid;
  info.version = status->version;
  info.protocol = status->protocol;
  info.socket = status->socket;
  info.max_sessions = status->max_sessions;
  info.pool_size = status->pool_size;
  info.idle_timeout = status->idle_timeout;
  for (size_t i = 0; i < status->n_sessions; i++) {
    const Phos__Wire__SessionStatus& s = *status->sessions[i];
    info.sessions.push_back({s.id, name_of(s.stage), s.client_pid, s.has_pid ? s.pid : 0,
                             s.checkpoint ? s.checkpoint : "", s.has_recovering && s.recovering});
  }
  return info;
}

}  // namespace

Result<std::optional<DaemonInfo>> ask_daemon() {
  auto socket = connect_to_daemon();
  if (!socket) return socket.error();
  if (!socket->has_value()) return std::optional<DaemonInfo>();
  auto info = ask((*socket)->get());
  if (!info) return info.error();
  return std::optional<DaemonInfo>(std::move(*info));
}

Result<DaemonInfo> start_daemon() {
  char program[PATH_MAX], why[1024];
  const std::string beside = criu::self_dir();
  if (!phosd_program(beside.c_str(), "../libexec/phos/phosd", program, sizeof program)) {
    return Error(Domain::kUsage, ENOENT,
                 std::string("phosd is not where it should be (") + program +
                     "); install phos again, or name phosd in the environment variable PHOS_PHOSD");
  }
  UniqueFd socket(phosd_connect_or_start(socket_path().c_str(), program, why, sizeof why));
  if (!socket) {
    return Error(Domain::kUsage, -socket.get(), std::string("phosd cannot be started: ") + why);
  }
  return ask(socket.get());
}

Result<bool> stop_daemon() {
  auto socket = connect_to_daemon();
  if (!socket) return socket.error();
  if (!socket->has_value()) return false;
  auto reply = call((*socket)->get(), PHOS__WIRE__REQUEST__OP_SHUTDOWN);
  if (!reply) return reply.error();
  // It hangs up once it does not listen any more.
  auto readable = wait_readable((*socket)->get());
  if (!readable) return readable.error();
  return true;
}

std::string describe(const DaemonInfo& info) {
  return "phosd " + info.version + ", pid " + std::to_string(info.pid) + ": " +
         std::to_string(info.sessions.size()) + " of " + std::to_string(info.max_sessions) +
         " sessions, " + format_bytes(info.pool_size) + " pool, " + info.socket;
}

void write_daemon(JsonWriter& w, const std::optional<DaemonInfo>& info) {
  if (!info) {
    w.null();
    return;
  }
  w.begin_object().member("pid", info->pid).member("version", info->version);
  w.member("protocol", info->protocol).member("socket", info->socket);
  w.member("pool_bytes", info->pool_size).member("max_sessions", info->max_sessions);
  w.member("idle_timeout_s", info->idle_timeout);
  w.key("sessions").begin_array();
  for (const DaemonSession& s : info->sessions) {
    w.begin_object().member("id", s.id).member("stage", s.stage);
    w.member("client_pid", s.client_pid).member("pid", s.pid);
    w.member("checkpoint", s.checkpoint).member("recovering", s.recovering).end_object();
  }
  w.end_array().end_object();
}

}  // namespace phos::cli
