// SPDX-License-Identifier: GPL-2.0-only
// phos verify: checks what a restore would check, from the files alone: every image, the chain, and
// every saved page by its hash.

#include <chrono>
#include <cstdio>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/verify.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "verify";
constexpr size_t kMaxLines = 20;   // of damage
constexpr size_t kMaxJson = 1000;  // elements

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR [--jobs N] [--json]";
  s.about =
      "Checks what a restore from DIR would check, from the files alone: headers and\n"
      "checksums, the parents that DIR builds on, and the hash of every page of GPU memory\n"
      "that phos saved, also in the parents. Tells which memory is damaged, and exits with 1\n"
      "then. CRIU's own images are not checked, nor is the GPU memory in them. Needs neither a\n"
      "GPU nor root, only the right to read DIR and its parents.\n";
  s.positional = "directory";
  add_jobs(s, "read and hash");
  s.options.add_options()("json", "print JSON");
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
  printf("%s: %s, %s, %s (%llu zero), %s read in %.2f s (%.1f GB/s)%s\n", dir.c_str(),
         counted(r.processes, "process", "processes").c_str(),
         counted(r.allocations, "allocation", "allocations").c_str(),
         counted(r.pages, "page", "pages").c_str(), static_cast<unsigned long long>(r.zero_pages),
         format_bytes(r.bytes).c_str(), seconds, gigabytes_per_second(r, seconds),
         r.ok() ? ": all as saved" : "");
  fputs(driver_text(r).c_str(), stdout);
  if (stage == DumpStage::kPreDump) {
    puts("it was made by a pre-dump: later dumps can build on it, a restore cannot start from it");
  }
}

void print_json(const std::string& dir, const DumpId& id, DumpStage stage, const VerifyReport& r,
                double seconds) {
  JsonWriter w;
  w.begin_object().member("directory", dir).member("ok", r.ok()).key("dump_id");
  if (id == DumpId{}) {
    w.null();
  } else {
    w.value(format_dump_id(id));
  }
  w.member("stage", to_string(stage)).member("processes", r.processes);
  w.member("allocations", r.allocations).member("pages", r.pages);
  w.member("zero_pages", r.zero_pages).member("bytes", r.bytes);
  w.member("microseconds", static_cast<uint64_t>(seconds * 1e6));
  w.key("driver").begin_object().member("allocations", r.driver_allocations);
  w.member("bytes", r.driver_bytes).member("copied_allocations", r.driver_copied).end_object();
  w.member("damaged_pages", r.damaged_pages).member("damaged_runs", r.damaged_runs);
  w.key("damage").begin_array();
  for (const PageDamage& d : r.damage) {
    char address[24];
    snprintf(address, sizeof address, "0x%llx", static_cast<unsigned long long>(d.address));
    w.begin_object().member("pid", d.pid).member("gpu", format_gpu_uuid(d.gpu));
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

int verify(const Parsed& options, const std::string& dir, unsigned jobs) {
  const auto start = std::chrono::steady_clock::now();
  auto fd = open_existing(dir);
  if (!fd) return fail(kName, fd.error().message());
  auto images = read_image_set(fd->get());
  if (!images) return fail(kName, images.error().message());
  const DumpStage stage =
      images->processes.empty() ? DumpStage::kDump : images->processes.front().stage;
  if (stage == DumpStage::kDump) {
    if (auto ok = check_inventory(fd->get(), dir); !ok) return fail(kName, ok.error().message());
  }
  const bool json = options.has("json");
  const DumpId id = images->files.dump_id;
  auto report = [&] {
    ProgressLine line;
    VerifyOptions how;
    how.jobs = jobs;
    how.max_damage = json ? kMaxJson : kMaxLines;
    how.progress = [&](uint64_t pages, uint64_t of) {
      line.draw("verifying " + dir + ": " + format_bytes(pages * kImagePageSize) + " of " +
                format_bytes(of * kImagePageSize));
    };
    return verify_images(fd->get(), std::move(*images), make_page_hasher, how);
  }();
  if (!report) return fail(kName, report.error().message());
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (json) {
    print_json(dir, id, stage, *report, seconds);
  } else if (report->processes == 0) {
    printf("%s holds a dump without CUDA processes\n", dir.c_str());
  } else {
    print_summary(dir, stage, *report, seconds);
  }
  return report->ok() ? kExitOk : report_damage(dir, *report, json);
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
