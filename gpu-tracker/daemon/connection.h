// SPDX-License-Identifier: GPL-2.0-only
// Connection: one client of phosd, from its first request until nothing is held for it any more.
#pragma once

#include <memory>
#include <optional>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/listen.h"
#include "gpu-tracker/daemon/node.h"
#include "gpu-tracker/daemon/session.h"
#include "gpu-tracker/daemon/wire.h"

namespace phos {

class Connection {
 public:
  // `node` outlives it. `peer` has been checked.
  Connection(Node& node, UniqueFd socket, const Peer& peer)
      : node_(node), socket_(std::move(socket)), peer_(peer) {}

  // On a thread of its own. Serves until the client is gone, then brings back what it left behind,
  // and makes the images durable that are not yet; that takes as long as it takes. A client without
  // a session is let go when the node stops.
  void serve();

  // Was there ever a session? After serve().
  bool was_session() const { return was_session_; }

 private:
  void serve_requests();
  // False: the client, or its time, is gone.
  bool wait_for_request() const;
  ReplyData handle(ReceivedRequest& received);
  ReplyData handle_in_session(const Phos__Wire__Request& request);
  Result<void> copy(const Phos__Wire__Copy& request);
  Result<void> lock(unsigned timeout_ms);
  // Tells the client that its request is being worked on. False: it has gone.
  bool send_progress(std::vector<RoundData> rounds);
  Result<void> hello(const Phos__Wire__Hello& hello, UniqueFd image_dir, ReplyData* reply);
  void recover();
  void write_behind(UnsyncedFiles& files);

  Node& node_;
  UniqueFd socket_;
  const Peer peer_;
  std::shared_ptr<SessionEntry> entry_;
  std::optional<SessionLog::Scope> log_scope_;
  std::unique_ptr<Session> session_;
  bool was_session_ = false;
};

// Brings back a process that a phosd which died has left, if its client has died too; a client that
// lives has it taken over in a session of its own. On a thread of its own, for as long as it takes.
void bring_back_left(Node& node, const LeftProcess& left);

}  // namespace phos
