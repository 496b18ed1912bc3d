// SPDX-License-Identifier: GPL-2.0-only
// phos diff: what became of GPU memory between two dumps.

#include <cstdio>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/diff.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/page_hasher.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"
#include "tools/phos/table.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "diff";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "A B [--jobs N] [--json]";
  s.about =
      "Compares the GPU memory that phos saved in A with that in B: which allocations appeared,\n"
      "which went, and how many pages of the others differ. An allocation is the same one if it\n"
      "has the same address and size in a process of the same pid. Dumps of one chain are\n"
      "compared by the hashes in them; of others every page is read. Needs neither a GPU nor\n"
      "root, only the right to read the directories and their parents. Exits with 0 whether or\n"
      "not they differ.\n";
  s.positional = "directory";
  add_jobs(s, "read and hash");
  s.options.add_options()("json", "print JSON, with every allocation");
  add_key_option(&s);
  return s;
}

struct Sum {
  uint64_t count = 0, bytes = 0;
  void add(const AllocationDiff& a) {
    count++;
    bytes += a.size;
  }
};

struct Totals {
  uint64_t processes[3] = {};  // by Presence
  Sum allocations[3];          // by Presence
  Sum not_compared, live_copies, differing;
  uint64_t pages = 0, differing_pages = 0;
};

Totals add_up(const std::vector<ProcessDiff>& processes) {
  Totals t;
  for (const ProcessDiff& p : processes) {
    t.processes[static_cast<size_t>(p.presence)]++;
    for (const AllocationDiff& a : p.allocations) {
      t.allocations[static_cast<size_t>(a.presence)].add(a);
      if (a.presence != Presence::kBoth) continue;
      if (!a.compared) t.not_compared.add(a);
      if (a.live_copy) t.live_copies.add(a);
      if (a.differing) t.differing.add(a);
      t.pages += a.pages;
      t.differing_pages += a.differing;
    }
  }
  return t;
}

std::string number(uint64_t n) {
  return std::to_string(n);
}

