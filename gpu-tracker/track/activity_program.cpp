// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/activity_program.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/activity_object.h"

namespace phos {
namespace {

// include/uapi/linux/bpf.h of Linux 6.6; Debian 12's header is older.
constexpr unsigned kTraceUprobeMulti = 48;  // enum bpf_attach_type: BPF_TRACE_UPROBE_MULTI
struct LinkCreateUprobeMulti {              // union bpf_attr, link_create with uprobe_multi
  uint32_t prog_fd;
  uint32_t target_fd;
  uint32_t attach_type;
  uint32_t flags;
  uint64_t path;
  uint64_t offsets;
  uint64_t ref_ctr_offsets;
  uint64_t cookies;
  uint32_t count;
  uint32_t uprobe_flags;
  uint32_t pid;
  uint32_t padding;
};
static_assert(sizeof(LinkCreateUprobeMulti) == 64);
static_assert(offsetof(LinkCreateUprobeMulti, pid) == 56);

const char kNeedsRoot[] =
    "; BPF needs root (CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN), and a kernel whose lockdown or "
    "container allows it";

Error bpf_error(int code, const std::string& what) {
  Error e = Error::from_errno(code, what);
  if (code != EPERM && code != EACCES) return e;
  return Error(e.domain(), e.code(), e.message() + kNeedsRoot);
}

int print_libbpf(libbpf_print_level level, const char* format, va_list arguments) {
  char line[512];
  vsnprintf(line, sizeof line, format, arguments);
  line[strcspn(line, "\n")] = '\0';
  if (level != LIBBPF_DEBUG) log(LogLevel::kDebug, "track", "libbpf: %s", line);
  return 0;
}

size_t state_bytes() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (sizeof(phos_activity_state) + page - 1) / page * page;
}

}  // namespace

Result<std::unique_ptr<ActivityProgram>> ActivityProgram::load(uint32_t ring_bytes) {
  libbpf_set_print(print_libbpf);
  const auto code = activity_bpf_object();
  std::unique_ptr<ActivityProgram> p(new ActivityProgram);
  DECLARE_LIBBPF_OPTS(bpf_object_open_opts, options, .object_name = "phos_activity");
  // libbpf_get_error: before 1.0 errors come as pointers.
  bpf_object* object = bpf_object__open_mem(code.data(), code.size(), &options);
  if (const long r = libbpf_get_error(object)) {
    return bpf_error(static_cast<int>(-r), "opening the BPF program of the activity counters");
  }
  p->object_ = object;
  bpf_program* program = bpf_object__find_program_by_name(p->object_, "activity");
  bpf_map* records = bpf_object__find_map_by_name(p->object_, "records");
  bpf_map* state = bpf_object__find_map_by_name(p->object_, "state");
  if (!program || !records || !state) {
    return Error(Domain::kFormat, EINVAL, "the BPF object of the activity counters is incomplete");
  }
  bpf_program__set_expected_attach_type(program, static_cast<bpf_attach_type>(kTraceUprobeMulti));
  if (int r = bpf_map__set_max_entries(records, ring_bytes); r < 0) {
    return bpf_error(-r, "sizing the ring of the activity counters");
  }
  if (int r = bpf_object__load(p->object_); r < 0) {
    return bpf_error(-r, "loading the BPF program of the activity counters");
  }
  p->program_fd_ = bpf_program__fd(program);
  void* shared = mmap(nullptr, state_bytes(), PROT_READ, MAP_SHARED, bpf_map__fd(state), 0);
  if (shared == MAP_FAILED) return bpf_error(errno, "mapping the activity counters");
  p->state_ = static_cast<const phos_activity_state*>(shared);
  auto on_record = [](void* self, void* data, size_t size) {
    if (size >= sizeof(phos_activity_record)) {
      static_cast<ActivityProgram*>(self)->handler_(
          *static_cast<const phos_activity_record*>(data));
    }
    return 0;
  };
  ring_buffer* ring = ring_buffer__new(bpf_map__fd(records), on_record, p.get(), nullptr);
  if (const long r = libbpf_get_error(ring)) {
    return bpf_error(static_cast<int>(-r), "mapping the ring of the activity counters");
  }
  p->ring_ = ring;
  return p;
}

ActivityProgram::~ActivityProgram() {
  ring_buffer__free(ring_);
  if (state_) munmap(const_cast<phos_activity_state*>(state_), state_bytes());
  bpf_object__close(object_);
}

Result<UniqueFd> ActivityProgram::attach(pid_t pid, const std::string& path,
                                         const std::vector<UprobeTarget>& targets) const {
  std::vector<uint64_t> offsets, cookies;
  for (const UprobeTarget& t : targets) {
    offsets.push_back(t.offset);
    cookies.push_back(t.cookie);
  }
  LinkCreateUprobeMulti a = {};
  a.prog_fd = static_cast<uint32_t>(program_fd_);
  a.attach_type = kTraceUprobeMulti;
  a.path = reinterpret_cast<uint64_t>(path.c_str());
  a.offsets = reinterpret_cast<uint64_t>(offsets.data());
  a.cookies = reinterpret_cast<uint64_t>(cookies.data());
  a.count = static_cast<uint32_t>(targets.size());
  a.pid = static_cast<uint32_t>(pid);
  UniqueFd link(static_cast<int>(syscall(SYS_bpf, BPF_LINK_CREATE, &a, sizeof a)));
  if (link) return link;
  const int code = errno;
  const std::string what = "probing " + std::to_string(targets.size()) + " functions of " + path +
                           " in process " + std::to_string(pid);
  // An older kernel does not know the attach type, or finds bytes behind the attributes it knows.
  if (code == EINVAL || code == E2BIG) {
    return Error(Domain::kErrno, ENOTSUP,
                 what + ": the kernel has no uprobe_multi links (Linux 6.6 and newer have)");
  }
  return bpf_error(code, what);
}

Result<void> ActivityProgram::consume(
    const std::function<void(const phos_activity_record&)>& handler) {
  handler_ = handler;
  const int r = ring_buffer__consume(ring_);
  handler_ = nullptr;
  if (r < 0) return bpf_error(-r, "reading the ring of the activity counters");
  return {};
}

Result<uint64_t> ActivityProgram::missed_runs() const {
  bpf_prog_info info = {};
  uint32_t size = sizeof info;
  if (bpf_obj_get_info_by_fd(program_fd_, &info, &size) < 0) {
    return bpf_error(errno, "asking about the BPF program of the activity counters");
  }
  return info.recursion_misses;
}

}  // namespace phos
