// SPDX-License-Identifier: GPL-2.0-only
// The daemon's end of the protocol of gpu-tracker/abi/phosd.proto over a SOCK_SEQPACKET socket.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/abi/phosd.pb-c.h"
#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/node.h"
#include "gpu-tracker/daemon/session.h"
#include "gpu-tracker/image/image.h"

namespace phos {

struct RequestDeleter {
  void operator()(Phos__Wire__Request* r) const { phos__wire__request__free_unpacked(r, nullptr); }
};

struct ReceivedRequest {
  std::unique_ptr<Phos__Wire__Request, RequestDeleter> request;
  UniqueFd fd;  // what came along, if anything
};

// The next request; nullopt when the peer has closed the socket.
Result<std::optional<ReceivedRequest>> receive_request(int socket);

// A round of live copying.
struct RoundData {
  int pid = 0;
  unsigned number = 0;
  RoundReport report;
};

struct ReplyData {
  std::string error;  // empty: ok
  std::vector<FoundProcess> found;
  std::optional<uint32_t> remaining;
  std::vector<DeviceFile> files;
  std::vector<std::pair<LogLevel, std::string>> log;
  std::optional<NodeStatus> daemon;
  std::vector<RoundData> rounds;
  bool more = false;  // another reply to the same request follows
};

Result<void> send_reply(int socket, const ReplyData& reply);

}  // namespace phos
