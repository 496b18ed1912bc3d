// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/inject/agent_loader.h"

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/inject/elf_symbols.h"
#include "gpu-tracker/inject/restore_thread.h"

// gpu-tracker/agent/embedded.S
extern "C" const char phos_agent_file_begin[], phos_agent_file_end[];

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U  // linux/memfd.h, Linux 6.3
#endif

constexpr char kAgentFds[] = "/memfd:" PHOS_AGENT_MEMFD_PREFIX;
constexpr auto kPollInterval = std::chrono::microseconds(200);

std::string proc_path(int pid, const std::string& name) {
  return "/proc/" + std::to_string(pid) + "/" + name;
}

// Descriptors of the process that refer to a memfd whose name starts so.
std::vector<int> find_fds(int pid, const std::string& link_prefix) {
  std::vector<int> found;
  const std::string directory = proc_path(pid, "fd");
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(directory.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    char link[PATH_MAX];
    const ssize_t n = readlink((directory + "/" + entry->d_name).c_str(), link, sizeof link);
    if (n < static_cast<ssize_t>(link_prefix.size())) continue;
    if (!memcmp(link, link_prefix.data(), link_prefix.size())) found.push_back(atoi(entry->d_name));
  }
  return found;
}

// The function in whichever file of the C library has it: before glibc 2.34 dlopen and dlsym were
// in libdl, which libcuda has loaded.
Result<uint64_t> find_in_libc(int pid, const char* symbol) {
  for (const char* file : {"libc.so.6", "libc-2.", "libdl.so.2", "libdl-2."}) {
    if (auto found = find_remote_symbol(pid, file, symbol)) return found;
  }
  return process_error(pid, ENOENT,
                       std::string("its C library has no ") + symbol +
                           "; phos knows glibc only, which NVIDIA's driver needs");
}

// One loading of the agent. The thread stays stopped until this object is gone.
class Loader {
 public:
  Loader(int pid, RemoteThread thread, milliseconds timeout)
      : pid_(pid), thread_(std::move(thread)), timeout_(timeout) {}

  Result<void> load() {
    if (auto r = find_functions(); !r) return r;
    auto fd = make_memfd();
    if (!fd) return fd.error();
    auto loaded = write_library(*fd);
    if (loaded) {
      loaded = call_with(library_path(*fd), dlopen_, {thread_.scratch(), RTLD_NOW | RTLD_LOCAL});
    }
    auto closed = call_with("", syscall_, {SYS_close, static_cast<uint64_t>(*fd)});
    return loaded ? closed : loaded;
  }

  // Descriptors that a phosd which died between two steps has left.
  Result<void> close_leftovers() {
    const std::vector<int> fds = find_fds(pid_, kAgentFds);
    if (fds.empty()) return {};
    if (auto r = find_functions(); !r) return r;
    for (int fd : fds) {
      auto r = call_with("", syscall_, {SYS_close, static_cast<uint64_t>(fd)});
      if (!r) return r;
    }
    return {};
  }

  // The function comes from the mailbox: the process can only make its own thread call something.
  Result<void> remove(uint64_t finish) { return call_with("", finish, {}); }

 private:
  Result<void> find_functions() {
    if (syscall_) return {};
    const std::pair<const char*, uint64_t*> wanted[] = {
        {"dlopen", &dlopen_}, {"dlsym", &dlsym_}, {"syscall", &syscall_}};
    for (auto [name, address] : wanted) {
      auto found = find_in_libc(pid_, name);
      if (!found) return found.error();
      *address = *found;
    }
    return {};
  }

  // A path that was not used for dlopen() before: it knows libraries by path first, and one whose
  // constructor could not make a mailbox stays where it is, as does one whose gate a thread might
  // still be leaving. Their number, as "/" and "./", changes the text only.
  std::string library_path(int fd) const {
    std::set<std::string> staying;
    auto maps = read_proc_maps(pid_);
    for (const ProcMapping& m : maps ? *maps : std::vector<ProcMapping>()) {
      if (m.path.rfind(kAgentFds, 0) == 0) staying.insert(m.path);
    }
    std::string path = "/proc/self/fd/";
    for (size_t n = staying.size(); n; n /= 2) path += n % 2 ? "./" : "/";
    return path + std::to_string(fd);
  }

  // Calls with `text` at scratch().
  Result<void> call_with(const std::string& text, uint64_t function,
                         const std::vector<uint64_t>& arguments) {
    auto r = thread_.write(thread_.scratch(), text.c_str(), text.size() + 1);
    if (r) r = thread_.call(function, arguments, timeout_);
    if (!r)
      return r.error().wrap("loading or unloading phos's agent in process " + std::to_string(pid_));
    return {};
  }

