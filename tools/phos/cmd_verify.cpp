// SPDX-License-Identifier: GPL-2.0-only
// phos verify: checks what a restore would check, from the files alone: every image, the chain, and
// every saved page by its hash.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <optional>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/free_pages.h"
#include "gpu-tracker/image/repair.h"
#include "gpu-tracker/image/verify.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

namespace po = boost::program_options;

constexpr char kName[] = "verify";
constexpr size_t kMaxLines = 20;   // of damage
constexpr size_t kMaxJson = 1000;  // elements

struct Verified {
  DumpStage stage = DumpStage::kDump;
  DumpId id{};
  VerifyReport report;
};

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR [--repair-from DIR2] [--jobs N] [--json]";
  s.about =
      "Checks what a restore from DIR would check, from the files alone: headers and\n"
      "checksums, the parents that DIR builds on, and the hash of every page of GPU memory\n"
      "that phos saved, also in the parents. Tells which memory is damaged, and exits with 1\n"
      "then. CRIU's own images are not checked, nor is the GPU memory in them. Needs neither a\n"
      "GPU nor root, only the right to read DIR and its parents.\n"
      "With --repair-from, damaged pages are stored once more in DIR, taken from where DIR2 has\n"
      "them undamaged. Nothing is written over, and parents are left alone.\n";
  s.positional = "directory";
  add_jobs(s, "read and hash");
  s.options.add_options()(
      "repair-from", po::value<std::vector<std::string>>()->value_name("DIR2"),
      "another copy of the images, a parent, or a dump that builds on DIR: take "
      "undamaged pages from it and its parents; may be given several times")("json", "print JSON");
  add_key_option(&s);
  return s;
}

double gigabytes_per_second(const VerifyReport& r, double seconds) {
  return seconds > 0 ? static_cast<double>(r.bytes) / 1e9 / seconds : 0;
}

std::string counted(uint64_t n, const std::string& one, const std::string& many) {
  return std::to_string(n) + " " + (n == 1 ? one : many);
}

std::string driver_text(const VerifyReport& r) {
  if (r.driver_allocations == 0) return "";
  std::string text = counted(r.driver_allocations, "allocation", "allocations") + " (" +
                     format_bytes(r.driver_bytes) +
                     "): saved by NVIDIA's driver inside CRIU's images; not checked here";
  if (r.driver_copied) {
    text += " (but phos's own, earlier copy of " + std::to_string(r.driver_copied) + " was)";
  }
  return text + "\n";
}

void print_summary(const std::string& dir, DumpStage stage, const VerifyReport& r, double seconds) {
  const std::string dropped =
      r.dropped_pages ? ", " + std::to_string(r.dropped_pages) + " dropped by phos gc" : "";
  printf("%s: %s, %s, %s (%llu zero%s), %s read in %.2f s (%.1f GB/s)%s\n", dir.c_str(),
         counted(r.processes, "process", "processes").c_str(),
         counted(r.allocations, "allocation", "allocations").c_str(),
         counted(r.pages, "page", "pages").c_str(), static_cast<unsigned long long>(r.zero_pages),
         dropped.c_str(), format_bytes(r.bytes).c_str(), seconds, gigabytes_per_second(r, seconds),
         r.ok() ? ": all as saved" : "");
  fputs(driver_text(r).c_str(), stdout);
  if (stage == DumpStage::kPreDump) {
    puts("it was made by a pre-dump: later dumps can build on it, a restore cannot start from it");
  }
}

void print_json(const std::string& dir, const Verified& done,
                const std::optional<RepairReport>& repaired, double seconds) {
  const VerifyReport& r = done.report;
  JsonWriter w;
  w.begin_object().member("directory", dir).member("ok", r.ok()).key("dump_id");
  if (done.id == DumpId{}) {
    w.null();
  } else {
    w.value(format_dump_id(done.id));
  }
  w.member("stage", to_string(done.stage)).member("processes", r.processes);
  w.member("allocations", r.allocations).member("pages", r.pages);
  w.member("zero_pages", r.zero_pages).member("dropped_pages", r.dropped_pages);
  w.member("bytes", r.bytes);
  w.member("microseconds", static_cast<uint64_t>(seconds * 1e6));
  w.key("driver").begin_object().member("allocations", r.driver_allocations);
  w.member("bytes", r.driver_bytes).member("copied_allocations", r.driver_copied).end_object();
  if (repaired) {
    w.member("repaired_pages", repaired->repaired_pages).member("repair_bytes", repaired->bytes);
  }
  w.member("damaged_pages", r.damaged_pages).member("damaged_runs", r.damaged_runs);
  w.key("damage").begin_array();
  for (const PageDamage& d : r.damage) {
    char address[24];
    snprintf(address, sizeof address, "0x%llx", static_cast<unsigned long long>(d.address));
    w.begin_object()
        .member("pid", d.pid)
        .member("gpu", d.gpu == phos::GpuUuid{} ? "host" : format_gpu_uuid(d.gpu));
    w.member("address", address).member("size", d.size).member("offset", d.offset);
    w.member("pages", d.pages).member("unreadable", d.unreadable).member("where", d.where);
    w.end_object();
  }
  w.end_array().end_object();
  printf("%s\n", w.str().c_str());
}

