// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/daemon/session.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "gpu-tracker/abi/version.h"
#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/daemon/host_memory.h"

namespace phos {
namespace {

using std::chrono::duration_cast;
using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr auto kRecoverPoll = std::chrono::milliseconds(10);

microseconds since(steady_clock::time_point start) {
  return duration_cast<microseconds>(steady_clock::now() - start);
}

std::string process(int pid) {
  return "process " + std::to_string(pid);
}

bool is_cuda_error(const Error& e, int code) {
  return e.domain() == Domain::kCuda && e.code() == code;
}

Error refuse(int pid, const std::string& why) {
  return Error(Domain::kUsage, EBUSY, "cannot checkpoint " + process(pid) + ": " + why);
}

std::string megabytes(uint64_t bytes) {
  return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB";
}

// With these settings NCCL talks through plain shared memory, which restores (seen on driver 580).
#define PHOS_NCCL_REMEDY "NCCL_P2P_DISABLE=1 NCCL_CUMEM_HOST_ENABLE=0"

// Memory that another process exported: the driver (580) checkpoints such a process and then
// cannot restore it (errors 1 and 801).
Error refuse_imports(int pid, uint64_t bytes) {
  return refuse(pid,
                "it has imported " + megabytes(bytes) +
                    " of GPU memory from another process (CUDA IPC or NCCL peer-to-peer), which "
                    "NVIDIA's driver cannot restore. NCCL: start the job with " PHOS_NCCL_REMEDY
                    "; other programs: close the imported memory first");
}

Error refuse_virtual_host_memory(int pid, uint64_t bytes) {
  return refuse(pid, "it has " + megabytes(bytes) +
                         " of host memory made by cuMemCreate (as NCCL's shared-memory transport "
                         "makes), which NVIDIA's driver cannot restore. NCCL: start the job "
                         "with " PHOS_NCCL_REMEDY);
}

}  // namespace

Session::Session(GpuDriver& driver, std::string lock_dir)
    : driver_(driver), lock_dir_(std::move(lock_dir)) {}

Result<void> Session::begin_dump(UniqueFd image_dir) {
  image_dir_ = std::move(image_dir);
  if (getrandom(dump_id_.data(), dump_id_.size(), 0) != static_cast<ssize_t>(dump_id_.size())) {
    return Error::from_errno(errno, "getrandom");
  }
  files_.dump_id = dump_id_;
  dumping_ = true;
  return remove_all_images(image_dir_.get());
}

Result<FilesImage> Session::begin_restore(UniqueFd image_dir) {
  image_dir_ = std::move(image_dir);
  auto set = read_image_set(image_dir_.get());
  if (!set) return set.error();
  if (!set->processes.empty()) {
    auto api = driver_.api_version();
    if (!api) return api.error();
    auto gpus = driver_.gpus();
    if (!gpus) return gpus.error();
    for (const auto& p : set->processes) {
      if (auto r = check_driver(p, *api); !r) return r.error();
      auto pairs = plan_gpu_mapping(p.gpus, *gpus);
      if (!pairs) return pairs.error();
      gpu_pairs_ = *pairs;
    }
  }
  restored_ = std::move(*set);
  return restored_.files;
}

Result<UniqueFd> Session::lock_process(int pid, uint64_t start_time) const {
  const std::string path = lock_dir_ + "/" + std::to_string(pid) + "-" + std::to_string(start_time);
  UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Error::from_errno(errno, "creating the lock file " + path);
  if (flock(fd.get(), LOCK_EX | LOCK_NB) < 0) {
    if (errno != EWOULDBLOCK) return Error::from_errno(errno, "locking " + path);
    return refuse(pid, "another dump of it is under way; wait for that one");
  }
  // Whoever held the lock before may have removed the name in between: then this lock guards
  // nothing, and the other dump has only just ended.
  struct stat by_fd, by_name;
  if (fstat(fd.get(), &by_fd) < 0 || stat(path.c_str(), &by_name) < 0 ||
      by_fd.st_ino != by_name.st_ino) {
    return refuse(pid, "another dump of it has just ended; try again");
  }
  return fd;
}

// What the driver would checkpoint but could not restore.
Result<void> Session::check_restorable(int pid, Held* held) const {
  if (auto memory = driver_.process_memory(pid)) {
    held->memory = *memory;
    if (memory->imported) return refuse_imports(pid, memory->imported);
  } else {
    log(LogLevel::kWarn, "daemon", "%s: cannot tell whether it uses memory of another process (%s)",
        process(pid).c_str(), memory.error().message().c_str());
  }
  if (auto bytes = find_virtual_host_memory(pid, held->restore_tid)) {
    if (*bytes) return refuse_virtual_host_memory(pid, *bytes);
  } else {
    log(LogLevel::kWarn, "daemon", "%s: cannot tell whether it shares host memory (%s)",
        process(pid).c_str(), bytes.error().message().c_str());
  }
  return {};
}

Result<PauseResult> Session::pause(int pid, unsigned timeout_ms) {
  auto tid = driver_.restore_thread_id(pid);
  if (!tid) {
    // 3: no CUDA in it. 304: libcuda could not look; a process that is gone is CRIU's to report.
    if (is_cuda_error(tid.error(), kCudaErrorNotInitialized)) return PauseResult{};
    if (!read_proc_status(pid)) return PauseResult{};
    return refuse(pid, tid.error().message());
  }
  auto status = read_proc_status(pid);
  if (!status) return PauseResult{};
  if (status->state == 'T') {
    return refuse(pid,
                  "it is stopped (SIGSTOP), and NVIDIA's driver needs it running; send it SIGCONT "
                  "first");
  }
  if (status->tracer_pid != 0) {
    return refuse(pid, "process " + std::to_string(status->tracer_pid) +
                           " is tracing it (a debugger or another dump); end that first");
  }
  if (held_.count(pid)) return refuse(pid, "this dump has already paused it");

  Held held;
  held.restore_tid = *tid;
  auto start_time = read_start_time(pid);
  if (!start_time) return PauseResult{};
  held.start_time = *start_time;
  auto lock_file = lock_process(pid, held.start_time);
  if (!lock_file) return lock_file.error();
  held.lock_file = std::move(*lock_file);

  auto state = driver_.state(pid);
  if (!state) return state.error();
  held.found = *state;
  if (*state == CudaState::kFailed) {
    return refuse(pid, "an earlier checkpoint or restore of it failed in NVIDIA's driver");
  }

  if (gpus_.empty()) {
    auto gpus = driver_.gpus();
    if (!gpus) return gpus.error();
    gpus_ = std::move(*gpus);
  }

  if (*state != CudaState::kCheckpointed) {
    if (auto r = check_restorable(pid, &held); !r) return r.error();
  }

  if (*state == CudaState::kRunning) {
    const auto start = steady_clock::now();
    if (auto r = driver_.lock(pid, timeout_ms); !r) {
      // The driver undoes a lock that timed out; make sure, so that no failure leaves it locked.
      if (auto now = driver_.state(pid); now && *now == CudaState::kLocked) {
        (void)driver_.unlock(pid).ok();
      }
      if (is_cuda_error(r.error(), kCudaErrorNotReady)) {
        return refuse(pid, "its GPU work did not finish within " + std::to_string(timeout_ms) +
                               " ms; raise criu's --timeout, or dump between two pieces of work");
      }
      return refuse(pid, r.error().message());
    }
    held.lock_time = since(start);
  }
  log(LogLevel::kInfo, "daemon", "%s: %s, %s of GPU memory, locked in %.1f ms",
      process(pid).c_str(), to_string(held.found), megabytes(held.memory.own).c_str(),
      held.lock_time.count() / 1000.0);
  PauseResult result{true, held.restore_tid, held.found};
  held_.emplace(pid, std::move(held));
  return result;
}

Result<void> Session::checkpoint(int pid) {
  auto it = held_.find(pid);
  if (it == held_.end()) {
    // CUDA may have been initialised after pause() looked.
    auto tid = driver_.restore_thread_id(pid);
    if (!tid) return {};
    return refuse(pid, "it began to use CUDA while it was being dumped; try again");
  }
  Held& held = it->second;
  const auto start = steady_clock::now();
  if (held.found != CudaState::kCheckpointed) {
    if (auto r = driver_.checkpoint(pid); !r) {
      if (is_cuda_error(r.error(), kCudaErrorNotSupported)) {
        return refuse(
            pid,
            "NVIDIA's driver refuses it (CUDA_ERROR_NOT_SUPPORTED): it uses managed memory "
            "(cudaMallocManaged) or another feature the driver cannot checkpoint");
      }
      return refuse(pid, r.error().message());
    }
  }
  const auto took = since(start);
  log(LogLevel::kInfo, "daemon", "%s: GPU memory moved to host memory in %.1f ms",
      process(pid).c_str(), took.count() / 1000.0);
  return write_image(pid, held, took);
}

Result<void> Session::write_image(int pid, const Held& held, microseconds checkpoint_time) {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto release = driver_.release();
  if (!release) return release.error();
  auto api = driver_.api_version();
  if (!api) return api.error();
  ProcessImage image;
  image.dump_id = dump_id_;
  image.pid = status->vpid;
  image.comm = status->comm;
  image.state = held.found;
  image.driver_release = *release;
  image.driver_api = *api;
  image.created_us = static_cast<uint64_t>(
      duration_cast<microseconds>(std::chrono::system_clock::now().time_since_epoch()).count());
  image.phos_version = PHOS_VERSION;
  image.gpus = gpus_;
  image.device_bytes = held.memory.own;
  image.timings.lock_us = static_cast<uint64_t>(held.lock_time.count());
  image.timings.checkpoint_us = static_cast<uint64_t>(checkpoint_time.count());
  return write_process_image(image_dir_.get(), image);
}

Result<void> Session::bring_back(int pid, CudaState target) {
  auto state = driver_.state(pid);
  if (!state) return state.error();
  if (*state == CudaState::kCheckpointed && target != CudaState::kCheckpointed) {
    if (auto r = driver_.restore(pid, gpu_pairs_); !r) return r;
    state = CudaState::kLocked;
  }
  if (*state == CudaState::kLocked && target == CudaState::kRunning) {
    if (auto r = driver_.unlock(pid); !r) return r;
  }
  return {};
}

Result<void> Session::undo(int pid, CudaState found) {
  auto it = held_.find(pid);
  if (it != held_.end()) found = it->second.found;
  if (auto r = bring_back(pid, found); !r) return r;
  log(LogLevel::kInfo, "daemon", "%s: back to %s", process(pid).c_str(), to_string(found));
  if (it != held_.end()) held_.erase(it);
  return {};
}

Result<PauseResult> Session::find_restored(int pid) {
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto is_it = [&](const ProcessImage& p) { return p.pid == status->vpid; };
  bool in_images = std::any_of(restored_.processes.begin(), restored_.processes.end(), is_it);
  auto tid = driver_.restore_thread_id(pid);
  if (tid && in_images) return PauseResult{true, *tid, CudaState::kCheckpointed};
  if (!tid && !in_images) return PauseResult{};
  if (tid) {
    return Error(Domain::kFormat, ENOENT,
                 process(pid) + " uses CUDA, but there is no phos-" + std::to_string(status->vpid) +
                     ".img: the image directory is incomplete");
  }
  return tid.error();
}

Result<PauseResult> Session::resume(int pid) {
  auto found = find_restored(pid);
  if (!found || !found->is_cuda) return found;
  auto status = read_proc_status(pid);
  if (!status) return status.error();
  auto image = std::find_if(restored_.processes.begin(), restored_.processes.end(),
                            [&](const ProcessImage& p) { return p.pid == status->vpid; });
  const auto start = steady_clock::now();
  if (auto r = bring_back(pid, image->state); !r) {
    return r.error().wrap("GPU state of " + process(pid) + " cannot be restored");
  }
  log(LogLevel::kInfo, "daemon", "%s: GPU memory restored in %.1f ms, now %s", process(pid).c_str(),
      since(start).count() / 1000.0, to_string(image->state));
  return found;
}

Result<void> Session::add_file(const DeviceFile& file) {
  files_.files.push_back(file);
  return write_files_image(image_dir_.get(), files_);
}

Result<void> Session::finish(bool success) {
  finished_ = success;
  if (dumping_ && !success) return remove_images(image_dir_.get(), dump_id_);
  return {};
}

bool Session::recover_one(int pid, const Held& held) {
  auto start_time = read_start_time(pid);
  auto status = read_proc_status(pid);
  if (!start_time || *start_time != held.start_time || !status || status->state == 'Z' ||
      status->state == 'X') {
    return true;  // killed, as a successful dump does
  }
  // Frozen tasks: CRIU still has them, or a cgroup. The driver would block on them.
  auto restore_thread = read_proc_status(held.restore_tid);
  if (!restore_thread) return true;
  if (status->tracer_pid || restore_thread->tracer_pid || restore_thread->state == 'T') {
    return false;
  }
  if (auto r = bring_back(pid, held.found); !r) {
    if (!read_proc_status(pid)) return true;
    log(LogLevel::kError, "daemon", "%s goes on without its GPU state: %s", process(pid).c_str(),
        r.error().message().c_str());
  } else {
    log(LogLevel::kInfo, "daemon", "%s was left running; back to %s", process(pid).c_str(),
        to_string(held.found));
  }
  return true;
}

void Session::recover() {
  if (dumping_ && !finished_) {
    if (auto r = remove_images(image_dir_.get(), dump_id_); !r) {
      log(LogLevel::kWarn, "daemon", "%s", r.error().message().c_str());
    }
  }
  while (!held_.empty()) {
    for (auto it = held_.begin(); it != held_.end();) {
      it = recover_one(it->first, it->second) ? held_.erase(it) : std::next(it);
    }
    if (!held_.empty()) std::this_thread::sleep_for(kRecoverPoll);
  }
}

}  // namespace phos
