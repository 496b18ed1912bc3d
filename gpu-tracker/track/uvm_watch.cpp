// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_watch.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/track/uprobe_multi.h"
#include "gpu-tracker/track/uvm_layout.h"
#include "gpu-tracker/track/uvm_object.h"

namespace phos {
namespace {

const char* const kEpochMaps[] = {"epoch_a", "epoch_b"};
constexpr char kFinder[] = "uvm_find_process";

// union bpf_iter_link_info of Linux 6.1, for iter/task; older headers lack it.
struct TaskIteration {
  uint32_t tid, pid, pid_fd, padding;
};

size_t state_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

uint64_t read_counter(const __u64& counter) {
  return __atomic_load_n(&counter, __ATOMIC_ACQUIRE);
}

// All that a map holds, and with `remove` takes it out. The map may be written to meanwhile, then
// what is written may be missing. Returns 0 or an errno value.
int read_map(int map, bool remove, UvmEpoch* epoch) {
  constexpr uint32_t kBatch = 4096;
  std::vector<uint64_t> keys(kBatch);
  std::vector<phos_uvm_record> records(kBatch);
  uint64_t position = 0;
  void* from = nullptr;
  while (true) {
    uint32_t count = kBatch;
    const int r = remove ? bpf_map_lookup_and_delete_batch(map, from, &position, keys.data(),
                                                           records.data(), &count, nullptr)
                         : bpf_map_lookup_batch(map, from, &position, keys.data(), records.data(),
                                                &count, nullptr);
    const int code = r < 0 ? errno : 0;
    if (code != 0 && code != ENOENT) return code;
    for (uint32_t i = 0; i < count; i++) epoch->add(keys[i], records[i]);
    if (code == ENOENT) return 0;  // that was the last batch
    from = &position;
  }
}

void add_call(const phos_uvm_call& call, UvmEpoch* epoch) {
  if (call.anywhere || call.length) {
    epoch->add_doubt("a call is under way that may make any memory writable");
  } else if (call.start < call.end) {
    epoch->add(call.start | PHOS_UVM_RANGE, {{call.end}});
  }
}

}  // namespace

struct UvmWatch::Programs {
  std::span<const uint8_t> (*object)();
  const char* name;
  std::vector<const char*> recorders;  // attached last to first
  const char* calls;                   // the map of those under way
};

const UvmWatch::Programs UvmWatch::kGrants = {
    uvm_bpf_object,
    "phos_uvm",
    {"uvm_map", "uvm_write", "uvm_range_made", "uvm_range_gone"},
    nullptr};
const UvmWatch::Programs UvmWatch::kCalls = {
    uvm_calls_bpf_object, "phos_uvm_calls", {"uvm_call_begins", "uvm_call_ends"}, "calls"};

Result<std::unique_ptr<UvmWatch>> UvmWatch::start(pid_t pid, uint32_t chunks) {
  if (auto r = check_uvm_layout(); !r) return r.error();
  return start(pid, chunks, kGrants);
}

Result<std::unique_ptr<UvmWatch>> UvmWatch::start_calls(pid_t pid, uint32_t calls) {
  return start(pid, calls, kCalls);
}

Result<std::unique_ptr<UvmWatch>> UvmWatch::start(pid_t pid, uint32_t chunks,
                                                  const Programs& programs) {
  std::unique_ptr<UvmWatch> watch(new UvmWatch(pid, programs));
  watch->process_ = UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  if (!watch->process_) {
    return Error::from_errno(errno, "watching managed memory of process " + std::to_string(pid));
  }
  if (auto r = watch->load(chunks); !r) return r.error();
  auto program = watch->program();
  if (!program) return program.error();
  if (program->mm == 0) {
    return Error::from_errno(ESRCH, "watching managed memory of process " + std::to_string(pid));
  }
  watch->program_ = *program;
  __atomic_store_n(&watch->state_->mm, program->mm, __ATOMIC_RELEASE);
  if (auto r = watch->attach(); !r) return r.error();
  return watch;
}

Result<void> UvmWatch::load(uint32_t chunks) {
  use_libbpf_log();
  const auto code = programs_.object();
  DECLARE_LIBBPF_OPTS(bpf_object_open_opts, open_options, .object_name = programs_.name);
  bpf_object* object = bpf_object__open_mem(code.data(), code.size(), &open_options);
  if (const long r = libbpf_get_error(object)) {
    return bpf_error(static_cast<int>(-r), "opening the BPF programs of the write tracker");
  }
  object_ = object;
  for (const char* name : programs_.recorders) {
    recorders_.push_back(bpf_object__find_program_by_name(object_, name));
  }
  for (const char* name : kEpochMaps) {
    bpf_map__set_max_entries(bpf_object__find_map_by_name(object_, name), chunks);
  }
  if (int r = bpf_object__load(object_); r < 0) {
    return bpf_error(-r, "loading the BPF programs of the write tracker");
  }
  void* shared = mmap(nullptr, state_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED,
                      bpf_map__fd(bpf_object__find_map_by_name(object_, "state")), 0);
  if (shared == MAP_FAILED) return bpf_error(errno, "mapping the write tracker's state");
  state_ = static_cast<phos_uvm_state*>(shared);
  return {};
}

// Ranges first: a range made while this runs is recorded, or its grants are.
Result<void> UvmWatch::attach() {
  for (auto it = recorders_.rbegin(); it != recorders_.rend(); ++it) {
    bpf_link* link = bpf_program__attach(*it);
    if (const long r = libbpf_get_error(link)) {
      return bpf_error(static_cast<int>(-r), "attaching the write tracker");
    }
    links_.push_back(link);
  }
  auto losses = this->losses();
  if (!losses) return losses.error();
  losses_ = *losses;
  return {};
}

UvmWatch::~UvmWatch() {
  for (bpf_link* link : links_) bpf_link__destroy(link);
  if (state_) munmap(state_, state_bytes());
  bpf_object__close(object_);
}

Result<UvmWatch::Program> UvmWatch::program() {
  const std::string what = "finding the memory of process " + std::to_string(pid_);
  TaskIteration iteration = {};
  iteration.pid_fd = static_cast<uint32_t>(process_.get());
  DECLARE_LIBBPF_OPTS(bpf_iter_attach_opts, options,
                      .link_info = reinterpret_cast<bpf_iter_link_info*>(&iteration),
                      .link_info_len = sizeof iteration);
  bpf_program* finder = bpf_object__find_program_by_name(object_, kFinder);
  __atomic_store_n(&state_->found_mm, 0, __ATOMIC_RELEASE);
  bpf_link* link = bpf_program__attach_iter(finder, &options);
  if (const long r = libbpf_get_error(link)) return bpf_error(static_cast<int>(-r), what);
  UniqueFd tasks(bpf_iter_create(bpf_link__fd(link)));
  const int code = errno;
  bpf_link__destroy(link);
  if (!tasks) return bpf_error(code, what);
  char none;
  if (read(tasks.get(), &none, sizeof none) < 0) return bpf_error(errno, what);
  return Program{read_counter(state_->found_mm), read_counter(state_->found_program)};
}

Result<UvmWatch::Losses> UvmWatch::losses() const {
  Losses l;
  l.full = read_counter(state_->full);
  l.unread = read_counter(state_->unread);
  l.unowned = read_counter(state_->unowned);
  l.anywhere = read_counter(state_->anywhere);
  for (bpf_program* recorder : recorders_) {
    bpf_prog_info info = {};
    uint32_t size = sizeof info;
    if (bpf_obj_get_info_by_fd(bpf_program__fd(recorder), &info, &size) < 0) {
      return bpf_error(errno, "asking about the write tracker's programs");
    }
    l.missed += info.recursion_misses;
  }
  return l;
}

// Adds the doubts about an epoch before which the losses were `before`, and which has ended.
void UvmWatch::judge(const Losses& before, UvmEpoch* epoch) {
  const std::string process = "process " + std::to_string(pid_);
  auto now = losses();
  if (!now) {
    epoch->add_doubt(now.error().message());
  } else if (!(*now == before)) {
    epoch->add_doubt("of its grants " + std::to_string(now->full - before.full) +
                     " found no room, " + std::to_string(now->unread - before.unread) +
                     " could not be read, " + std::to_string(now->unowned - before.unowned) +
                     " have no owner, " + std::to_string(now->missed - before.missed) +
                     " came while another was recorded, " +
                     std::to_string(now->anywhere - before.anywhere) +
                     " calls may have made any memory writable");
  }
  if (doubt_.empty()) {
    pollfd exit = {process_.get(), POLLIN, 0};
    auto now = program();
    if (poll(&exit, 1, 0) != 0) {
      doubt_ = process + " has ended";
    } else if (!now) {
      doubt_ = now.error().message();
    } else if (!(*now == program_)) {
      doubt_ = process + " has executed another program";
    } else if (read_counter(state_->spaces) != 0) {
      doubt_ = process + " has opened nvidia-uvm once more, or ended with it";
    }
  }
  if (!doubt_.empty()) epoch->add_doubt(doubt_);
}

// Calls under way now: in the epoch that has just ended and in the one that has just begun.
void UvmWatch::note_calls(UvmEpoch* epoch) {
  for (const phos_uvm_call& call : under_way_) add_call(call, epoch);
  under_way_.clear();
  if (!programs_.calls) return;
  const int map = bpf_map__fd(bpf_object__find_map_by_name(object_, programs_.calls));
  uint32_t count = bpf_map__max_entries(bpf_object__find_map_by_name(object_, programs_.calls));
  std::vector<uint32_t> threads(count);
  under_way_.resize(count);
  uint64_t position = 0;
  // A call that ends meanwhile is recorded where it ends. What began later may be in it, too.
  const int r = bpf_map_lookup_batch(map, nullptr, &position, threads.data(), under_way_.data(),
                                     &count, nullptr);
  if (r < 0 && errno == ENOENT) {
    under_way_.resize(count);  // that was all
  } else {
    under_way_.assign(1, {0, 0, 0, /*anywhere=*/1});
  }
  for (const phos_uvm_call& call : under_way_) add_call(call, epoch);
}

int UvmWatch::map(bool running) const {
  const char* name = kEpochMaps[running ? running_ : 1 - running_];
  return bpf_map__fd(bpf_object__find_map_by_name(object_, name));
}

UvmEpoch UvmWatch::next_epoch() {
  UvmEpoch epoch;
  const uint32_t slot = 0;
  const int next = map(false);
  // Before the next epoch begins: what is lost until it has begun counts for both.
  auto before_next = losses();
  if (!before_next) doubt_ = before_next.error().message();
  // Returns when no program uses the old map any more.
  if (bpf_map_update_elem(bpf_map__fd(bpf_object__find_map_by_name(object_, "running")), &slot,
                          &next, BPF_ANY) < 0) {
    doubt_ = "changing epochs fails: " + Error::from_errno(errno, "bpf").message();
    epoch.add_doubt(doubt_);
    return epoch;
  }
  running_ = 1 - running_;
  if (const int code = read_map(map(false), true, &epoch)) {
    epoch.add_doubt(bpf_error(code, "reading the record").message());
  }
  note_calls(&epoch);
  judge(losses_, &epoch);
  if (before_next) losses_ = *before_next;
  if (!epoch.doubt().empty()) {
    log(LogLevel::kWarn, "track", "managed memory of process %d may all be dirty: %s", pid_,
        epoch.doubt().c_str());
  }
  return epoch;
}

UvmEpoch UvmWatch::so_far() {
  UvmEpoch epoch;
  if (const int code = read_map(map(true), false, &epoch)) {
    epoch.add_doubt(bpf_error(code, "reading the record").message());
  }
  for (const phos_uvm_call& call : under_way_) add_call(call, &epoch);
  judge(losses_, &epoch);
  return epoch;
}

}  // namespace phos
