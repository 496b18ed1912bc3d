// SPDX-License-Identifier: GPL-2.0-only
// One connection of the phos command to phosd: requests and their replies.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos::cli {

struct ReplyDeleter {
  void operator()(Phos__Wire__Reply* r) const { phos__wire__reply__free_unpacked(r, nullptr); }
};
using ReplyPtr = std::unique_ptr<Phos__Wire__Reply, ReplyDeleter>;

// phosd's socket, for messages.
std::string daemon_socket_path();

// False: phosd hung up, or did not become readable within `timeout_ms` (an error).
Result<bool> wait_for_daemon(int socket, int timeout_ms);

// Sends `request`, with a copy of the descriptor `fd` unless that is -1, and waits `timeout_ms` for
// each reply; -1: for as long as phosd lives. `on_progress` (may be empty) is given the replies
// that come before the last one. An answer that is no is an error; so is none, because phosd has
// ended (is_end_of_daemon).
Result<ReplyPtr> call_daemon(int socket, const Phos__Wire__Request& request, int fd, int timeout_ms,
                             const std::function<void(const Phos__Wire__Reply&)>& on_progress = {});

bool is_end_of_daemon(const Error& error);

// ask() again where phosd ends between its connect and its answer. A phosd that is being killed
// still lets clients in, and hangs up on them: one that had been accepted, then one that was
// waiting. By then its socket is closed.
template <typename Ask>
auto ask_living_daemon(const Ask& ask) {
  constexpr int kAttempts = 3;
  for (int attempt = 1;; attempt++) {
    auto answer = ask();
    if (answer || !is_end_of_daemon(answer.error()) || attempt == kAttempts) return answer;
  }
}

// A connected socket; starts phosd if none runs.
Result<UniqueFd> connect_or_start_daemon();

}  // namespace phos::cli
