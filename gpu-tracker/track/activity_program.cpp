// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/activity_program.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "gpu-tracker/track/activity_object.h"

namespace phos {
namespace {

size_t state_bytes() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (sizeof(phos_activity_state) + page - 1) / page * page;
}

}  // namespace

Result<std::unique_ptr<ActivityProgram>> ActivityProgram::load(uint32_t ring_bytes,
                                                               uint32_t writes_count) {
  use_libbpf_log();
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
  bpf_map* writes = bpf_object__find_map_by_name(p->object_, "writes");
  if (!program || !records || !state || !writes) {
    return Error(Domain::kFormat, EINVAL, "the BPF object of the activity counters is incomplete");
  }
  bpf_program__set_expected_attach_type(program, static_cast<bpf_attach_type>(kTraceUprobeMulti));
  if (int r = bpf_map__set_max_entries(records, ring_bytes); r < 0) {
    return bpf_error(-r, "sizing the ring of the activity counters");
  }
  if (int r = bpf_map__set_max_entries(writes, writes_count); r < 0) {
    return bpf_error(-r, "sizing the destinations of the activity counters");
  }
  if (int r = bpf_object__load(p->object_); r < 0) {
    return bpf_error(-r, "loading the BPF program of the activity counters");
  }
  p->program_fd_ = bpf_program__fd(program);
  p->writes_fd_ = bpf_map__fd(writes);
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
  return attach_uprobe_multi(program_fd_, pid, path, targets);
}

Result<void> ActivityProgram::consume(
    const std::function<void(const phos_activity_record&)>& handler) {
  handler_ = handler;
  const int r = ring_buffer__consume(ring_);
  handler_ = nullptr;
  if (r < 0) return bpf_error(-r, "reading the ring of the activity counters");
  return {};
}

Result<void> ActivityProgram::take_writes(std::vector<phos_activity_write>* to) {
  constexpr uint32_t kBatch = 4096;
  std::vector<phos_activity_write> keys(kBatch);
  std::vector<uint32_t> values(kBatch);
  uint64_t position = 0;
  void* from = nullptr;
  while (true) {
    uint32_t count = kBatch;
    const int r = bpf_map_lookup_and_delete_batch(writes_fd_, from, &position, keys.data(),
                                                  values.data(), &count, nullptr);
    const int code = r < 0 ? errno : 0;
    if (code != 0 && code != ENOENT) return bpf_error(code, "reading where copies have gone");
    to->insert(to->end(), keys.begin(), keys.begin() + count);
    if (code == ENOENT) return {};  // that was the last batch
    from = &position;
  }
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
