// SPDX-License-Identifier: GPL-2.0-only
// phos show: prints what phos recorded in a directory of images.

#include <cstdio>
#include <optional>
#include <utility>

#include "gpu-tracker/image/page_statistics.h"
#include "tools/phos/command.h"
#include "tools/phos/criu_stats.h"
#include "tools/phos/gpu_images.h"
#include "tools/phos/image_dir.h"
#include "tools/phos/storage_options.h"

namespace phos::cli {
namespace {

constexpr char kName[] = "show";

Syntax syntax() {
  Syntax s;
  s.command = kName;
  s.usage = "DIR [--pages] [--json]";
  s.about =
      "Prints the CUDA processes that a dump in DIR holds: their GPUs, their memory, who\n"
      "saved it, how long it took, and what zero pages, equal pages, parents and\n"
      "compression have saved. Verifies the images on the way, but no pages of memory\n"
      "(`phos verify` does). Needs neither a GPU nor root, only the right to read DIR.\n";
  s.positional = "directory";
  s.options.add_options()("pages", "tell where the saved pages of each allocation are");
  s.options.add_options()("json", "print JSON");
  add_key_option(&s);
  return s;
}

}  // namespace

int run_show(const std::vector<std::string>& args) {
  Syntax s = syntax();
  auto options = parse(s, args);
  if (!options) return fail(kName, options.error().message(), kExitUsage);
  if (options->help) return kExitOk;
  if (auto ok = use_keys(*options); !ok) return fail(kName, ok.error().message(), kExitUsage);
  const std::vector<std::string> dirs = options->words("directory");
  if (dirs.size() != 1) return fail(kName, "give one directory of images", kExitUsage);
  auto fd = open_existing(dirs[0]);
  if (!fd) return fail(kName, fd.error().message());
  auto images = read_image_set(fd->get());
  if (!images) return fail(kName, images.error().message());
  bool json = options->has("json");
  if (images->processes.empty() && images->files.files.empty()) {
    // No GPU state at all: is it a dump?
    if (auto ok = check_inventory(fd->get(), dirs[0]); !ok) {
      return fail(kName, ok.error().message());
    }
    if (!json) {
      printf("%s holds a dump without CUDA processes\n", dirs[0].c_str());
      return kExitOk;
    }
  }
  std::optional<ShownRuns> runs;
  if (options->has("pages")) {
    auto found = page_runs(fd->get(), *images);
    if (!found) return fail(kName, found.error().message());
    runs = std::move(*found);
  }
  const ShownRuns* const shown = runs ? &*runs : nullptr;
  const auto times = read_criu_times(fd->get());
  if (json) {
    const auto more = [&](JsonWriter& w) {
      if (times) add_to(w, *times);
    };
    fputs(to_json(*images, shown, more).c_str(), stdout);
  } else {
    fputs((to_table(*images, shown) + (times ? to_line(*times) : "")).c_str(), stdout);
  }
  return kExitOk;
}

}  // namespace phos::cli
