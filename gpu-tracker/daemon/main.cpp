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
  // Owns `socket`.
  explicit Server(int socket) : socket_(socket) { install_log(&relay_); }

  // Serves until the peer is gone, then recovers.
  int run() {
    for (;;) {
      auto received = receive_request(socket_.get());
      if (!received) {
        log(LogLevel::kError, "daemon", "%s", received.error().message().c_str());
        break;
      }
      if (!received->has_value()) break;
      relay_.replying = true;
      ReplyData reply = handle(**received);
      relay_.replying = false;
      reply.log = std::exchange(relay_.lines, {});
      if (auto r = send_reply(socket_.get(), reply); !r) break;
    }
    // criu must see the end of the conversation: it may hold tasks that recover() waits for.
    socket_.reset();
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
    auto failed = [&](const Error& error) { reply.error = error.message(); };
    auto done = [&](Result<void> r) {
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
      case PHOS__WIRE__REQUEST__OP_LOCK:
        done(session_->lock(request.lock->timeout_ms));
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
    session_ = std::make_unique<Session>(*driver_, kLockDirectory);
    if (hello.stage == PHOS__WIRE__STAGE__RESTORE) {
      auto files = session_->begin_restore(std::move(image_dir));
      if (!files) return files.error();
      reply->files = files->files;
      return {};
    }
    if (auto r = make_lock_directory(); !r) return r;
    if (hello.stage == PHOS__WIRE__STAGE__TAKE_OVER) return {};
    return session_->begin_dump(std::move(image_dir));
  }

  static constexpr char kLockDirectory[] = "/run/phos/lock";

  static Result<void> make_lock_directory() {
    for (const char* directory : {"/run/phos", kLockDirectory}) {
      if (mkdir(directory, 0700) < 0 && errno != EEXIST) {
        return Error::from_errno(errno, std::string("creating ") + directory);
      }
    }
    return {};
  }

  UniqueFd socket_;
  LogRelay relay_;
  std::unique_ptr<GpuDriver> driver_;
  std::unique_ptr<Session> session_;
};

// The driver's checkpoint fills host memory with what was on the GPU; phosd must outlive that.
// Needs CAP_SYS_RESOURCE; without it phosd is as likely to be chosen as any other process.
void survive_memory_shortage() {
  UniqueFd fd(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC));
  if (fd && write(fd.get(), "-900", 4) < 0 && errno != EACCES) {
    log(LogLevel::kDebug, "daemon", "oom_score_adj: %s", strerror(errno));
  }
}

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
  // It ends with its work, not with criu's service or terminal: a process may wait for its GPU.
  for (int sig : {SIGPIPE, SIGTERM, SIGINT, SIGHUP}) signal(sig, SIG_IGN);
  phos::survive_memory_shortage();
  return phos::Server(static_cast<int>(fd)).run();
}
