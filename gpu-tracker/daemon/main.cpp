// SPDX-License-Identifier: GPL-2.0-only
// phosd: talks to NVIDIA's driver on behalf of one run of criu.
//
// It is a process of its own because the target must be brought back even when criu is killed, and
// because libcuda has no business in criu's address space, which criu forks the restored tasks
// from. The plugin starts it with one end of a socket pair; when the other end closes, phosd brings
// back what is still held and exits.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <syslog.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "gpu-tracker/abi/version.h"
#include "gpu-tracker/daemon/session.h"
#include "gpu-tracker/daemon/wire.h"
#include "gpu-tracker/driver/cuda_driver.h"

namespace phos {
namespace {

// Collects log lines for the reply under way; outside of one they go to the system log.
struct LogRelay {
  bool replying = false;
  std::vector<std::pair<LogLevel, std::string>> lines;
};

void install_log(LogRelay* relay) {
  openlog("phosd", LOG_PID, LOG_DAEMON);
  set_log_sink([relay](LogLevel level, const std::string& line) {
    if (relay->replying) {
      relay->lines.emplace_back(level, line);
      return;
    }
    static const int kPriority[] = {LOG_ERR, LOG_ERR, LOG_WARNING, LOG_INFO, LOG_DEBUG};
    syslog(kPriority[static_cast<int>(level)], "%s", line.c_str());
  });
}

class Server {
 public:
  explicit Server(int socket) : socket_(socket) { install_log(&relay_); }

  // Serves until the peer is gone, then recovers.
  int run() {
    for (;;) {
      auto received = receive_request(socket_);
      if (!received) {
        log(LogLevel::kError, "daemon", "%s", received.error().message().c_str());
        break;
      }
      if (!received->has_value()) break;
      relay_.replying = true;
      ReplyData reply = handle(**received);
      relay_.replying = false;
      reply.log = std::exchange(relay_.lines, {});
      if (auto r = send_reply(socket_, reply); !r) break;
    }
    if (session_) session_->recover();
    return EXIT_SUCCESS;
  }

 private:
  ReplyData handle(ReceivedRequest& received) {
    const Phos__Wire__Request& request = *received.request;
    ReplyData reply;
    if (request.op_case == PHOS__WIRE__REQUEST__OP_HELLO) {
      if (auto r = hello(*request.hello, std::move(received.fd), &reply); !r) {
        reply.error = r.error().message();
      }
      return reply;
    }
    if (!session_) {
      reply.error = "protocol error: the first request must be hello";
      return reply;
    }
    auto processed = [&](Result<PauseResult> r) {
      if (!r) {
        reply.error = r.error().message();
        return;
      }
      reply.is_cuda = r->is_cuda;
      reply.restore_tid = r->restore_tid;
      reply.found = r->found;
    };
    auto done = [&](Result<void> r) {
      if (!r) reply.error = r.error().message();
    };
    switch (request.op_case) {
      case PHOS__WIRE__REQUEST__OP_PAUSE:
        processed(session_->pause(request.pause->pid, request.pause->timeout_ms));
        break;
      case PHOS__WIRE__REQUEST__OP_CHECKPOINT:
        done(session_->checkpoint(request.checkpoint->pid));
        break;
      case PHOS__WIRE__REQUEST__OP_UNDO:
        done(session_->undo(request.undo->pid, static_cast<CudaState>(request.undo->found)));
        break;
      case PHOS__WIRE__REQUEST__OP_FIND_RESTORED:
        processed(session_->find_restored(request.find_restored->pid));
        break;
      case PHOS__WIRE__REQUEST__OP_RESUME:
        processed(session_->resume(request.resume->pid));
        break;
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

  Result<void> hello(const Phos__Wire__Hello& hello, UniqueFd image_dir, ReplyData* reply) {
    if (hello.protocol != kProtocolVersion) {
      return Error(Domain::kProtocol, EPROTO,
                   "phosd " PHOS_VERSION " speaks protocol " + std::to_string(kProtocolVersion) +
                       ", the plugin " + std::to_string(hello.protocol) +
                       "; install the plugin and phosd of one release");
    }
    if (!image_dir) return Error(Domain::kProtocol, EPROTO, "hello without an image directory");
    if (session_) return Error(Domain::kProtocol, EPROTO, "hello a second time");
    auto driver = open_cuda_driver();
    if (!driver) return driver.error();
    driver_ = std::move(*driver);
    auto lock_dir = make_lock_dir();
    if (!lock_dir) return lock_dir.error();
    session_ = std::make_unique<Session>(*driver_, *lock_dir);
    if (hello.stage == PHOS__WIRE__STAGE__RESTORE) {
      auto files = session_->begin_restore(std::move(image_dir));
      if (!files) return files.error();
      reply->files = files->files;
      return {};
    }
    return session_->begin_dump(std::move(image_dir));
  }

  static Result<std::string> make_lock_dir() {
    for (const char* dir : {"/run/phos", "/run/phos/lock"}) {
      if (mkdir(dir, 0700) < 0 && errno != EEXIST) {
        return Error::from_errno(errno, std::string("creating ") + dir);
      }
    }
    return std::string("/run/phos/lock");
  }

  const int socket_;
  LogRelay relay_;
  std::unique_ptr<GpuDriver> driver_;
  std::unique_ptr<Session> session_;
};

int usage(FILE* to, int code) {
  fputs(
      "usage: phosd --session FD\n"
      "phosd is started by CRIU's phos plugin; there is no need to start it by hand.\n"
      "  --session FD  serve the plugin at the other end of this socket\n"
      "  --version     print the version\n",
      to);
  return code;
}

}  // namespace
}  // namespace phos

int main(int argc, char** argv) {
  if (argc == 2 && !strcmp(argv[1], "--version")) {
    puts("phosd " PHOS_VERSION);
    return EXIT_SUCCESS;
  }
  if (argc == 2 && !strcmp(argv[1], "--help")) return phos::usage(stdout, EXIT_SUCCESS);
  if (argc != 3 || strcmp(argv[1], "--session")) return phos::usage(stderr, EXIT_FAILURE);
  char* end = nullptr;
  long fd = strtol(argv[2], &end, 10);
  if (*end || fd < 0 || fcntl(static_cast<int>(fd), F_SETFD, FD_CLOEXEC) < 0) {
    fprintf(stderr, "phosd: --session %s: not an open file descriptor\n", argv[2]);
    return EXIT_FAILURE;
  }
  signal(SIGPIPE, SIG_IGN);
  return phos::Server(static_cast<int>(fd)).run();
}
