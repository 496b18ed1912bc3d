// SPDX-License-Identifier: GPL-2.0-only
// phos pre-dump: copies memory while the processes run, so that a later dump stops them for less
// time. Runs criu pre-dump where the kernel tracks writes to CPU memory; GPU memory is copied
// everywhere.

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <ctime>
#include <optional>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/image.h"
#include "tools/criu/locate.h"
#include "tools/phos/capture.h"
#include "tools/phos/command.h"
#include "tools/phos/criu_run.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/pre_dump_gpus.h"
#include "tools/phos/processes.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kName[] = "pre-dump";
constexpr char kLog[] = "pre-dump.log";
constexpr double kMaxRounds = 1000, kMaxBudgetSeconds = 24 * 60 * 60;

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "-t PID -D DIR [options] [-- CRIU-OPTION...]";
  s.about =
      "Copies the memory of process PID and its children to DIR while they run on, so\n"
      "that a later dump, with --prev-images-dir DIR, has only the rest to save. Several\n"
      "pre-dumps form a chain. GPU memory is always copied; CPU memory where the kernel\n"
      "tracks writes to it. Words after -- go to `criu pre-dump` as they are.\n";
  s.takes_criu_options = true;
  s.options.add_options()("tree,t", po::value<int>()->value_name("PID")->required(),
                          "root of the process tree")(
      "images-dir,D", po::value<std::string>()->value_name("DIR")->required(),
      "where the images go; made, with mode 0700, if it is missing")(
      "prev-images-dir", po::value<std::string>()->value_name("DIR"),
      "an earlier pre-dump, of which this one is a continuation")("gpu-only",
                                                                  "leave CPU memory to the dump")(
      "max-rounds", po::value<double>()->value_name("N"),
      "with --gpu-only: copy what has changed at most N times")(
      "budget", po::value<double>()->value_name("SEC"),
      "with --gpu-only: begin no further round after this time")(
      "max-slowdown", po::value<double>()->value_name("PERCENT"),
      "with --gpu-only: how much slower the application may get; 0: no limit")(
      "force,f", "replace the images that DIR holds")("verbose,v", "print what phos does")(
      "json", "print the summary as JSON");
  add_storage_options(&s);
  add_key_option(&s);
  return s;
}

// CRIU needs to know which pages are written between two dumps.
bool kernel_tracks_writes() {
  auto criu = criu::find_stock_criu(criu::self_dir());
  if (!criu) return false;
  auto ran = capture({*criu, "check", "--feature", "mem_dirty_track"});
  return ran && ran->code == 0;
}

double gigabytes_a_second(uint64_t bytes, uint64_t microseconds) {
  return microseconds ? static_cast<double>(bytes) / 1e3 / static_cast<double>(microseconds) : 0;
}

void print_round(const PreDumpRound& r) {
  char changed[60] = "";
  if (r.since_microseconds) {
    snprintf(changed, sizeof changed, ", changed at %.1f MB/s",
             1e3 * gigabytes_a_second(r.copied_bytes, r.since_microseconds));
  }
  fprintf(stderr,
          "process %d, round %u: copied %llu of %llu pages, %s of %s, in %.3f s (%.1f GB/s), "
          "written after %.3f s%s\n",
          r.pid, r.number, static_cast<unsigned long long>(r.dirty_pages),
          static_cast<unsigned long long>(r.pages), format_bytes(r.copied_bytes).c_str(),
          format_bytes(r.total_bytes).c_str(), static_cast<double>(r.copy_microseconds) / 1e6,
          gigabytes_a_second(r.copied_bytes, r.copy_microseconds),
          static_cast<double>(r.microseconds) / 1e6, changed);
}

