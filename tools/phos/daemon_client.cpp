// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/daemon_client.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/client/phosd_connect.h"
#include "gpu-tracker/daemon/process_lock.h"
#include "tools/phos/command.h"
#include "tools/phos/daemon_call.h"

namespace phos::cli {
namespace {

// Both questions are answered from memory.
constexpr int kAnswerMs = 5000;

// Nothing: none runs.
Result<std::optional<UniqueFd>> connect_to_daemon() {
  const std::string path = daemon_socket_path();
  UniqueFd fd(phosd_connect(path.c_str()));
  if (fd) return std::optional<UniqueFd>(std::move(fd));
  const int code = -fd.get();
  if (code == ENOENT || code == ECONNREFUSED) return std::optional<UniqueFd>();
  Error error = Error::from_errno(code, "phosd cannot be reached at " + path);
  if (code != EACCES) return error;
  return Error(Domain::kErrno, code, error.message() + "; run phos as root");
}

Result<ReplyPtr> call(int socket, Phos__Wire__Request__OpCase op) {
  Phos__Wire__Nothing nothing = PHOS__WIRE__NOTHING__INIT;
  Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
  request.op_case = op;
  request.daemon_status = &nothing;  // the members of the oneof share their storage
  return call_daemon(socket, request, -1, kAnswerMs);
}

const char* name_of(Phos__Wire__Stage stage) {
  switch (stage) {
    case PHOS__WIRE__STAGE__DUMP:
      return "dump";
    case PHOS__WIRE__STAGE__RESTORE:
      return "restore";
    case PHOS__WIRE__STAGE__TAKE_OVER:
      return "take-over";
    case PHOS__WIRE__STAGE__PRE_DUMP:
      return "pre-dump";
    default:
      return "unknown";
  }
}

Result<DaemonInfo> ask(int socket) {
  auto reply = call(socket, PHOS__WIRE__REQUEST__OP_DAEMON_STATUS);
  if (!reply) return reply.error();
  const Phos__Wire__DaemonStatus* status = (*reply)->daemon;
  if (!status) {
    return Error(Domain::kProtocol, EPROTO,
                 "phosd at " + daemon_socket_path() + " gave no status when it was asked for it");
  }
  DaemonInfo info;
  info.pid = status->pid;
  info.version = status->version;
  info.protocol = status->protocol;
  info.socket = status->socket;
  info.max_sessions = status->max_sessions;
  info.pool_size = status->pool_size;
  info.pool_made = status->has_pool_made ? status->pool_made : 0;
  info.pool_peak = status->has_pool_peak ? status->pool_peak : 0;
  info.idle_timeout = status->idle_timeout;
  for (size_t i = 0; i < status->n_sessions; i++) {
    const Phos__Wire__SessionStatus& s = *status->sessions[i];
    info.sessions.push_back({s.id, name_of(s.stage), s.client_pid, s.has_pid ? s.pid : 0,
                             s.checkpoint ? s.checkpoint : "", s.has_recovering && s.recovering,
                             s.has_unsynced_bytes ? s.unsynced_bytes : 0});
  }
  return info;
}

// Does a process wait for a phosd that was killed together with its client?
bool has_left_processes() {
  const char* run_dir = secure_getenv(PHOS_RUN_DIR_ENV);
  const auto left = read_left_processes(std::string(run_dir ? run_dir : PHOS_RUN_DIR) + "/lock");
  return std::any_of(left.begin(), left.end(), [](const LeftProcess& l) {
    auto start_time = read_start_time(l.pid);
    return start_time && *start_time == l.start_time;
  });
}

}  // namespace

Result<std::optional<DaemonInfo>> ask_daemon() {
  return ask_living_daemon([]() -> Result<std::optional<DaemonInfo>> {
    auto socket = connect_to_daemon();
    if (!socket) return socket.error();
    if (!socket->has_value() && !has_left_processes()) return std::optional<DaemonInfo>();
    auto info = socket->has_value() ? ask((*socket)->get()) : start_daemon();
    if (!info) return info.error();
    return std::optional<DaemonInfo>(std::move(*info));
  });
}

Result<DaemonInfo> start_daemon() {
  return ask_living_daemon([]() -> Result<DaemonInfo> {
    auto socket = connect_or_start_daemon();
    if (!socket) return socket.error();
    return ask(socket->get());
  });
}

Result<bool> stop_daemon() {
  return ask_living_daemon([]() -> Result<bool> {
    auto socket = connect_to_daemon();
    if (!socket) return socket.error();
    if (!socket->has_value()) return false;
    auto reply = call((*socket)->get(), PHOS__WIRE__REQUEST__OP_SHUTDOWN);
    if (!reply) return reply.error();
    // It hangs up once it does not listen any more.
    auto readable = wait_for_daemon((*socket)->get(), kAnswerMs);
    if (!readable) return readable.error();
    return true;
  });
}

std::string describe(const DaemonInfo& info) {
  uint64_t unsynced = 0;
  for (const DaemonSession& s : info.sessions) unsynced += s.unsynced_bytes;
  return "phosd " + info.version + ", pid " + std::to_string(info.pid) + ": " +
         std::to_string(info.sessions.size()) + " of " + std::to_string(info.max_sessions) +
         " sessions, " + format_bytes(info.pool_size) + " pool (" + format_bytes(info.pool_made) +
         " made, " + format_bytes(info.pool_peak) + " at most in use), " + info.socket +
         (unsynced ? "; " + format_bytes(unsynced) + " of images are not durable yet" : "");
}

void write_daemon(JsonWriter& w, const std::optional<DaemonInfo>& info) {
  if (!info) {
    w.null();
    return;
  }
  w.begin_object().member("pid", info->pid).member("version", info->version);
  w.member("protocol", info->protocol).member("socket", info->socket);
  w.member("pool_made_bytes", info->pool_made).member("pool_peak_bytes", info->pool_peak);
  w.member("pool_bytes", info->pool_size).member("max_sessions", info->max_sessions);
  w.member("idle_timeout_s", info->idle_timeout);
  w.key("sessions").begin_array();
  for (const DaemonSession& s : info->sessions) {
    w.begin_object().member("id", s.id).member("stage", s.stage);
    w.member("client_pid", s.client_pid).member("pid", s.pid);
    w.member("checkpoint", s.checkpoint).member("recovering", s.recovering);
    w.member("unsynced_bytes", s.unsynced_bytes).end_object();
  }
  w.end_array().end_object();
}

}  // namespace phos::cli
