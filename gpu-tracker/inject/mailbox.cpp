// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/mailbox.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <utility>

#include "gpu-tracker/base/proc.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr char kMapsName[] = "/memfd:" PHOS_MAILBOX_NAME " (deleted)";
constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW;
// How long a process may have been dead before a wait for it ends.
constexpr auto kSlice = milliseconds(50);

uint32_t load(const uint32_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

bool is_mailbox(const ProcMapping& m) {
  return m.path == kMapsName && m.perms[3] == 's' && m.offset == 0;
}

// /proc/PID/map_files needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN.
Result<UniqueFd> open_mapping(int pid, const ProcMapping& m) {
  char path[96];
  snprintf(path, sizeof path, "/proc/%d/map_files/%lx-%lx", pid,
           static_cast<unsigned long>(m.start), static_cast<unsigned long>(m.end));
  UniqueFd fd(open(path, O_RDWR | O_CLOEXEC));
  if (!fd) return process_error(pid, errno, std::string("opening its agent's mailbox ") + path);
  return fd;
}

Error not_a_mailbox(int pid, const std::string& why) {
  return process_error(pid, EPROTO,
                       "what looks like a phos agent's mailbox in it is none (" + why +
                           "); it cannot be dumped live");
}

Result<void> check_file(int pid, int fd) {
  struct stat st;
  if (fstat(fd, &st) < 0) return process_error(pid, errno, "looking at its agent's mailbox");
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals) return not_a_mailbox(pid, "its file is not sealed");
  if (static_cast<uint64_t>(st.st_size) != PHOS_MAILBOX_SIZE) {
    return not_a_mailbox(pid, std::to_string(st.st_size) + " bytes long");
  }
  return {};
}

Result<void> check_header(int pid, const volatile phos_mailbox& m) {
  if (m.magic != PHOS_MAILBOX_MAGIC) return not_a_mailbox(pid, "no header");
  const uint32_t version = m.version;
  if (version != PHOS_MAILBOX_VERSION || m.header_size != PHOS_MAILBOX_PAYLOAD ||
      m.total_size != PHOS_MAILBOX_SIZE) {
    return not_a_mailbox(pid, "version " + std::to_string(version));
  }
  return {};
}

}  // namespace

Error process_error(int pid, int code, const std::string& text) {
  return Error(Domain::kErrno, code, "process " + std::to_string(pid) + ": " + text);
}

Result<std::optional<Mailbox>> Mailbox::find(int pid) {
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  for (const ProcMapping& m : *maps) {
    if (!is_mailbox(m)) continue;
    auto file = open_mapping(pid, m);
    // Unmapped since: a phosd that died had begun to unload the agent.
    if (!file && file.error().code() == ENOENT) continue;
    if (!file) return file.error();
    if (auto r = check_file(pid, file->get()); !r) return r.error();
    if (flock(file->get(), LOCK_EX | LOCK_NB) < 0) {
      if (errno != EWOULDBLOCK) return process_error(pid, errno, "locking its agent's mailbox");
      return process_error(pid, EBUSY, "another phos uses the agent in it; wait for that one");
    }
    UniqueFd process(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
    if (!process) return process_error(pid, errno, "opening a pidfd");
    void* at = mmap(nullptr, PHOS_MAILBOX_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, file->get(), 0);
    if (at == MAP_FAILED) return process_error(pid, errno, "mapping its agent's mailbox");
    Mailbox mailbox(pid, m.start, std::move(*file), std::move(process),
                    static_cast<phos_mailbox*>(at));
    if (auto r = check_header(pid, *mailbox.mailbox_); !r) return r.error();
    return std::optional<Mailbox>(std::move(mailbox));
  }
  return std::optional<Mailbox>();
}

Mailbox::Mailbox(Mailbox&& other) noexcept
    : pid_(other.pid_),
      address_(other.address_),
      file_(std::move(other.file_)),
      process_(std::move(other.process_)),
      mailbox_(std::exchange(other.mailbox_, nullptr)) {}

Mailbox::~Mailbox() {
  if (mailbox_) munmap(mailbox_, PHOS_MAILBOX_SIZE);
}

bool Mailbox::mapped() const {
  auto maps = read_proc_maps(pid_);
  return maps && std::any_of(maps->begin(), maps->end(), [&](const ProcMapping& m) {
           return m.start == address_ && is_mailbox(m);
         });
}

phos_agent_state Mailbox::state() const {
  return static_cast<phos_agent_state>(load(&mailbox_->state));
}

bool Mailbox::idle() const {
  return load(&mailbox_->done_seq) == load(&mailbox_->command_seq);
}

template <typename Done>
Result<bool> Mailbox::wait(uint32_t* word, milliseconds timeout, Done done) const {
  const auto deadline = steady_clock::now() + timeout;
  for (;;) {
    const uint32_t value = load(word);
    if (done(value)) return true;
    pollfd ended = {process_.get(), POLLIN, 0};
    if (poll(&ended, 1, 0) == 1) return process_error(pid_, ESRCH, "it has ended");
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - steady_clock::now());
    if (left <= milliseconds(0)) return false;
    const auto ms = std::min(left, kSlice).count();
    timespec wait = {0, static_cast<long>(ms * 1000000)};
    const bool silent =
        syscall(SYS_futex, word, FUTEX_WAIT, value, &wait, nullptr, 0) < 0 && errno == ETIMEDOUT;
    // One that was killed in CRIU's hands: its pidfd says nothing until CRIU has waited for all of
    // its threads, and CRIU may be waiting for us.
    if (silent && !any_thread_lives(pid_)) return process_error(pid_, ESRCH, "it has ended");
  }
}

Result<bool> Mailbox::wait_started(milliseconds timeout) const {
  return wait(&mailbox_->state, timeout,
              [](uint32_t value) { return value != PHOS_AGENT_STARTING; });
}

Result<bool> Mailbox::wait_idle(milliseconds timeout) const {
  return wait(&mailbox_->done_seq, timeout,
              [&](uint32_t value) { return value == load(&mailbox_->command_seq); });
}

void Mailbox::start(phos_agent_command command, uint32_t count) {
  mailbox_->command = command;
  mailbox_->count = count;
  mailbox_->cancel = 0;
  __atomic_fetch_add(&mailbox_->command_seq, 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, &mailbox_->command_seq, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Mailbox::cancel() {
  __atomic_store_n(&mailbox_->cancel, 1, __ATOMIC_RELEASE);
}

Result<UniqueFd> Mailbox::fetch(int fd) const {
  UniqueFd copy(static_cast<int>(syscall(SYS_pidfd_getfd, process_.get(), fd, 0)));
  if (!copy) {
    return process_error(pid_, errno, "fetching descriptor " + std::to_string(fd) + " from it");
  }
  return copy;
}

void Mailbox::drop_payload() {
  // Nothing is lost if this fails: the pages stay in use.
  (void)fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PHOS_MAILBOX_PAYLOAD,
                  static_cast<off_t>(PHOS_MAILBOX_SIZE - PHOS_MAILBOX_PAYLOAD));
}

}  // namespace phos
