// SPDX-License-Identifier: GPL-2.0-only
// phos dump: checks what it is asked for, then runs criu dump with the phos plugin.

#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <ctime>
#include <optional>

#include "gpu-tracker/base/json.h"
#include "tools/phos/command.h"
#include "tools/phos/criu_run.h"
#include "tools/phos/gpu_images.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/processes.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kName[] = "dump";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "-t PID -D DIR [options] [-- CRIU-OPTION...]";
  s.about =
      "Saves process PID and its children, with the state they have on GPUs, to DIR.\n"
      "The processes end once they are saved, unless --leave-running is given. Works\n"
      "for processes without CUDA too. Words after -- go to `criu dump` as they are.\n";
  s.takes_criu_options = true;
  s.options.add_options()("tree,t", po::value<int>()->value_name("PID")->required(),
                          "root of the process tree")(
      "images-dir,D", po::value<std::string>()->value_name("DIR")->required(),
      "where the images go; made, with mode 0700, if it is missing")(
      "prev-images-dir", po::value<std::string>()->value_name("DIR"),
      "a pre-dump of the processes: only what has changed since is saved")(
      "leave-running,R", "let the processes go on afterwards")(
      "shell-job,j", "the processes belong to a terminal session that is not dumped")(
      "timeout", po::value<unsigned>()->value_name("SEC"),
      "how long CRIU may take to stop the processes (CRIU's default: 10)")(
      "force,f", "replace the dump that DIR holds")("verbose,v", "print what the plugin does")(
      "json", "print the summary as JSON");
  add_storage_options(&s);
  add_key_option(&s);
  return s;
}

// `parent`: what the images build on, or null.
std::vector<std::string> criu_arguments(const Parsed& options, int pid, const std::string& dir,
                                        const ParentLink* parent) {
  std::vector<std::string> args = {
      "dump", "--enable-plugin", "phos", "-t", std::to_string(pid), "-D", dir,
      "-o",   "dump.log",        "-v4"};
  if (options.has("leave-running")) args.emplace_back("--leave-running");
  if (options.has("shell-job")) args.emplace_back("--shell-job");
  if (options.has("timeout")) {
    args.emplace_back("--timeout");
    args.push_back(std::to_string(options.values["timeout"].as<unsigned>()));
  }
  // A pre-dump of GPU memory alone has nothing for CRIU.
  if (parent && parent->has_cpu_memory) {
    args.insert(args.end(), {"--track-mem", "--prev-images-dir", parent->path});
  }
  args.insert(args.end(), options.criu_options.begin(), options.criu_options.end());
  return args;
}

void print_summary(bool json, int pid, const std::string& comm, const DumpDir& dir, double seconds,
                   uint64_t bytes, const ImageSet& images) {
  uint64_t on_gpu = gpu_bytes(images);
  size_t cuda = images.processes.size();
  if (json) {
    JsonWriter w;
    w.begin_object().member("pid", pid).member("command", comm).member("directory", dir.path);
    w.member("milliseconds", static_cast<uint64_t>(seconds * 1000)).member("image_bytes", bytes);
    w.member("cuda_processes", cuda).member("gpu_bytes", on_gpu).end_object();
    printf("%s\n", w.str().c_str());
    return;
  }
  printf("dumped process %d (%s) to %s in %.2f s: %s of images", pid, comm.c_str(),
         dir.path.c_str(), seconds, format_bytes(bytes).c_str());
  if (cuda == 0) {
    printf(", no CUDA process\n");
  } else {
    printf(", %s of GPU memory in %zu CUDA process%s\n", format_bytes(on_gpu).c_str(), cuda,
           cuda == 1 ? "" : "es");
  }
}

int dump(const Parsed& options) {
  int pid = options.values["tree"].as<int>();
  bool force = options.has("force");
  if (auto ok = use_storage_options(options); !ok) {
    return fail(kName, ok.error().message(), kExitUsage);
  }
  if (geteuid() != 0) return fail(kName, "run as root: CRIU must stop and read other processes");
  if (auto ok = use_keys(options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  auto target = check_target(pid);
  if (!target) return fail(kName, target.error().message());
  if (auto free = check_untraced(process_tree(pid)); !free) {
    return fail(kName, free.error().message());
  }
  auto dir = open_for_dump(options.values["images-dir"].as<std::string>(), force);
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
  std::string log = dir->path + "/dump.log";
  CriuRun run{criu_arguments(options, pid, dir->path, parent ? &*parent : nullptr), log,
              "dump of " + std::to_string(pid) + " (" + target->comm + ")", options.has("verbose")};
  time_t since = time(nullptr);
  auto start = prepare_criu(run);
  if (!start) {
    dir->undo();
    return fail(kName, start.error().message());
  }
  auto done = dir->start();
  if (done && parent) done = dir->link(*parent);
  if (!done) return fail(kName, done.error().message());
  auto exit = run_criu(run, *start);
  if (!exit) {
    dir->undo();
    return fail(kName, exit.error().message());
  }
  if (exit->code != 0) {
    report_failure(kName, "dumping process " + std::to_string(pid), run, *exit);
    dir->undo();  // only where criu has not even begun a log
    return kExitFailed;
  }
  auto images = read_image_set(dir->fd.get());
  if (!images) {
    return fail(kName, "the dump is complete, but its GPU images cannot be read back: " +
                           images.error().message());
  }
  print_summary(options.has("json"), pid, target->comm, *dir, exit->seconds,
                image_bytes(dir->fd.get(), since), *images);
  return kExitOk;
}

}  // namespace

int run_dump(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  return options->help ? kExitOk : dump(*options);
}

}  // namespace phos::cli