  // The call's result is lost, but the name tells which descriptor it is.
  Result<int> make_memfd() {
    std::random_device random;
    char name[sizeof PHOS_AGENT_MEMFD_PREFIX + 16];
    snprintf(name, sizeof name, PHOS_AGENT_MEMFD_PREFIX "%08x%08x", random(), random());
    // Kernels before 6.3 do not know MFD_EXEC and refuse it.
    for (uint64_t flags : {MFD_CLOEXEC | MFD_EXEC, MFD_CLOEXEC}) {
      auto r = call_with(name, syscall_, {SYS_memfd_create, thread_.scratch(), flags});
      if (!r) return r.error();
      const std::vector<int> fds = find_fds(pid_, std::string("/memfd:") + name);
      if (!fds.empty()) return fds.front();
    }
    return process_error(pid_, EMFILE,
                         "it could not make a memfd for phos's agent: it has no descriptor left, "
                         "or vm.memfd_noexec forbids executable ones");
  }

  Result<void> write_library(int fd) {
    std::string file(phos_agent_file_begin, phos_agent_file_end);
    const std::string magic(PHOS_AGENT_CONFIG_MAGIC, sizeof PHOS_AGENT_CONFIG_MAGIC);
    const size_t at = file.find(magic);
    if (at == std::string::npos || at + sizeof(phos_agent_config) > file.size()) {
      return Error(Domain::kFormat, ENOEXEC, "phosd's own copy of the agent has no configuration");
    }
    phos_agent_config config = {};
    memcpy(config.magic, PHOS_AGENT_CONFIG_MAGIC, sizeof config.magic);
    config.version = PHOS_MAILBOX_VERSION;
    config.dlopen = dlopen_;
    config.dlsym = dlsym_;
    memcpy(file.data() + at, &config, sizeof config);
    const std::string path = proc_path(pid_, "fd/" + std::to_string(fd));
    UniqueFd out(open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (!out || write(out.get(), file.data(), file.size()) != static_cast<ssize_t>(file.size())) {
      return process_error(pid_, errno, "writing phos's agent into " + path);
    }
    return {};
  }

  const int pid_;
  RemoteThread thread_;
  const milliseconds timeout_;
  uint64_t dlopen_ = 0, dlsym_ = 0, syscall_ = 0;
};

static_assert(sizeof PHOS_AGENT_CONFIG_MAGIC == sizeof phos_agent_config::magic);

const char* start_problem(uint32_t step) {
  switch (step) {
    case PHOS_START_LIBCUDA:
      return "it has no libcuda.so.1 loaded";
    case PHOS_START_SYMBOL:
      return "its libcuda lacks a function that phos needs (number in the agent's table)";
    case PHOS_START_STACK:
      return "no memory for the agent's stack";
    case PHOS_START_PTHREADS:
      return "its C library has no pthread functions";
    case PHOS_START_THREAD:
      return "no thread could be started";
    case PHOS_START_MAILBOX:
      return "the mailbox cannot be kept from forked children";
    default:
      return "unknown step";
  }
}

Error start_error(int pid, volatile phos_mailbox& m) {
  const uint32_t step = m.start_step;
  return process_error(pid, ENOEXEC,
                       std::string("phos's agent could not start: ") + start_problem(step) + " (" +
                           std::to_string(m.start_code) + ")");
}

// Loads the agent unless somebody was faster; both are seen only with the thread stopped.
Result<std::optional<Mailbox>> find_or_load(int pid, int restore_tid, const AgentOptions& options) {
  auto found = Mailbox::find(pid);
  if (!found || (*found && find_fds(pid, kAgentFds).empty())) return found;
  auto thread = attach_restore_thread(pid, restore_tid);
  if (!thread) return thread.error();
  Loader loader(pid, std::move(*thread), options.start_timeout);
  // Whatever a phosd that died had begun on this thread is over now.
  if (auto r = loader.close_leftovers(); !r) return r.error();
  if (*found) return found;
  auto found_now = Mailbox::find(pid);
  if (!found_now || *found_now) return found_now;
  if (auto r = loader.load(); !r) return r.error();
  return Mailbox::find(pid);
}

bool is_over(const Mailbox& mailbox) {
  const phos_agent_state state = mailbox.state();
  return state == PHOS_AGENT_ENDED || state == PHOS_AGENT_FAILED;
}

}  // namespace

bool has_agent_thread(int pid) {
  const std::string tasks = proc_path(pid, "task");
  std::unique_ptr<DIR, int (*)(DIR*)> dir(opendir(tasks.c_str()), closedir);
  while (dirent* entry = dir ? readdir(dir.get()) : nullptr) {
    const int tid = atoi(entry->d_name);
    auto status = tid ? read_proc_status(tid) : Error(Domain::kErrno, ESRCH, "");
    if (status && status->comm == PHOS_AGENT_THREAD_NAME) return true;
  }
  return false;
}

