// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/pre_dump_gpus.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "gpu-tracker/abi/protocol.h"
#include "gpu-tracker/image/image.h"
#include "tools/phos/daemon_call.h"

namespace phos::cli {
namespace {

// Copying takes as long as it takes; everything else is a matter of the driver's answers.
constexpr int kAnswerMs = 60000, kForEver = -1;

class PreDump {
 public:
  PreDump(const std::function<void(const PreDumpRound&)>& on_round,
          const std::function<void(unsigned, const char*)>& on_log)
      : on_round_(on_round), on_log_(on_log) {}

  // May be called again.
  Result<void> hello(int image_dir) {
    auto socket = connect_or_start_daemon();
    if (!socket) return socket.error();
    socket_ = std::move(*socket);
    Phos__Wire__Hello hello = PHOS__WIRE__HELLO__INIT;
    hello.protocol = PHOS_PROTOCOL_VERSION;
    hello.stage = PHOS__WIRE__STAGE__PRE_DUMP;
    // As the plugin does.
    hello.compress = secure_getenv(PHOS_COMPRESS_ENV);
    hello.durability = secure_getenv(PHOS_DURABILITY_ENV);
    const char* encrypt = secure_getenv(PHOS_ENCRYPT_ENV);
    hello.has_encrypt = hello.encrypt = encrypt && strcmp(encrypt, "1") == 0;
    Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
    request.op_case = PHOS__WIRE__REQUEST__OP_HELLO;
    request.hello = &hello;
    return done(call(request, image_dir, kAnswerMs));
  }

  Result<size_t> inspect(int pid) {
    Phos__Wire__Process process = PHOS__WIRE__PROCESS__INIT;
    process.pid = pid;
    Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
    request.op_case = PHOS__WIRE__REQUEST__OP_INSPECT;
    request.inspect = &process;
    auto reply = call(request, -1, kAnswerMs);
    if (!reply) return reply.error();
    return (*reply)->n_found;
  }

  Result<void> copy(const PreDumpLimits& limits) {
    Phos__Wire__Copy copy = PHOS__WIRE__COPY__INIT;
    copy.has_max_rounds = limits.max_rounds.has_value();
    copy.max_rounds = limits.max_rounds.value_or(0);
    copy.has_budget_ms = limits.seconds.has_value();
    copy.budget_ms = static_cast<uint32_t>(limits.seconds.value_or(0) * 1000);
    copy.has_max_slowdown = limits.max_slowdown.has_value();
    copy.max_slowdown = limits.max_slowdown.value_or(0);
    Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
    request.op_case = PHOS__WIRE__REQUEST__OP_COPY;
    request.copy = &copy;
    return done(call(request, -1, kForEver));
  }

  Result<void> finish() {
    Phos__Wire__Finish finish = PHOS__WIRE__FINISH__INIT;
    finish.success = true;
    Phos__Wire__Request request = PHOS__WIRE__REQUEST__INIT;
    request.op_case = PHOS__WIRE__REQUEST__OP_FINISH;
    request.finish = &finish;
    return done(call(request, -1, kForEver));
  }

 private:
  Result<ReplyPtr> call(const Phos__Wire__Request& request, int fd, int timeout_ms) {
    return call_daemon(socket_.get(), request, fd, timeout_ms, [this](const Phos__Wire__Reply& r) {
      for (size_t i = 0; i < r.n_log; i++) on_log_(r.log[i]->level, r.log[i]->text);
      for (size_t i = 0; i < r.n_rounds; i++) {
        const Phos__Wire__Round& w = *r.rounds[i];
        on_round_({w.pid, w.number, w.copied_bytes, w.total_bytes, w.microseconds,
                   w.copy_microseconds, w.pages, w.dirty_pages, w.since_microseconds});
      }
    });
  }

  static Result<void> done(const Result<ReplyPtr>& reply) {
    if (!reply) return reply.error();
    return {};
  }

  UniqueFd socket_;
  const std::function<void(const PreDumpRound&)>& on_round_;
  const std::function<void(unsigned, const char*)>& on_log_;
};

}  // namespace

Result<PreDumpResult> pre_dump_gpus(int pid, int image_dir, const PreDumpLimits& limits,
                                    const std::function<void(const PreDumpRound&)>& on_round,
                                    const std::function<void(unsigned, const char*)>& on_log) {
  PreDumpResult result;
  const std::function<void(const PreDumpRound&)> note = [&](const PreDumpRound& round) {
    result.rounds.push_back(round);
    on_round(round);
  };
  PreDump session(note, on_log);
  if (auto r = ask_living_daemon([&] { return session.hello(image_dir); }); !r) return r.error();
  auto found = session.inspect(pid);
  if (!found) return found.error();
  result.processes = *found;
  if (result.processes == 0) {
    return Error(Domain::kUsage, ESRCH,
                 "neither process " + std::to_string(pid) +
                     " nor a child of it uses CUDA: there is no GPU memory to copy");
  }
  if (auto r = session.copy(limits); !r) return r.error();
  if (auto r = session.finish(); !r) return r.error();
  auto saved = has_images(image_dir);
  if (!saved) return saved.error();
  if (!*saved) {
    return Error(Domain::kUsage, ESRCH,
                 "nothing was saved: the CUDA processes of " + std::to_string(pid) +
                     " have ended meanwhile, or another checkpoint tool holds them");
  }
  return result;
}

}  // namespace phos::cli
