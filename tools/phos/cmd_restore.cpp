// SPDX-License-Identifier: GPL-2.0-only
// phos restore: finds out before criu starts whether this machine can take the GPU state, then runs
// criu restore with the phos plugin and looks whether the process is really there.

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <thread>
#include <vector>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/base/proc.h"
#include "gpu-tracker/driver/cuda_driver.h"
#include "gpu-tracker/image/verify.h"
#include "tools/phos/command.h"
#include "tools/phos/criu_run.h"
#include "tools/phos/gpu_images.h"
#include "tools/phos/half_restored.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/processes.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

constexpr std::chrono::seconds kPidPatience{5};

namespace po = boost::program_options;

constexpr char kName[] = "restore";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "-D DIR [options] [-- CRIU-OPTION...]";
  s.about =
      "Brings back the process tree that `phos dump` or `criu dump` saved to DIR, after\n"
      "checking that this machine's driver and GPUs can take its GPU state. Words after\n"
      "-- go to `criu restore` as they are.\n";
  s.takes_criu_options = true;
  s.options.add_options()("images-dir,D", po::value<std::string>()->value_name("DIR")->required(),
                          "where the images are")("detach,d",
                                                  "return once the processes run (the default)")(
      "foreground,F", "stay until the root process ends")(
      "shell-job,j", "give the processes this terminal")("verbose,v", "print what the plugin does")(
      "verify", "read and check every page before anything is started, as `phos verify` does")(
      "json", "print the summary as JSON");
  add_key_option(&s);
  return s;
}

// Every page, from the files alone. The GPU checks them as well, but not before CRIU has restored.
Result<void> check_pages(int fd, const ImageSet& images, const std::string& path) {
  ProgressLine line;
  VerifyOptions how;
  how.max_damage = 1;
  how.progress = [&](uint64_t pages, uint64_t of) {
    line.draw("verifying " + path + ": " + format_bytes(pages * kImagePageSize) + " of " +
              format_bytes(of * kImagePageSize));
  };
  auto report = verify_images(fd, images, make_page_hasher, how);
  if (!report) return report.error();
  if (report->ok()) return {};
  return Error(Domain::kFormat, EBADMSG,
               path + " is damaged: " + std::to_string(report->damaged_pages) +
                   " of the saved pages are not what was saved; the first: " +
                   describe(report->damage.front()) + "; see phos verify --repair-from");
}

// Can the driver and GPUs of this machine take what `images` hold?
Result<void> check_machine(const ImageSet& images) {
  if (images.processes.empty()) return {};
  auto driver = open_cuda_driver();
  if (!driver) return driver.error().wrap("the dump holds CUDA processes");
  auto api = (*driver)->api_version();
  if (!api) return api.error();
  auto present = (*driver)->gpus();
  if (!present) return present.error();
  for (const ProcessImage& process : images.processes) {
    if (auto ok = check_driver(process, *api); !ok) return ok.error();
    if (auto plan = plan_gpu_mapping(process.gpus, *present); !plan) {
      return plan.error().wrap("process " + std::to_string(process.pid));
    }
  }
  return {};
}

// A directory for the pid file, which criu insists on making itself.
class PidFile {
 public:
  PidFile() {
    if (!mkdtemp(dir_)) dir_[0] = '\0';
  }
  ~PidFile() {
    if (!dir_[0]) return;
    unlink(path().c_str());
    rmdir(dir_);
  }
  PidFile(const PidFile&) = delete;
  PidFile& operator=(const PidFile&) = delete;

  bool ok() const { return dir_[0] != '\0'; }
  std::string path() const { return std::string(dir_) + "/pid"; }
  int read() const {
    int pid = 0;
    std::ifstream(path()) >> pid;
    return pid;
  }

 private:
  char dir_[32] = "/tmp/phos-restore-XXXXXX";
};

// CRIU ignores errors of the hook that restores GPU state, so its exit code is not the last word.
Result<ProcStatus> check_restored(int pid, const CriuRun& run) {
  for (const std::string& line : log_errors(run.log_path, SIZE_MAX)) {
    if (line.find("phos:") != std::string::npos) return Error(Domain::kCriu, EIO, line);
  }
  if (pid <= 0) return Error(Domain::kCriu, ESRCH, "criu has not told the pid of the process");
  auto status = read_proc_status(pid);
  if (!status || status->state == 'Z' || status->state == 'X') {
    return Error(Domain::kCriu, ESRCH, "process " + std::to_string(pid) + " has ended at once");
  }
  return status;
}

void print_summary(bool json, int pid, const std::string& comm, double seconds,
                   const ImageSet& images) {
  uint64_t on_gpu = gpu_bytes(images);
  if (json) {
    JsonWriter w;
    w.begin_object().member("pid", pid).member("command", comm);
    w.member("milliseconds", static_cast<uint64_t>(seconds * 1000));
    w.member("cuda_processes", images.processes.size()).member("gpu_bytes", on_gpu).end_object();
    printf("%s\n", w.str().c_str());
    return;
  }
  printf("restored process %d (%s) in %.2f s", pid, comm.c_str(), seconds);
  if (!images.processes.empty()) printf(", %s of GPU memory", format_bytes(on_gpu).c_str());
  printf("\n");
}

