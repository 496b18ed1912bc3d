// SPDX-License-Identifier: GPL-2.0-only
// phos gc: frees pages of pre-dumps that no dump needs any more.

#include <cstdio>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/collect.h"
#include "tools/phos/command.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/progress_line.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

using Keeps = CollectedLevel::Keeps;

constexpr char kName[] = "gc";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "[--dry-run] [--json] DIR...";
  s.about =
      "Frees the disk space of pages of GPU memory that nothing needs any more in the images of\n"
      "DIRs and their parents: pages of pre-dumps of which the dumps that build on them have "
      "newer\n"
      "ones. Dumps keep all that they need, wherever it lies, and so do pre-dumps that nothing\n"
      "builds on yet. Give all directories that build on the same parents; those beside them are\n"
      "looked at, and nothing is freed if one was left out. What lies elsewhere cannot be known,\n"
      "and finds pages gone. Temporary files of killed writers are removed, too. CRIU's own pages\n"
      "are `criu dedup`'s business. Needs neither a GPU nor root, only the right to write the\n"
      "directories.\n";
  s.positional = "directory";
  s.options.add_options()("dry-run,n", "only tell what would be freed")("json", "print JSON");
  add_key_option(&s);
  return s;
}

const char* to_string(Keeps keeps) {
  switch (keeps) {
    case Keeps::kWhatIsNeeded:
      return "needed pages";
    case Keeps::kAllOfADump:
      return "all: a dump";
    case Keeps::kAllOfTheNewest:
      return "all: nothing builds on it yet";
  }
  return "?";
}

FreedSpace total(const std::vector<CollectedLevel>& levels) {
  FreedSpace all;
  for (const CollectedLevel& level : levels) {
    all.files += level.freed.files;
    all.bytes += level.freed.bytes;
  }
  return all;
}

uint64_t kept(const CollectedLevel& level) {
  return level.pages - level.dropped - level.gone;
}

void print_json(bool dry_run, const std::vector<CollectedLevel>& levels) {
  JsonWriter w;
  w.begin_object().member("dry_run", dry_run).key("directories").begin_array();
  for (const CollectedLevel& level : levels) {
    w.begin_object().member("directory", level.directory);
    w.member("stage", phos::to_string(level.stage)).member("keeps", to_string(level.keeps));
    w.member("pages", level.pages).member("kept_pages", kept(level));
    w.member("dropped_pages", level.dropped).member("dropped_before", level.gone);
    w.member("removed_files", level.freed.files).member("freed_bytes", level.freed.bytes);
    w.end_object();
  }
  w.end_array().member("freed_bytes", total(levels).bytes).end_object();
  printf("%s\n", w.str().c_str());
}

void print_text(bool dry_run, const std::vector<CollectedLevel>& levels) {
  const std::string would = dry_run ? "would be " : "";
  for (const CollectedLevel& level : levels) {
    std::string text = level.directory + " (" + phos::to_string(level.stage) + "): ";
    text += std::to_string(kept(level)) + " pages kept (" + to_string(level.keeps) + ")";
    if (level.dropped) text += ", " + std::to_string(level.dropped) + " " + would + "dropped";
    if (level.gone) text += ", " + std::to_string(level.gone) + " dropped before";
    if (level.freed.files)
      text += "; files " + would + "removed: " + std::to_string(level.freed.files);
    if (level.freed.bytes) text += "; " + format_bytes(level.freed.bytes) + " " + would + "freed";
    printf("%s\n", text.c_str());
  }
  printf("%s %sfreed\n", format_bytes(total(levels).bytes).c_str(), would.c_str());
}

// As a restore finds it.
Result<UniqueFd> open_images(const std::string& dir) {
  auto fd = open_existing(dir);
  if (!fd) return fd;
  auto set = read_image_set(fd->get());
  if (!set) return set.error();
  if (set->processes.empty() || set->processes.front().stage == DumpStage::kDump) {
    if (auto ok = check_inventory(fd->get(), dir); !ok) return ok.error();
  }
  return fd;
}

int collect(const std::vector<std::string>& dirs, bool dry_run, bool json) {
  std::vector<UniqueFd> open;
  std::vector<int> fds;
  for (const std::string& dir : dirs) {
    auto fd = open_images(dir);
    if (!fd) return fail(kName, fd.error().message());
    fds.push_back(fd->get());
    open.push_back(std::move(*fd));
  }
  auto levels = [&] {
    ProgressLine line;
    CollectOptions options;
    options.dry_run = dry_run;
    options.lock = lock_directory;
    options.progress = [&](const std::string& what) { line.draw(what); };
    return collect_pages(fds, options);
  }();
  if (!levels) return fail(kName, levels.error().message());
  if (json) {
    print_json(dry_run, *levels);
  } else {
    print_text(dry_run, *levels);
  }
  return kExitOk;
}

}  // namespace

int run_gc(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  if (auto ok = use_keys(*options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  const std::vector<std::string> dirs = options->words("directory");
  if (dirs.empty()) return fail(kName, "give directories of images", kExitUsage);
  return collect(dirs, options->has("dry-run"), options->has("json"));
}

}  // namespace phos::cli
