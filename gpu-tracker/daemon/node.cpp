// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/node.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

std::string open_sessions(size_t n) {
  return std::to_string(n) + (n == 1 ? " session is open" : " sessions are open");
}

}  // namespace

Result<std::unique_ptr<Node>> Node::make(DaemonConfig config, OpenDriver open_driver) {
  UniqueFd stop_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_fd) return Error::from_errno(errno, "eventfd");
  return std::unique_ptr<Node>(new Node(std::move(config), open_driver, std::move(stop_fd)));
}

Result<GpuDriver*> Node::driver() {
  std::lock_guard<std::mutex> lock(driver_mutex_);
  if (!driver_) {
    auto opened = open_driver_();
    if (!opened) return opened.error();
    driver_ = std::move(*opened);
  }
  return driver_.get();
}

Result<GpuEngines*> Node::engines() {
  auto opened = driver();
  if (!opened) return opened.error();
  std::lock_guard<std::mutex> lock(driver_mutex_);
  if (!engines_) {
    PinnedPoolOptions pool;
    pool.max_bytes = std::max(config_.pool_size, pool.buffer_bytes);
    if (config_.pool_size < pool.buffer_bytes) {
      log(LogLevel::kWarn, "daemon", "pool_size is less than one buffer: %s are used",
          megabytes(pool.buffer_bytes).c_str());
    }
    engines_ =
        std::make_unique<GpuEngines>(**opened, pool,
                                     GpuEngines::Options{.direct_storage = config_.direct_storage,
                                                         .stage = config_.read_ahead_to_gpu});
  }
  return engines_.get();
}

Result<std::shared_ptr<SessionEntry>> Node::admit(int client_pid, Phos__Wire__Stage stage) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stage != PHOS__WIRE__STAGE__TAKE_OVER) {
    if (stopping_) return Error(Domain::kUsage, ESHUTDOWN, "phosd is stopping; try again");
    const auto open = std::count_if(sessions_.begin(), sessions_.end(),
                                    [](const auto& s) { return s.second->unsynced_bytes == 0; });
    if (open >= config_.max_sessions) {
      return Error(Domain::kUsage, EUSERS,
                   "phosd has as many sessions as it may (" + std::to_string(open) +
                       "); wait for one to end, or raise max_sessions in phosd.conf");
    }
  }
  auto entry = std::make_shared<SessionEntry>(++last_id_, client_pid, stage);
  sessions_.emplace(entry->id, entry);
  return entry;
}

void Node::leave(const SessionEntry& entry) {
  std::lock_guard<std::mutex> lock(mutex_);
  sessions_.erase(entry.id);
}

NodeStatus Node::status() const {
  NodeStatus status;
  status.pid = getpid();
  status.config = config_;
  // Not while the driver is being opened, which takes a while: there is no pool yet.
  if (std::unique_lock<std::mutex> driver(driver_mutex_, std::try_to_lock); driver && engines_) {
    const PinnedPool::Statistics pool = engines_->pool_statistics();
    status.pool_made = pool.buffers * engines_->pool().buffer_bytes();
    status.pool_peak = pool.peak_in_use * engines_->pool().buffer_bytes();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& [id, entry] : sessions_) {
    status.sessions.push_back({id, entry->client_pid, entry->stage, entry->log.pid(),
                               entry->log.checkpoint(), entry->recovering, entry->unsynced_bytes});
  }
  return status;
}

void Node::stop_locked() {
  stopping_ = true;
  eventfd_write(stop_fd_.get(), 1);
}

void Node::stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stop_locked();
}

Result<void> Node::stop_if_idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!sessions_.empty()) {
    return Error(Domain::kUsage, EBUSY,
                 "phosd cannot stop now: " + open_sessions(sessions_.size()) +
                     "; wait for them to end, or send it SIGTERM, which makes it leave after them");
  }
  stop_locked();
  return {};
}

}  // namespace phos