// Of a pre-dump by criu, from what it has left in its images.
PreDumpResult rounds_of(int image_dir) {
  PreDumpResult result;
  auto set = read_image_set(image_dir);
  if (!set) return result;  // phosd has written them; whoever reads them next is told
  result.processes = set->processes.size();
  for (const ProcessImage& p : set->processes) {
    uint64_t total = 0;
    for (const AllocationInfo& a : p.allocations) {
      if (!a.hashes.empty()) total += a.size;
    }
    for (size_t i = 0; i < p.rounds.size(); i++) {
      const DumpRound& r = p.rounds[i];
      result.rounds.push_back({p.pid, static_cast<unsigned>(i) + 1, r.bytes, total, r.us, r.copy_us,
                               r.pages, r.dirty_pages, r.since_us});
    }
  }
  return result;
}

void print_json(int pid, const std::string& directory, bool cpu, double seconds, uint64_t bytes,
                const PreDumpResult& gpu) {
  JsonWriter w;
  w.begin_object().member("pid", pid).member("directory", directory);
  w.member("milliseconds", static_cast<uint64_t>(seconds * 1000)).member("image_bytes", bytes);
  w.member("cpu_memory", cpu);
  w.member("cuda_processes", gpu.processes).key("rounds").begin_array();
  for (const PreDumpRound& r : gpu.rounds) {
    w.begin_object().member("pid", r.pid).member("number", r.number);
    w.member("pages", r.pages).member("dirty_pages", r.dirty_pages);
    w.member("copied_bytes", r.copied_bytes).member("total_bytes", r.total_bytes);
    w.member("microseconds", r.microseconds).member("copy_microseconds", r.copy_microseconds);
    w.member("since_microseconds", r.since_microseconds).end_object();
  }
  w.end_array().end_object();
  printf("%s\n", w.str().c_str());
}

int with_criu(const Parsed& options, int pid, const std::string& comm, DumpDir& dir,
              const ParentLink* parent) {
  CriuRun run{{"pre-dump", "--enable-plugin", "phos", "-t", std::to_string(pid), "-D", dir.path,
               "-o", kLog, "-v4"},
              dir.path + "/" + kLog,
              "pre-dump of " + std::to_string(pid) + " (" + comm + ")",
              options.has("verbose")};
  // The first one with CPU memory in a chain that began with GPU memory alone has no parent there.
  if (parent && parent->has_cpu_memory) {
    run.args.insert(run.args.end(), {"--prev-images-dir", parent->path});
  }
  run.args.insert(run.args.end(), options.criu_options.begin(), options.criu_options.end());
  const time_t since = time(nullptr);
  auto start = prepare_criu(run);
  if (!start) {
    dir.undo();
    return fail(kName, start.error().message());
  }
  auto exit = run_criu(run, *start);
  if (!exit) {
    dir.undo();
    return fail(kName, exit.error().message());
  }
  if (exit->code != 0) {
    report_failure(kName, "pre-dumping process " + std::to_string(pid), run, *exit);
    dir.undo();
    return kExitFailed;
  }
  const uint64_t bytes = image_bytes(dir.fd.get(), since);
  if (options.has("json")) {
    print_json(pid, dir.path, true, exit->seconds, bytes, rounds_of(dir.fd.get()));
  } else {
    printf("pre-dumped process %d (%s) to %s in %.2f s: %s of images\n", pid, comm.c_str(),
           dir.path.c_str(), exit->seconds, format_bytes(bytes).c_str());
  }
  return kExitOk;
}

// The value of a numeric option, which must be in [least, most].
Result<double> number(const Parsed& options, const char* name, double least, double most) {
  const double value = options.values[name].as<double>();
  if (value >= least && value <= most) return value;  // false for NaN
  char text[96];
  snprintf(text, sizeof text, "--%s must be from %g to %g", name, least, most);
  return Error(Domain::kUsage, ERANGE, text);
}

Result<PreDumpLimits> limits_of(const Parsed& options) {
  PreDumpLimits limits;
  if (options.has("max-rounds")) {
    auto rounds = number(options, "max-rounds", 1, kMaxRounds);
    if (!rounds) return rounds.error();
    limits.max_rounds = static_cast<unsigned>(*rounds);
  }
  if (options.has("budget")) {
    auto seconds = number(options, "budget", 0, kMaxBudgetSeconds);
    if (!seconds) return seconds.error();
    limits.seconds = *seconds;
  }
  if (options.has("max-slowdown")) {
    auto percent = number(options, "max-slowdown", 0, 100);
    if (!percent) return percent.error();
    limits.max_slowdown = *percent / 100;
  }
  return limits;
}

