// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/gate/gate_program.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

#include "gpu-tracker/gate/gate_object.h"
#include "gpu-tracker/track/uprobe_multi.h"

namespace phos {
namespace {

constexpr ino_t kInitialPidNamespace = 0xEFFFFFFC;  // include/linux/proc_ns.h: PROC_PID_INIT_INO
constexpr char kKernelTypes[] = "/sys/kernel/btf/vmlinux";

Result<void> check_kernel() {
  struct stat st;
  if (stat("/proc/self/ns/pid", &st) < 0) {
    return Error::from_errno(errno, "looking at /proc/self/ns/pid");
  }
  if (st.st_ino != kInitialPidNamespace) {
    return Error(Domain::kErrno, ENOTSUP,
                 "the gate needs phosd to run in the initial pid namespace, as the kernel numbers "
                 "threads by it");
  }
  if (access(kKernelTypes, R_OK) < 0) {
    return Error(Domain::kErrno, ENOTSUP,
                 std::string("the gate needs a kernel with BTF: there is no ") + kKernelTypes);
  }
  return {};
}

size_t state_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

Result<std::unique_ptr<GateProgram>> GateProgram::load(pid_t pid, int signal) {
  if (auto r = check_kernel(); !r) return r.error();
  use_libbpf_log();
  const auto code = gate_bpf_object();
  std::unique_ptr<GateProgram> p(new GateProgram);
  p->pid_ = pid;
  DECLARE_LIBBPF_OPTS(bpf_object_open_opts, options, .object_name = "phos_gate");
  // libbpf_get_error: before 1.0 errors come as pointers.
  bpf_object* object = bpf_object__open_mem(code.data(), code.size(), &options);
  if (const long r = libbpf_get_error(object)) {
    return bpf_error(static_cast<int>(-r), "opening the BPF program of the gate");
  }
  p->object_ = object;
  bpf_program* program = bpf_object__find_program_by_name(object, "gate");
  bpf_map* state = bpf_object__find_map_by_name(object, "state");
  bpf_map* exempt = bpf_object__find_map_by_name(object, "exempt");
  if (!program || !state || !exempt) {
    return Error(Domain::kFormat, EINVAL, "the BPF object of the gate is incomplete");
  }
  bpf_program__set_expected_attach_type(program, static_cast<bpf_attach_type>(kTraceUprobeMulti));
  if (int r = bpf_object__load(object); r < 0) {
    return bpf_error(-r, "loading the BPF program of the gate");
  }
  p->program_fd_ = bpf_program__fd(program);
  p->exempt_fd_ = bpf_map__fd(exempt);
  if (auto r = p->map_state(bpf_map__fd(state)); !r) return r.error();
  p->state_->signal = static_cast<uint32_t>(signal);
  p->state_->process = static_cast<uint32_t>(pid);
  return p;
}

Result<void> GateProgram::map_state(int map_fd) {
  void* shared = mmap(nullptr, state_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, map_fd, 0);
  if (shared == MAP_FAILED) return bpf_error(errno, "mapping the gate's state");
  state_ = static_cast<phos_gate_state*>(shared);
  return {};
}

Result<std::unique_ptr<GateProgram>> GateProgram::adopt(pid_t pid, int link_fd) {
  const std::string what = "asking about a gate of process " + std::to_string(pid);
  bpf_link_info link = {};
  uint32_t size = sizeof link;
  if (bpf_obj_get_info_by_fd(link_fd, &link, &size) < 0) return bpf_error(errno, what);
  UniqueFd program(bpf_prog_get_fd_by_id(link.prog_id));
  if (!program) return bpf_error(errno, what);
  std::array<uint32_t, 8> maps = {};
  bpf_prog_info info = {};
  size = sizeof info;
  info.nr_map_ids = maps.size();
  info.map_ids = reinterpret_cast<uint64_t>(maps.data());
  if (bpf_obj_get_info_by_fd(program.get(), &info, &size) < 0) return bpf_error(errno, what);
  std::unique_ptr<GateProgram> p(new GateProgram);
  p->pid_ = pid;
  p->program_fd_ = program.get();
  p->adopted_.reserve(1 + maps.size());
  p->adopted_.push_back(std::move(program));
  for (size_t i = 0; i < std::min<size_t>(info.nr_map_ids, maps.size()); i++) {
    UniqueFd map(bpf_map_get_fd_by_id(maps[i]));
    bpf_map_info about = {};
    size = sizeof about;
    if (!map || bpf_obj_get_info_by_fd(map.get(), &about, &size) < 0) return bpf_error(errno, what);
    const std::string name = about.name;
    if (name == "exempt") p->exempt_fd_ = map.get();
    // Of another version of phos it has another size.
    if (name == "state" && about.value_size == sizeof(phos_gate_state) && !p->state_) {
      if (auto r = p->map_state(map.get()); !r) return r.error();
    }
    p->adopted_.push_back(std::move(map));
  }
  if (p->exempt_fd_ < 0 || !p->state_ || p->state_->process != static_cast<uint32_t>(pid)) {
    return Error(Domain::kErrno, EPROTO,
                 "what keeps the gate of process " + std::to_string(pid) +
                     " closed was not made by this version of phos");
  }
  return p;
}

GateProgram::~GateProgram() {
  if (state_) munmap(state_, state_bytes());
  bpf_object__close(object_);
}

Result<void> GateProgram::exempt(int tid) {
  const auto key = static_cast<uint32_t>(tid);
  const uint32_t value = 1;
  if (bpf_map_update_elem(exempt_fd_, &key, &value, BPF_ANY) == 0) return {};
  return bpf_error(errno, "letting thread " + std::to_string(tid) + " pass the gate");
}

Result<UniqueFd> GateProgram::attach(const std::string& path,
                                     const std::vector<uint64_t>& offsets) const {
  std::vector<UprobeTarget> targets;
  for (const uint64_t offset : offsets) targets.push_back({offset, 0});
  return attach_uprobe_multi(program_fd_, pid_, path, targets);
}

void GateProgram::set_closed(bool closed) {
  __atomic_store_n(&state_->closed, closed ? 1u : 0u, __ATOMIC_RELEASE);
}

Result<uint64_t> GateProgram::missed_runs() const {
  bpf_prog_info info = {};
  uint32_t size = sizeof info;
  if (bpf_obj_get_info_by_fd(program_fd_, &info, &size) < 0) {
    return bpf_error(errno, "asking about the BPF program of the gate");
  }
  return info.recursion_misses;
}

}  // namespace phos