int run_and_verify(const Parsed& options, const std::string& dir, const ImageSet& images) {
  bool foreground = options.has("foreground");
  PidFile pid_file;
  if (!pid_file.ok()) return fail(kName, Error::from_errno(errno, "mkdtemp in /tmp").message());
  std::string log = dir + "/restore.log";
  CriuRun run{{"restore", "--enable-plugin", "phos", "-D", dir, "-o", "restore.log", "-v4",
               "--pidfile", pid_file.path()},
              log,
              "restore from " + dir,
              options.has("verbose")};
  if (!foreground) run.args.emplace_back("-d");
  if (options.has("shell-job")) run.args.emplace_back("--shell-job");
  run.args.insert(run.args.end(), options.criu_options.begin(), options.criu_options.end());

  auto start = prepare_criu(run);
  if (!start) return fail(kName, start.error().message());
  unlink(log.c_str());  // the reason of an earlier failure must not be taken for this one's
  // In the foreground this waits as long as the processes run, and their orphans are none of its.
  std::optional<HalfRestored> half_restored;
  if (!foreground) half_restored.emplace();
  auto exit = run_criu(run, *start);
  if (!exit) return fail(kName, exit.error().message());
  if (exit->code < 0 && half_restored) half_restored->kill(log);
  if (exit->code != 0) {
    report_failure(kName, "restoring from " + dir, run, *exit);
    return kExitFailed;
  }
  int pid = pid_file.read();
  auto status = check_restored(pid, run);
  // In the foreground criu has waited for the end of the process.
  bool ended = foreground && !status && status.error().code() == ESRCH && pid > 0;
  if (!status && !ended) {
    return fail(kName, "restoring from " + dir + ": " + status.error().message() +
                           "; criu's log is " + log);
  }
  if (!ended) print_summary(options.has("json"), pid, status->comm, exit->seconds, images);
  return kExitOk;
}

// CRIU gives the tasks the pids they had. A process that was just dumped keeps its pid until its
// parent has waited for it: that is worth a moment, and not CRIU's "Can't fork: File exists".
Result<void> wait_for_pids(int dir_fd) {
  std::vector<int> pids;
  UniqueFd copy(openat(dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  std::unique_ptr<DIR, int (*)(DIR*)> dir(copy ? fdopendir(copy.release()) : nullptr, closedir);
  if (!dir) return Error::from_errno(errno, "reading the image directory");
  while (dirent* entry = readdir(dir.get())) {
    int pid = 0, end = 0;
    if (sscanf(entry->d_name, "core-%d.img%n", &pid, &end) == 1 && end && !entry->d_name[end]) {
      pids.push_back(pid);
    }
  }
  std::sort(pids.begin(), pids.end());  // processes before their threads
  // With an init of its own the tree comes back in a pid namespace of its own.
  if (std::find(pids.begin(), pids.end(), 1) != pids.end()) return {};
  const auto deadline = std::chrono::steady_clock::now() + kPidPatience;
  for (int pid : pids) {
    for (;;) {
      auto holder = read_proc_status(pid);
      if (!holder) break;
      const std::string who = "pid " + std::to_string(pid) + ", which the images need, ";
      if (holder->state != 'Z' && holder->state != 'X') {
        return Error(Domain::kUsage, EEXIST,
                     who + "is in use (" + holder->comm +
                         "); end that process, or restore in a new pid namespace");
      }
      if (std::chrono::steady_clock::now() > deadline) {
        return Error(Domain::kUsage, EEXIST,
                     who + "is still held by a dead process (" + holder->comm +
                         ") whose parent has not waited for it; end the parent");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  return {};
}

int restore(const Parsed& options) {
  std::string path = options.values["images-dir"].as<std::string>();
  if (options.has("detach") && options.has("foreground")) {
    return fail(kName, "--detach and --foreground exclude each other", kExitUsage);
  }
  if (geteuid() != 0) return fail(kName, "run as root: CRIU must make processes of other users");
  if (auto ok = use_keys(options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  auto fd = open_existing(path);
  if (!fd) return fail(kName, fd.error().message());
  // First of all: a pre-dump of GPU memory alone has no inventory.
  auto images = read_image_set(fd->get());
  if (!images) return fail(kName, images.error().message());
  if (auto ok = check_stage(*images); !ok) return fail(kName, ok.error().message());
  if (auto ok = check_inventory(fd->get(), path); !ok) return fail(kName, ok.error().message());
  if (auto ok = check_machine(*images); !ok) return fail(kName, ok.error().message());
  if (options.has("verify")) {
    if (auto ok = check_pages(fd->get(), *images, path); !ok) {
      return fail(kName, ok.error().message());
    }
  }
  if (auto ok = wait_for_pids(fd->get()); !ok) return fail(kName, ok.error().message());
  std::unique_ptr<char, decltype(&free)> real(realpath(path.c_str(), nullptr), free);
  return run_and_verify(options, real ? real.get() : path, *images);
}

}  // namespace

int run_restore(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  return options->help ? kExitOk : restore(*options);
}

}  // namespace phos::cli