std::string hex(uint64_t value) {
  char text[24];
  snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string sized(const Sum& sum) {
  return number(sum.count) + " (" + format_bytes(sum.bytes) + ")";
}

// Without what is in both and equal.
std::vector<TableRow> changes(const std::vector<ProcessDiff>& processes) {
  std::vector<TableRow> rows = {{"PID", "ADDRESS", "SIZE", "KIND", "CHANGE"}};
  for (const ProcessDiff& p : processes) {
    for (const AllocationDiff& a : p.allocations) {
      std::string change = to_string(a.presence);
      if (a.presence == Presence::kBoth) {
        if (!a.differing && !a.other_gpu) continue;
        change =
            a.compared ? number(a.differing) + " of " + number(a.pages) + " pages" : "not compared";
        if (a.other_gpu) change += ", on another GPU";
      }
      rows.push_back({number(static_cast<uint64_t>(p.pid)), hex(a.address), format_bytes(a.size),
                      to_string(a.kind), change});
    }
  }
  return rows;
}

void print_text(const std::vector<ProcessDiff>& processes) {
  const std::vector<TableRow> rows = changes(processes);
  if (rows.size() > 1) {
    print_table(rows);
    puts("");
  }
  const Totals t = add_up(processes);
  const auto both = static_cast<size_t>(Presence::kBoth);
  const auto went = static_cast<size_t>(Presence::kWent);
  const auto appeared = static_cast<size_t>(Presence::kAppeared);
  printf("processes: %s in both, %s went, %s appeared\n", number(t.processes[both]).c_str(),
         number(t.processes[went]).c_str(), number(t.processes[appeared]).c_str());
  printf("allocations: %s in both, %s went, %s appeared\n", sized(t.allocations[both]).c_str(),
         sized(t.allocations[went]).c_str(), sized(t.allocations[appeared]).c_str());
  printf("pages: %s of %s differ (%s), in %s of the allocations\n",
         number(t.differing_pages).c_str(), number(t.pages).c_str(),
         format_bytes(t.differing_pages * kImagePageSize).c_str(),
         number(t.differing.count).c_str());
  if (t.not_compared.count) {
    printf(
        "not compared: %s, of which A or B has no pages (saved by NVIDIA's driver inside "
        "CRIU's images)\n",
        sized(t.not_compared).c_str());
  }
  if (t.live_copies.count) {
    printf("compared by phos's earlier copy: %s, left to the driver in A or B\n",
           sized(t.live_copies).c_str());
  }
}

void write(JsonWriter& w, const AllocationDiff& a) {
  w.begin_object().member("address", hex(a.address)).member("size", a.size);
  w.member("kind", to_string(a.kind)).member("presence", to_string(a.presence));
  if (a.presence == Presence::kBoth) {
    w.member("other_gpu", a.other_gpu).member("compared", a.compared);
    if (a.compared) {
      w.member("live_copy", a.live_copy).member("pages", a.pages);
      w.member("differing_pages", a.differing);
    }
  }
  w.end_object();
}

void write(JsonWriter& w, const char* name, const Sum& sum) {
  w.key(name).begin_object().member("count", sum.count).member("bytes", sum.bytes).end_object();
}

void print_json(const std::vector<ProcessDiff>& processes) {
  JsonWriter w;
  w.begin_object().key("processes").begin_array();
  for (const ProcessDiff& p : processes) {
    w.begin_object().member("pid", p.pid).member("comm", p.comm);
    w.member("presence", to_string(p.presence));
    if (p.presence == Presence::kBoth) w.member("by_hashes", p.by_hashes);
    w.key("allocations").begin_array();
    for (const AllocationDiff& a : p.allocations) write(w, a);
    w.end_array().end_object();
  }
  const Totals t = add_up(processes);
  w.end_array().key("totals").begin_object();
  for (Presence presence : {Presence::kBoth, Presence::kWent, Presence::kAppeared}) {
    write(w, to_string(presence), t.allocations[static_cast<size_t>(presence)]);
  }
  write(w, "differing", t.differing);
  write(w, "not_compared", t.not_compared);
  w.member("pages", t.pages).member("differing_pages", t.differing_pages);
  w.end_object().end_object();
  printf("%s\n", w.str().c_str());
}

// A directory with phos's images, or a dump without CUDA processes.
Result<ImageSet> read_set(int fd, const std::string& dir) {
  auto images = read_image_set(fd);
  if (images && images->processes.empty() && images->files.files.empty()) {
    if (auto ok = check_inventory(fd, dir); !ok) return ok.error();
  }
  return images;
}

int diff(const std::string& a, const std::string& b, unsigned jobs, bool json) {
  auto first_fd = open_existing(a);
  if (!first_fd) return fail(kName, first_fd.error().message());
  auto second_fd = open_existing(b);
  if (!second_fd) return fail(kName, second_fd.error().message());
  auto first = read_set(first_fd->get(), a);
  if (!first) return fail(kName, first.error().message());
  auto second = read_set(second_fd->get(), b);
  if (!second) return fail(kName, second.error().message());
  auto processes = [&] {
    ProgressLine line;
    DiffOptions how;
    how.jobs = jobs;
    how.progress = [&](uint64_t pages, uint64_t of) {
      line.draw("comparing: " + format_bytes(pages * kImagePageSize) + " of " +
                format_bytes(of * kImagePageSize));
    };
    return diff_images(first_fd->get(), std::move(*first), second_fd->get(), std::move(*second),
                       make_page_hasher, how);
  }();
  if (!processes) return fail(kName, processes.error().message());
  if (json) {
    print_json(*processes);
  } else {
    print_text(*processes);
  }
  return kExitOk;
}

}  // namespace

int run_diff(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  if (auto ok = use_keys(*options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  const std::vector<std::string> dirs = options->words("directory");
  if (dirs.size() != 2) return fail(kName, "give two directories of images", kExitUsage);
  auto jobs = jobs_of(*options);
  if (!jobs) return fail(kName, jobs.error().message(), kExitUsage);
  return diff(dirs[0], dirs[1], *jobs, options->has("json"));
}

}  // namespace phos::cli