int report_damage(const std::string& dir, const VerifyReport& r, bool json) {
  if (!json) {
    for (size_t i = 0; i < r.damage.size(); i++) {
      fprintf(stderr, "phos verify: %s\n", describe(r.damage[i]).c_str());
    }
    if (r.damaged_runs > r.damage.size()) {
      fprintf(stderr, "phos verify: and %llu more such places\n",
              static_cast<unsigned long long>(r.damaged_runs - r.damage.size()));
    }
  }
  if (!r.read_error.empty()) fprintf(stderr, "phos verify: %s\n", r.read_error.c_str());
  return fail(kName, dir + " is damaged: " + std::to_string(r.damaged_pages) + " of " +
                         counted(r.pages, "page", "pages") + "; use another copy of the images");
}

Result<Verified> verify_once(int fd, const std::string& dir, unsigned jobs, size_t max_damage) {
  auto images = read_image_set(fd);
  if (!images) return images.error();
  Verified done;
  if (!images->processes.empty()) done.stage = images->processes.front().stage;
  if (done.stage == DumpStage::kDump) {
    if (auto ok = check_inventory(fd, dir); !ok) return ok.error();
  }
  done.id = images->files.dump_id;
  ProgressLine line;
  VerifyOptions how;
  how.jobs = jobs;
  how.max_damage = max_damage;
  how.progress = [&](uint64_t pages, uint64_t of) {
    line.draw("verifying " + dir + ": " + format_bytes(pages * kImagePageSize) + " of " +
              format_bytes(of * kImagePageSize));
  };
  auto report = verify_images(fd, std::move(*images), make_page_hasher, how);
  if (!report) return report.error();
  done.report = std::move(*report);
  return done;
}

Result<RepairReport> repair(int fd, const std::string& dir, const VerifyReport& report,
                            const std::vector<std::string>& sources) {
  if (auto ok = lock_directory(fd, dir); !ok) return ok.error();
  // Of a repair that was killed.
  if (auto freed = remove_leftovers(fd); !freed) return freed.error();
  std::vector<UniqueFd> open;
  std::vector<int> fds;
  for (const std::string& source : sources) {
    auto opened = open_existing(source);
    if (!opened) return opened.error();
    fds.push_back(opened->get());
    open.push_back(std::move(*opened));
  }
  ProgressLine line;
  auto progress = [&](uint64_t pages, uint64_t of) {
    line.draw("repairing " + dir + ": found " + std::to_string(pages) + " of " +
              counted(of, "page", "pages"));
  };
  return repair_pages(fd, report.damage, fds, make_page_hasher, progress);
}

int verify(const Parsed& options, const std::string& dir, unsigned jobs) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::string> sources;
  if (options.has("repair-from")) {
    sources = options.values["repair-from"].as<std::vector<std::string>>();
  }
  auto fd = open_existing(dir);
  if (!fd) return fail(kName, fd.error().message());
  const bool json = options.has("json");
  const size_t lines = json ? kMaxJson : kMaxLines;
  auto done = verify_once(fd->get(), dir, jobs, sources.empty() ? lines : SIZE_MAX);
  if (!done) return fail(kName, done.error().message());
  std::optional<RepairReport> repaired;
  if (!sources.empty() && !done->report.ok()) {
    auto tried = repair(fd->get(), dir, done->report, sources);
    if (!tried) return fail(kName, tried.error().wrap("cannot repair " + dir).message());
    for (const std::string& why : tried->unusable) {
      fprintf(stderr, "phos verify: nothing can be taken from some images: %s\n", why.c_str());
    }
    if (!json) {
      printf("%s: repaired %llu of %s; %s written\n", dir.c_str(),
             static_cast<unsigned long long>(tried->repaired_pages),
             counted(done->report.damaged_pages, "damaged page", "damaged pages").c_str(),
             format_bytes(tried->bytes).c_str());
    }
    repaired = std::move(*tried);
    done = verify_once(fd->get(), dir, jobs, lines);
    if (!done) return fail(kName, done.error().message());
  }
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const VerifyReport& report = done->report;
  if (json) {
    print_json(dir, *done, repaired, seconds);
  } else if (report.processes == 0) {
    printf("%s holds a dump without CUDA processes\n", dir.c_str());
  } else {
    print_summary(dir, done->stage, report, seconds);
  }
  return report.ok() ? kExitOk : report_damage(dir, report, json);
}

}  // namespace

int run_verify(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  if (auto ok = use_keys(*options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  const std::vector<std::string> dirs = options->words("directory");
  if (dirs.size() != 1) return fail(kName, "give one directory of images", kExitUsage);
  auto jobs = jobs_of(*options);
  if (!jobs) return fail(kName, jobs.error().message(), kExitUsage);
  return verify(*options, dirs[0], *jobs);
}

}  // namespace phos::cli