Result<void> check_attachable(int pid, int restore_tid) {
  auto process = read_proc_status(pid);
  auto thread = read_proc_status(restore_tid);
  if (!process) return process.error();
  if (process->state == 'Z' || process->state == 'X') {
    return process_error(pid, ESRCH, "it has ended");
  }
  if (!thread || thread->tgid != pid) {
    return process_error(pid, EINVAL,
                         "thread " + std::to_string(restore_tid) + " is not one of its threads");
  }
  if (process->tracer_pid || thread->tracer_pid) {
    const int tracer = process->tracer_pid ? process->tracer_pid : thread->tracer_pid;
    return process_error(pid, EBUSY,
                         "process " + std::to_string(tracer) + " traces it; end the debugger");
  }
  if (is_cgroup_frozen(pid)) {
    return process_error(pid, EBUSY, "its cgroup is frozen; thaw it, then try again");
  }
  if (process->state == 'T' || thread->state == 'T') {
    return process_error(pid, EBUSY, "it is stopped; continue it (SIGCONT), then try again");
  }
  auto maps = read_proc_maps(pid);
  if (!maps) return maps.error();
  const bool cuda = std::any_of(maps->begin(), maps->end(), [](const ProcMapping& m) {
    return m.path.find("/libcuda.so") != std::string::npos;
  });
  if (!cuda) return process_error(pid, EINVAL, "it has no libcuda loaded: it does not use CUDA");
  return {};
}

Result<Mailbox> load_agent(int pid, int restore_tid, const AgentOptions& options) {
  for (int attempt = 0; attempt < 2; attempt++) {
    auto found = find_or_load(pid, restore_tid, options);
    if (!found) return found.error();
    if (!*found) {
      return process_error(pid, ENOEXEC,
                           "it did not load phos's agent; /proc must be mounted in it, and a "
                           "security module may forbid executable memfds");
    }
    Mailbox mailbox = std::move(**found);
    auto in_time = mailbox.wait_started(options.start_timeout);
    if (!in_time) return in_time.error();
    if (!*in_time) return process_error(pid, ETIMEDOUT, "phos's agent in it does not start");
    // A phosd that died may have left a command under way, EXIT for one, or after it.
    if (!mailbox.idle()) mailbox.cancel();
    auto idle = is_over(mailbox) ? Result<bool>(true) : mailbox.wait_idle(options.command_timeout);
    if (!idle) return idle.error();
    if (!*idle) {
      return process_error(pid, ETIMEDOUT,
                           "phos's agent in it is still busy with an earlier question; the process "
                           "is stopped or locked, or its driver hangs");
    }
    const phos_agent_state state = mailbox.state();
    if (state == PHOS_AGENT_READY) {
      if (has_agent_thread(pid)) return mailbox;
      return process_error(pid, ESRCH, "the thread of phos's agent in it is gone");
    }
    const Error failure = start_error(pid, mailbox.shared());
    auto removed = remove_agent(pid, restore_tid, options, std::move(mailbox));
    if (!removed) return removed.error();
    if (state == PHOS_AGENT_FAILED) return failure;
    // ENDED: a phosd died before it had removed the agent. Now there is room for a new one.
  }
  return process_error(pid, EBUSY, "phos's agent in it is being unloaded; try again");
}

Result<void> remove_agent(int pid, int restore_tid, const AgentOptions& options, Mailbox mailbox) {
  const auto deadline = steady_clock::now() + options.start_timeout;
  while (has_agent_thread(pid)) {
    if (steady_clock::now() > deadline) {
      return process_error(pid, ETIMEDOUT, "the thread of phos's agent in it does not end");
    }
    std::this_thread::sleep_for(kPollInterval);
  }
  auto thread = attach_restore_thread(pid, restore_tid);
  if (!thread) return thread.error();
  Loader loader(pid, std::move(*thread), options.start_timeout);
  if (auto r = loader.close_leftovers(); !r) return r;
  // A phosd that died may have had the thread do so already.
  if (!mailbox.mapped()) return {};
  return loader.remove(mailbox.shared().finish_function);
}

Result<void> remove_leftovers(int pid, int restore_tid, const AgentOptions& options) {
  auto mailbox = Mailbox::find(pid);
  if (!mailbox) return mailbox.error();
  if (*mailbox) {
    if (!is_over(**mailbox)) return {};
    return remove_agent(pid, restore_tid, options, std::move(**mailbox));
  }
  if (find_fds(pid, kAgentFds).empty()) return {};
  auto thread = attach_restore_thread(pid, restore_tid);
  if (!thread) return thread.error();
  return Loader(pid, std::move(*thread), options.start_timeout).close_leftovers();
}

}  // namespace phos