// Nothing of it needs the processes.
Result<PreDumpLimits> check_options(const Parsed& options, bool gpu_only) {
  for (const char* name : {"max-rounds", "budget", "max-slowdown"}) {
    if (gpu_only || !options.has(name)) continue;
    return Error(Domain::kUsage, EINVAL, std::string("--") + name + " needs --gpu-only");
  }
  return limits_of(options);
}

int gpu_only(const Parsed& options, const PreDumpLimits& limits, int pid, const std::string& comm,
             DumpDir& dir) {
  if (!options.criu_options.empty()) {
    dir.undo();
    return fail(kName, "words after -- are for criu, which does not run here", kExitUsage);
  }
  const bool quiet = options.has("json");
  const bool verbose = options.has("verbose");
  const time_t since = time(nullptr);
  timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  auto done = pre_dump_gpus(
      pid, dir.fd.get(), limits,
      [&](const PreDumpRound& r) {
        if (!quiet) print_round(r);
      },
      [&](unsigned level, const char* text) {
        if (level <= 2 || verbose) fprintf(stderr, "phosd: %s\n", text);
      });
  clock_gettime(CLOCK_MONOTONIC, &end);
  if (!done) {
    dir.undo();
    return fail(kName, done.error().message());
  }
  const double seconds = static_cast<double>(end.tv_sec - begin.tv_sec) +
                         static_cast<double>(end.tv_nsec - begin.tv_nsec) / 1e9;
  const uint64_t bytes = image_bytes(dir.fd.get(), since);
  if (options.has("json")) {
    print_json(pid, dir.path, false, seconds, bytes, *done);
  } else {
    printf(
        "pre-dumped the GPU memory of process %d (%s) to %s in %.2f s: %s of images, %zu CUDA "
        "process%s\n",
        pid, comm.c_str(), dir.path.c_str(), seconds, format_bytes(bytes).c_str(), done->processes,
        done->processes == 1 ? "" : "es");
  }
  return kExitOk;
}

int pre_dump(const Parsed& options) {
  const int pid = options.values["tree"].as<int>();
  auto limits = check_options(options, options.has("gpu-only"));
  if (!limits) return fail(kName, limits.error().message(), kExitUsage);
  if (auto ok = use_storage_options(options); !ok) {
    return fail(kName, ok.error().message(), kExitUsage);
  }
  if (geteuid() != 0) return fail(kName, "run as root: phos must read other processes");
  if (auto ok = use_keys(options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  auto target = check_target(pid);
  if (!target) return fail(kName, target.error().message());
  if (auto free = check_untraced(process_tree(pid)); !free) {
    return fail(kName, free.error().message());
  }
  const bool cpu = !options.has("gpu-only") && kernel_tracks_writes();
  if (!cpu && !options.has("gpu-only")) {
    fprintf(stderr,
            "phos pre-dump: this kernel does not track writes to CPU memory "
            "(CONFIG_MEM_SOFT_DIRTY): only GPU memory is copied\n");
  }
  auto dir = open_for_dump(options.values["images-dir"].as<std::string>(), options.has("force"));
  if (!dir) return fail(kName, dir.error().message());
  std::optional<ParentLink> parent;
  if (options.has("prev-images-dir")) {
    auto found = find_parent(*dir, options.values["prev-images-dir"].as<std::string>());
    if (!found) {
      dir->undo();
      return fail(kName, found.error().message());
    }
    parent = std::move(*found);
  }
  auto done = dir->start();
  if (done && parent) done = dir->link(*parent);
  if (!done) return fail(kName, done.error().message());
  return cpu ? with_criu(options, pid, target->comm, *dir, parent ? &*parent : nullptr)
             : gpu_only(options, *limits, pid, target->comm, *dir);
}

}  // namespace

int run_pre_dump(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  return options->help ? kExitOk : pre_dump(*options);
}

}  // namespace phos::cli
