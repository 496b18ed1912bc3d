// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/server.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <system_error>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/connection.h"
#include "gpu-tracker/daemon/gate_pins.h"
#include "gpu-tracker/daemon/messages.h"
#include "gpu-tracker/daemon/wire.h"

namespace phos {
namespace {

using std::chrono::duration_cast;
using std::chrono::milliseconds;

// When there are no file descriptors left: poll() would return at once, again and again.
constexpr milliseconds kAcceptPause{200};
constexpr milliseconds kLookForLeft{1000};

// Answers a client that gets no thread. What it may have sent is read: closing a unix socket with
// unread data makes the other end lose our answer.
void turn_away(UniqueFd socket, const std::string& why) {
  log(LogLevel::kWarn, "daemon", "%s", why.c_str());
  shutdown(socket.get(), SHUT_RD);
  char byte;
  while (recv(socket.get(), &byte, sizeof byte, MSG_DONTWAIT) > 0) {
  }
  ReplyData reply;
  reply.error = why;
  (void)send_reply(socket.get(), reply).ok();
}

}  // namespace

Server::~Server() {
  for (Client& client : clients_) client.thread.join();
}

int Server::wait_ms() const {
  auto until = look_again_;
  if (may_leave_when_idle()) until = std::min(until, last_work_ + node_.config().idle_timeout);
  if (accept_again_ > Clock::now()) until = std::min(until, accept_again_);
  // Rounded up, so as not to wake a moment too early.
  const auto left = duration_cast<milliseconds>(until - Clock::now()).count() + 1;
  return static_cast<int>(std::clamp<int64_t>(left, 0, INT_MAX));
}

bool Server::may_leave_when_idle() const {
  return clients_.empty() && !held_elsewhere_ && node_.config().idle_timeout.count() > 0;
}

bool Server::is_idle() const {
  return may_leave_when_idle() && Clock::now() >= last_work_ + node_.config().idle_timeout;
}

void Server::start_client(UniqueFd socket) {
  auto peer = read_peer(socket.get());
  if (!peer) {
    log(LogLevel::kError, "daemon", "%s", peer.error().message().c_str());
    return;
  }
  if (auto r = check_peer(*peer, geteuid()); !r) {
    turn_away(std::move(socket), r.error().message());
    return;
  }
  auto connection = std::make_shared<Connection>(node_, std::move(socket), *peer);
  start(process(peer->pid), [connection] {
    connection->serve();
    return connection->was_session();
  });
}

// `work` says whether it was a session.
void Server::start(const std::string& name, std::function<bool()> work, int left_pid) {
  Client& client = clients_.emplace_back();
  client.left_pid = left_pid;
  try {
    client.thread = std::thread([this, &client, work = std::move(work)]() mutable {
      const bool was_session = work();
      work = nullptr;
      std::lock_guard<std::mutex> lock(mutex_);
      client.ended = true;
      client.was_session = was_session;
      eventfd_write(ended_fd_.get(), 1);
    });
  } catch (const std::system_error& e) {
    clients_.pop_back();
    log(LogLevel::kError, "daemon", "%s: cannot start a thread to serve it: %s", name.c_str(),
        e.what());
  }
}

void Server::bring_back_left_processes() {
  if (Clock::now() < look_again_) return;
  look_again_ = Clock::now() + kLookForLeft;
  for (const LeftProcess& left :
       find_abandoned(node_.config().run_dir + "/lock", &held_elsewhere_)) {
    if (std::any_of(clients_.begin(), clients_.end(),
                    [&](const Client& c) { return c.left_pid == left.pid; })) {
      continue;
    }
    const auto work = [this, left] {
      bring_back_left(node_, left);
      return true;
    };
    start(process(left.pid), work, left.pid);
  }
}

void Server::admit_waiting() {
  for (;;) {
    auto client = listener_.accept();
    if (!client) {
      log(LogLevel::kError, "daemon", "%s", client.error().message().c_str());
      accept_again_ = Clock::now() + kAcceptPause;
      return;
    }
    if (!client->has_value()) return;
    start_client(std::move(**client));
  }
}

void Server::join_ended() {
  eventfd_t count;
  eventfd_read(ended_fd_.get(), &count);
  for (auto it = clients_.begin(); it != clients_.end();) {
    bool ended, was_session;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended = it->ended;
      was_session = it->was_session;
    }
    if (!ended) {
      ++it;
      continue;
    }
    it->thread.join();
    it = clients_.erase(it);
    // A question about the status does not keep phosd from leaving.
    if (was_session) last_work_ = Clock::now();
  }
}

Result<void> Server::run() {
  ended_fd_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!ended_fd_) return Error::from_errno(errno, "eventfd");
  last_work_ = Clock::now();
  GatePins(node_.config().run_dir).remove_stale();
  bring_back_left_processes();
  bool leaving = false;
  while (!leaving || !clients_.empty()) {
    pollfd fds[] = {{ended_fd_.get(), POLLIN, 0},
                    {leaving ? -1 : node_.stop_fd(), POLLIN, 0},
                    {leaving ? -1 : signal_fd_, POLLIN, 0},
                    {leaving || accept_again_ > Clock::now() ? -1 : listener_.fd(), POLLIN, 0}};
    if (poll(fds, std::size(fds), leaving ? -1 : wait_ms()) < 0 && errno != EINTR) {
      return Error::from_errno(errno, "poll");
    }
    join_ended();
    if (leaving) continue;
    bring_back_left_processes();
    if (fds[3].revents) admit_waiting();
    const bool told = fds[1].revents || fds[2].revents;
    if (!told && !is_idle()) continue;
    if (told) node_.stop();
    log(LogLevel::kInfo, "daemon",
        told ? "told to stop: %zu clients are served to their end"
             : "leaves, having had nothing to do (%zu clients)",
        clients_.size());
    leaving = true;
    listener_.stop();
    // Whoever had connected before is served; an activated socket keeps them for the next phosd.
    if (!listener_.activated()) admit_waiting();
  }
  return {};
}

}  // namespace phos
