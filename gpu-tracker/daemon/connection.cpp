// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/connection.h"

#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <fstream>
#include <stop_token>
#include <thread>
#include <utility>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/abi/version.h"
#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/image_storage.h"
#include "gpu-tracker/daemon/messages.h"

namespace phos {
namespace {

constexpr int kLookForClientMs = 50;
constexpr int kLookForTracerMs = 20;
constexpr int kTryAgainMs = 1000;

std::string lock_dir(const Node& node) {
  return node.config().run_dir + "/lock";
}

// Is it a criu that was told to let the processes go on? Only a hint: one that is told so by its
// RPC does not show it.
bool leaves_running(int criu) {
  std::ifstream in("/proc/" + std::to_string(criu) + "/cmdline");
  for (std::string argument; std::getline(in, argument, '\0');) {
    if (argument == "-R" || argument == "--leave-running") return true;
  }
  return false;
}

bool has_hung_up(int client, int timeout_ms) {
  pollfd p = {client, POLLRDHUP, 0};
  return poll(&p, 1, timeout_ms) == 1;
}

// Until it returns, again and again: no memory, for one, may be for now only.
template <typename Work>
void insist(const Work& work) {
  for (;;) {
    try {
      work();
      return;
    } catch (const std::exception& e) {
      log(LogLevel::kError, "daemon", "bringing processes back failed, trying again: %s", e.what());
      poll(nullptr, 0, kTryAgainMs);
    }
  }
}

bool is_traced_or_stopped(int pid) {
  auto status = read_proc_status(pid);
  return status && (status->tracer_pid || status->state == 'T' || is_cgroup_frozen(pid));
}

bool is_still_left(const Node& node, const LeftProcess& left) {
  const auto all = read_left_processes(lock_dir(node));
  return std::any_of(all.begin(), all.end(), [&](const LeftProcess& l) {
    return l.pid == left.pid && l.start_time == left.start_time;
  });
}

// Returns when it is back, gone, or given up. EBUSY, EAGAIN: another session has it.
Result<void> take_over_left(Node& node, const LeftProcess& left) {
  auto engines = node.engines();
  if (!engines) return engines.error();
  auto driver = node.driver();
  if (!driver) return driver.error();
  Session session(**driver, lock_dir(node), *engines);
  session.begin_take_over(left.image_dir);
  session.set_client_gone([] { return true; });
  if (auto taken = session.take_over(left); !taken) return taken;
  session.recover();
  return {};
}

const char* to_string(Phos__Wire__Stage stage) {
  switch (stage) {
    case PHOS__WIRE__STAGE__DUMP:
      return "dump";
    case PHOS__WIRE__STAGE__RESTORE:
      return "restore";
    case PHOS__WIRE__STAGE__PRE_DUMP:
      return "pre-dump";
    case PHOS__WIRE__STAGE__TAKE_OVER:
      return "taking over from a phosd that died";
    default:
      return "unknown stage";
  }
}

// What the requests about one process have in their `oneof`; 0: another request.
int process_of(const Phos__Wire__Request& request) {
  switch (request.op_case) {
    case PHOS__WIRE__REQUEST__OP_INSPECT:
      return request.inspect->pid;
    case PHOS__WIRE__REQUEST__OP_UNDO:
      return request.undo->pid;
    case PHOS__WIRE__REQUEST__OP_LEFTOVER:
      return request.leftover->pid;
    case PHOS__WIRE__REQUEST__OP_RESUME:
      return request.resume->pid;
    default:
      return 0;
  }
}

// protobuf-c hands on any number in place of an enum's value. Empty: all are known, or the client
// speaks another protocol, of which hello() tells.
std::string unknown_value(const Phos__Wire__Request& request) {
  const auto check = [](const ProtobufCEnumDescriptor& type, int value) {
    if (protobuf_c_enum_descriptor_get_value(&type, value)) return std::string();
    return std::string("protocol error: there is no ") + type.short_name + " " +
           std::to_string(value);
  };
  if (request.op_case == PHOS__WIRE__REQUEST__OP_HELLO &&
      request.hello->protocol == PHOS_PROTOCOL_VERSION) {
    return check(phos__wire__stage__descriptor, request.hello->stage);
  }
  if (request.op_case == PHOS__WIRE__REQUEST__OP_UNDO) {
    return check(phos__wire__cuda_state__descriptor, request.undo->found);
  }
  return "";
}

}  // namespace

bool Connection::wait_for_request() const {
  pollfd fds[] = {{socket_.get(), POLLIN, 0}, {node_.stop_fd(), POLLIN, 0}};
  // In a session the client decides when to go.
  const nfds_t count = entry_ ? 1 : 2;
  while (poll(fds, count, -1) < 0) {
    if (errno != EINTR) return false;
  }
  return fds[0].revents != 0;
}

void Connection::serve_requests() {
  while (wait_for_request()) {
    auto received = receive_request(socket_.get());
    if (!received) {
      log(LogLevel::kError, "daemon", "process %d: %s", peer_.pid,
          received.error().message().c_str());
      return;
    }
    if (!received->has_value()) return;
    if (entry_) entry_->log.begin_reply();
    ReplyData reply = handle(**received);
    if (entry_) reply.log = entry_->log.end_reply();
    if (auto r = send_reply(socket_.get(), reply); !r) return;
  }
}

void Connection::serve() {
  // A session that fails in a way nobody foresaw (no memory) must not take the others along.
  try {
    serve_requests();
  } catch (const std::exception& e) {
    if (entry_) (void)entry_->log.end_reply();
    log(LogLevel::kError, "daemon", "process %d: serving it failed: %s", peer_.pid, e.what());
  }
  // criu must see the end of the conversation: it may hold tasks that recover() waits for.
  if (session_) session_->ends_soon();
  socket_.reset();
  if (!entry_) return;
  recover();
  auto unsynced = session_ ? session_->take_unsynced() : nullptr;
  session_.reset();
  if (unsynced) write_behind(*unsynced);
  log(LogLevel::kInfo, "daemon", "the session ends");
  log_scope_.reset();
  node_.leave(*entry_);
}

void Connection::recover() {
  entry_->recovering = true;
  if (session_) insist([this] { session_->recover(); });
}

void Connection::write_behind(UnsyncedFiles& files) {
  const auto start = std::chrono::steady_clock::now();
  const std::string dump = "dump " + entry_->log.checkpoint() + " in " + files.directory();
  const uint64_t bytes = files.bytes();
  entry_->unsynced_bytes = bytes;
  entry_->recovering = false;
  if (auto synced = files.sync(); !synced) {
    log(LogLevel::kError, "daemon",
        "%s is not durable, a machine that goes down may lose it: %s; dump again, or copy it",
        dump.c_str(), synced.error().message().c_str());
    return;
  }
  log(LogLevel::kInfo, "daemon", "%s is durable on disk after %.1f s (%s)", dump.c_str(),
      static_cast<double>(since(start).count()) / 1e6, megabytes(bytes).c_str());
}

ReplyData Connection::handle(ReceivedRequest& received) {
  const Phos__Wire__Request& request = *received.request;
  ReplyData reply;
  reply.error = unknown_value(request);
  if (!reply.error.empty()) return reply;
  switch (request.op_case) {
    case PHOS__WIRE__REQUEST__OP_HELLO:
      if (auto r = hello(*request.hello, std::move(received.fd), &reply); !r) {
        reply.error = r.error().message();
      }
      return reply;
    case PHOS__WIRE__REQUEST__OP_DAEMON_STATUS:
      reply.daemon = node_.status();
      return reply;
    case PHOS__WIRE__REQUEST__OP_SHUTDOWN:
      if (auto r = node_.stop_if_idle(); !r) reply.error = r.error().message();
      return reply;
    default:
      break;
  }
  if (!session_) {
    reply.error = "protocol error: the first request must be hello";
    return reply;
  }
  if (int pid = process_of(request)) entry_->log.set_pid(pid);
  return handle_in_session(request);
}

ReplyData Connection::handle_in_session(const Phos__Wire__Request& request) {
  ReplyData reply;
  auto failed = [&](const Error& error) { reply.error = error.message(); };
  auto done = [&](const Result<void>& r) {
    if (!r) failed(r.error());
  };
  switch (request.op_case) {
    case PHOS__WIRE__REQUEST__OP_INSPECT: {
      auto found = session_->inspect(request.inspect->pid);
      if (!found) {
        failed(found.error());
      } else {
        reply.found = std::move(*found);
      }
      break;
    }
    case PHOS__WIRE__REQUEST__OP_COPY:
      done(copy(*request.copy));
      break;
    case PHOS__WIRE__REQUEST__OP_LOCK:
      done(lock(request.lock->timeout_ms));
      if (reply.error.empty()) reply.found = session_->with_managed_memory();
      break;
    case PHOS__WIRE__REQUEST__OP_LEFTOVER:
      done(session_->check_leftover(request.leftover->pid));
      break;
    case PHOS__WIRE__REQUEST__OP_CHECKPOINT:
      done(session_->checkpoint(request.checkpoint->pid));
      break;
    case PHOS__WIRE__REQUEST__OP_UNDO:
      done(session_->undo(request.undo->pid, static_cast<CudaState>(request.undo->found)));
      break;
    case PHOS__WIRE__REQUEST__OP_FIND_RESTORED: {
      auto found = session_->find_restored(request.find_restored->pid);
      if (!found) {
        failed(found.error());
      } else if (*found) {
        reply.found.push_back(**found);
      }
      break;
    }
    case PHOS__WIRE__REQUEST__OP_RESUME: {
      auto remaining = session_->resume(request.resume->pid);
      if (!remaining) {
        failed(remaining.error());
      } else {
        reply.remaining = *remaining;
      }
      break;
    }
    case PHOS__WIRE__REQUEST__OP_ADD_FILE:
      done(session_->add_file(
          {request.add_file->id, request.add_file->path, request.add_file->flags}));
      break;
    case PHOS__WIRE__REQUEST__OP_FINISH:
      done(session_->finish(request.finish->success));
      break;
    default:
      reply.error = "protocol error: unknown request";
  }
  return reply;
}

Result<void> Connection::copy(const Phos__Wire__Copy& request) {
  CopyLimits limits;
  limits.max_slowdown = node_.config().max_slowdown / 100;
  limits.tracker = node_.config().tracker;
  limits.release = node_.config().release;
  if (request.has_max_rounds) limits.max_rounds = request.max_rounds;
  if (request.has_budget_ms) limits.budget = std::chrono::milliseconds(request.budget_ms);
  if (request.has_max_slowdown) limits.max_slowdown = request.max_slowdown;
  // No limit. 0 is the last round, which makes no buffers beforehand.
  if (limits.max_slowdown <= 0) limits.max_slowdown = 1;
  std::stop_source gone;
  // A client that is killed says so by hanging up.
  std::jthread watch([this, &gone](const std::stop_token& copied) {
    while (!copied.stop_requested()) {
      if (has_hung_up(socket_.get(), kLookForClientMs)) {
        gone.request_stop();
        return;
      }
    }
  });
  const auto progress = [this](int pid, unsigned number, const RoundReport& report) {
    return send_progress({{pid, number, report}});
  };
  return session_->copy(limits, progress, gone.get_token());
}

bool Connection::send_progress(std::vector<RoundData> rounds) {
  ReplyData progress;
  progress.more = true;
  progress.rounds = std::move(rounds);
  progress.log = entry_->log.end_reply();
  entry_->log.begin_reply();
  return send_reply(socket_.get(), progress).ok();
}

// To lock takes no longer than it may, but what is copied then has to be written as well: the
// client, which would give up soon after the time to lock is over, is told that it has begun.
Result<void> Connection::lock(unsigned timeout_ms) {
  if (auto r = session_->lock(timeout_ms); !r) return r;
  if (!session_->has_copies()) return {};
  if (!send_progress({})) return Error(Domain::kErrno, ECANCELED, "the client has gone");
  return session_->complete_copies();
}

Result<void> Connection::hello(const Phos__Wire__Hello& hello, UniqueFd image_dir,
                               ReplyData* reply) {
  if (hello.protocol != PHOS_PROTOCOL_VERSION) {
    return Error(Domain::kProtocol, EPROTO,
                 "the phosd that runs (" PHOS_VERSION ", pid " + std::to_string(getpid()) +
                     ") speaks protocol " + std::to_string(PHOS_PROTOCOL_VERSION) +
                     ", its client " + std::to_string(hello.protocol) +
                     "; stop it with `phos daemon stop`, and install the plugin and phosd of one "
                     "release");
  }
  if (!image_dir) return Error(Domain::kProtocol, EPROTO, "hello without an image directory");
  if (entry_) return Error(Domain::kProtocol, EPROTO, "hello a second time");
  auto driver = node_.driver();
  if (!driver) return driver.error();
  auto entry = node_.admit(peer_.pid, hello.stage);
  if (!entry) return entry.error();
  entry_ = std::move(*entry);
  was_session_ = true;
  log_scope_.emplace(&entry_->log);
  log(LogLevel::kInfo, "daemon", "a session begins: %s by process %d", to_string(hello.stage),
      peer_.pid);
  entry_->log.begin_reply();

  auto engines = node_.engines();
  if (!engines) return engines.error();
  if (auto r = make_run_dir(lock_dir(node_)); !r) return r;
  auto storage = choose_storage(node_.config(), hello);
  if (!storage) return storage.error();
  session_ = std::make_unique<Session>(**driver, lock_dir(node_), *engines);
  session_->set_client_gone([client = socket_.get()] { return has_hung_up(client, 0); });
  if (hello.stage == PHOS__WIRE__STAGE__RESTORE) {
    auto files = session_->begin_restore(std::move(image_dir));
    if (!files) return files.error();
    reply->files = files->files;
    entry_->log.set_checkpoint(format_dump_id(session_->dump_id()));
    return {};
  }
  if (hello.stage == PHOS__WIRE__STAGE__TAKE_OVER) {
    session_->begin_take_over(std::move(image_dir));
    return {};
  }
  const auto stage =
      hello.stage == PHOS__WIRE__STAGE__PRE_DUMP ? DumpStage::kPreDump : DumpStage::kDump;
  auto durability = choose_durability(node_.config(), hello);
  if (!durability) return durability.error();
  auto begun = session_->begin_dump(std::move(image_dir), stage, *storage, *durability);
  if (!begun) return begun;
  if (leaves_running(peer_.pid)) session_->expect_to_go_on();
  entry_->log.set_checkpoint(format_dump_id(session_->dump_id()));
  return {};
}

void bring_back_left(Node& node, const LeftProcess& left) {
  auto entry = node.admit(0, PHOS__WIRE__STAGE__TAKE_OVER);
  if (!entry) {
    log(LogLevel::kError, "daemon", "%s", entry.error().message().c_str());
    return;
  }
  SessionLog::Scope scope(&(*entry)->log);
  (*entry)->log.set_pid(left.pid);
  (*entry)->recovering = true;
  if (auto key = load_image_key(node.config()); !key) {
    log(LogLevel::kWarn, "daemon", "encrypted images cannot be read: %s",
        key.error().message().c_str());
  }
  bool told = false;
  insist([&] {
    while (is_still_left(node, left)) {
      // A criu that lives has its tasks traced, or its plugin asks for them.
      if (is_traced_or_stopped(left.pid)) {
        poll(nullptr, 0, kLookForTracerMs);
        continue;
      }
      auto r = take_over_left(node, left);
      if (r || r.error().code() == EBUSY || r.error().code() == EAGAIN) return;
      if (!std::exchange(told, true)) {
        log(LogLevel::kError, "daemon",
            "%s, which a phosd that died has left, cannot be brought back yet, trying again and "
            "again: %s",
            process(left.pid).c_str(), r.error().message().c_str());
      }
      pollfd stop = {node.stop_fd(), POLLIN, 0};  // then it is the next phosd's
      if (poll(&stop, 1, kTryAgainMs) == 1) return;
    }
  });
  node.leave(**entry);
}

}  // namespace phos
