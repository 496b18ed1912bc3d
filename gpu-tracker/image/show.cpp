// SPDX-License-Identifier: GPL-2.0-only
// What `phos show` prints of an image set.
#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <ctime>
#include <map>

#include "gpu-tracker/base/json.h"
#include "gpu-tracker/image/container.h"
#include "gpu-tracker/image/image.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_statistics.h"

namespace phos {
namespace {

__attribute__((format(printf, 1, 2))) std::string format(const char* format, ...) {
  char text[256];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return text;
}

std::string hex(uint64_t value) {
  return format("0x%" PRIx64, value);
}

std::string human_bytes(uint64_t bytes) {
  static const char* const kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return format("%" PRIu64 " B", bytes);
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  // 1023.95 would print as 1024.0.
  while (value >= 1023.95 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    unit++;
  }
  return format("%.1f %s", value, kUnits[unit]);
}

std::string human_time(uint64_t us) {
  if (us == 0) return "-";
  if (us < 1'000'000) return format("%.1f ms", static_cast<double>(us) / 1e3);
  return format("%.2f s", static_cast<double>(us) / 1e6);
}

std::string utc(uint64_t us) {
  time_t seconds = static_cast<time_t>(us / 1'000'000);
  struct tm tm;
  char text[64];
  if (!gmtime_r(&seconds, &tm) || !strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S UTC", &tm)) {
    return "?";
  }
  return text;
}

std::string cuda_version(int api) {
  return format("%d.%d", api / 1000, api % 1000 / 10);
}

// All zeros: nothing was dumped.
DumpId dump_id_of(const ImageSet& set) {
  return set.processes.empty() ? set.files.dump_id : set.processes.front().dump_id;
}

// Empty for a set that was not read from a directory.
std::vector<ChainLevel> chain_of(const ImageSet& set, size_t process) {
  return process < set.chains.size() ? set.chains[process] : std::vector<ChainLevel>();
}

void write_pages(JsonWriter& json, const PageCounts& pages) {
  json.key("pages").begin_object().member("here", pages.here).member("parent", pages.parent);
  json.member("zero", pages.zero).member("other", pages.other).member("dropped", pages.dropped);
  json.end_object();
}

void write_runs(JsonWriter& json, const std::vector<ShownRun>& runs) {
  json.key("runs").begin_array();
  for (const ShownRun& run : runs) {
    json.begin_object().member("first_page", run.first_page).member("pages", run.pages);
    json.member("from", to_string(run.from));
    if (!run.file.empty()) {
      json.member("level", run.level).member("file", run.file).member("slot", run.slot);
    }
    json.end_object();
  }
  json.end_array();
}

void write_statistics(JsonWriter& json, const PageStatistics& s) {
  json.key("statistics").begin_object().member("pages", s.pages).member("zero", s.zero);
  json.member("in_parents", s.in_parents).member("equal", s.equal);
  json.member("equal_to_other_processes", s.equal_to_other).member("dropped", s.dropped);
  json.member("stored", s.stored).member("stored_bytes", s.stored_bytes);
  json.member("memory_bytes", s.pages * kImagePageSize).end_object();
}

void write_allocation(JsonWriter& json, const AllocationInfo& a,
                      const std::vector<ShownRun>* runs) {
  // The address as text: a JSON number loses bits above 2^53 in many readers.
  json.begin_object().member("address", hex(a.address)).member("size", a.size);
  json.member("gpu", a.gpu).member("kind", to_string(a.kind));
  json.member("path", to_string(a.path));
  if (a.buffer_id) json.member("buffer_id", a.buffer_id);
  if (!a.hashes.empty()) write_pages(json, count_pages(a));
  if (!a.hashes.empty() && runs) write_runs(json, *runs);
  json.end_object();
}

void write_saved(JsonWriter& json, const ProcessImage& p, const std::vector<ChainLevel>& chain) {
  write_pages(json, count_pages(p));
  json.key("rounds").begin_array();
  for (const DumpRound& round : p.rounds) {
    json.begin_object().member("pages", round.pages).member("dirty_pages", round.dirty_pages);
    json.member("bytes", round.bytes).member("us", round.us);
    if (round.copy_us) json.member("copy_us", round.copy_us);
    if (round.since_us) json.member("since_us", round.since_us);
    json.end_object();
  }
  json.end_array().key("chain").begin_array();
  for (const ChainLevel& level : chain) {
    json.begin_object().member("directory", level.directory);
    json.member("dump_id", format_dump_id(level.dump_id)).member("stage", to_string(level.stage));
    json.member("created_us", level.created_us);
    write_pages(json, level.pages);
    json.end_object();
  }
  json.end_array();
}

void write_process(JsonWriter& json, const ProcessImage& p, const std::vector<ChainLevel>& chain,
                   const std::vector<std::vector<ShownRun>>* runs) {
  json.begin_object();
  json.member("pid", p.pid).member("comm", p.comm).member("state", to_string(p.state));
  json.member("stage", to_string(p.stage)).key("parent_dump_id");
  if (p.parent_dump_id == DumpId{}) {
    json.null();
  } else {
    json.value(format_dump_id(p.parent_dump_id));
  }
  json.member("driver_release", p.driver_release).member("driver_api", p.driver_api);
  json.member("created_us", p.created_us).member("phos_version", p.phos_version);
  if (p.device_bytes) {
    json.member("device_bytes", p.device_bytes).member("unlisted_bytes", unlisted_bytes(p));
  }
  if (p.key_id != KeyId{}) json.member("key_id", format_key_id(p.key_id));
  json.key("gpus").begin_array();
  for (size_t i = 0; i < p.gpus.size(); i++) {
    const GpuInfo& gpu = p.gpus[i];
    json.begin_object().member("uuid", format_gpu_uuid(gpu.uuid)).member("name", gpu.name);
    json.member("total_bytes", gpu.total_bytes);
    if (!p.gpu_bytes.empty()) json.member("process_bytes", p.gpu_bytes[i]);
    json.end_object();
  }
  json.end_array().key("allocations").begin_array();
  for (size_t i = 0; i < p.allocations.size(); i++) {
    write_allocation(json, p.allocations[i], runs ? &(*runs)[i] : nullptr);
  }
  json.end_array().key("timings").begin_object();
  auto timing = [&](const char* name, uint64_t us) {
    if (us) json.member(name, us);
  };
  timing("scan_us", p.timings.scan_us);
  timing("lock_us", p.timings.lock_us);
  timing("checkpoint_us", p.timings.checkpoint_us);
  timing("gate_us", p.timings.gate_us);
  timing("validate_us", p.timings.validate_us);
  timing("write_us", p.timings.write_us);
  timing("release_us", p.timings.release_us);
  timing("copy_us", p.timings.copy_us);
  timing("stopped_us", p.timings.stopped_us);
  json.end_object();
  if (!p.hash_key.empty()) write_saved(json, p, chain);
  json.end_object();
}

std::string page_text(const PageCounts& pages) {
  std::string out =
      format("%" PRIu64 " here (%s), %" PRIu64 " in parents, %" PRIu64 " zero", pages.here,
             human_bytes(pages.here * kImagePageSize).c_str(), pages.parent, pages.zero);
  if (pages.other) out += format(", %" PRIu64 " in other files", pages.other);
  if (pages.dropped) out += format(", %" PRIu64 " dropped", pages.dropped);
  return out;
}

// What was not stored, and why.
std::string statistics_table(const PageStatistics& s) {
  if (s.pages == 0) return "";
  std::string out = "\n  memory              pages          size\n";
  auto row = [&](const char* what, uint64_t pages, const std::string& more = "") {
    if (!pages) return;
    out += format("  %-14s %10" PRIu64 "  %12s", what, pages,
                  human_bytes(pages * kImagePageSize).c_str()) +
           more + "\n";
  };
  row("saved", s.pages);
  row("zero", s.zero);
  row("in parents", s.in_parents);
  row("equal", s.equal, "  to another page of the process");
  row("shared", s.equal_to_other, "  with another process");
  row("dropped", s.dropped, "  since nothing needs it");
  const uint64_t bytes = s.stored * kImagePageSize;
  std::string more;
  if (s.stored_bytes < bytes) {
    more = format("  as %s (%.1f %%)", human_bytes(s.stored_bytes).c_str(),
                  100 * static_cast<double>(s.stored_bytes) / static_cast<double>(bytes));
  }
  row("stored", s.stored, more);
  return out;
}

std::string runs_table(const ProcessImage& p, const std::vector<std::vector<ShownRun>>& runs) {
  std::string out;
  for (size_t i = 0; i < runs.size(); i++) {
    const AllocationInfo& a = p.allocations[i];
    if (runs[i].empty()) continue;
    out += format("\n  process %d, %s, allocation at %s (%s)\n", p.pid,
                  a.gpu < 0 ? "host" : ("GPU " + std::to_string(a.gpu)).c_str(),
                  hex(a.address).c_str(), human_bytes(a.size).c_str());
    out += "    first page       pages  from\n";
    for (const ShownRun& run : runs[i]) {
      out += format("    %10" PRIu64 "  %10" PRIu64 "  %s", run.first_page, run.pages,
                    to_string(run.from));
      if (run.level) out += format(", level %zu", run.level);
      if (!run.file.empty()) out += format(": %s, slot %" PRIu64, run.file.c_str(), run.slot);
      out += "\n";
    }
  }
  return out;
}

// A second; "-": not known.
std::string rate(uint64_t bytes, uint64_t us) {
  if (!us) return "-";
  return human_bytes(
             static_cast<uint64_t>(static_cast<double>(bytes) * 1e6 / static_cast<double>(us))) +
         "/s";
}

// What phos saved itself, and where it is.
std::string saved_table(const ProcessImage& p, const std::vector<ChainLevel>& chain) {
  std::string out = "  pages    " + page_text(count_pages(p)) + "\n";
  if (!p.rounds.empty()) {
    out +=
        "  round         pages        dirty       written        time        copied       "
        "changed\n";
  }
  for (size_t i = 0; i < p.rounds.size(); i++) {
    const DumpRound& round = p.rounds[i];
    out +=
        format("  %-5zu  %12" PRIu64 " %12" PRIu64 "  %12s  %10s  %12s  %12s\n", i + 1, round.pages,
               round.dirty_pages, human_bytes(round.bytes).c_str(), human_time(round.us).c_str(),
               rate(round.bytes, round.copy_us).c_str(), rate(round.bytes, round.since_us).c_str());
  }
  if (chain.size() > 1) out += "  level  stage     dumped                   directory\n";
  for (size_t i = 0; chain.size() > 1 && i < chain.size(); i++) {
    const ChainLevel& level = chain[i];
    out += format("  %-5zu  %-8s  ", i, to_string(level.stage)) + utc(level.created_us) + "  " +
           printable(level.directory) + ": " + page_text(level.pages) + "\n";
  }
  return out;
}

// Where the time went in which the process stood still.
std::string stop_text(const Timings& t) {
  std::string out = "  stopped  " + human_time(t.stopped_us);
  const std::pair<const char*, uint64_t> parts[] = {
      {"gate", t.gate_us},       {"validate", t.validate_us},     {"write", t.write_us},
      {"release", t.release_us}, {"checkpoint", t.checkpoint_us}, {"copy", t.copy_us},
  };
  const char* before = ": ";
  for (const auto& [name, us] : parts) {
    if (!us) continue;
    out += std::string(before) + name + " " + human_time(us);
    before = ", ";
  }
  return out + "\n";
}

std::string process_table(const ProcessImage& p, const std::vector<ChainLevel>& chain) {
  std::string out =
      format("\nprocess %d  ", p.pid) + printable(p.comm) + "  " + to_string(p.state) + "\n";
  out += "  dumped   " + utc(p.created_us) + " by phos " + printable(p.phos_version) + ", driver " +
         printable(p.driver_release) + ", CUDA " + cuda_version(p.driver_api) + "\n";
  for (size_t i = 0; i < p.gpus.size(); i++) {
    out += format("  GPU %-3zu  ", i) + printable(p.gpus[i].name) + ", " +
           human_bytes(p.gpus[i].total_bytes) + ", " + format_gpu_uuid(p.gpus[i].uuid) + "\n";
  }
  if (p.device_bytes) {
    out += "  memory   " + human_bytes(p.device_bytes) + " on the GPUs" +
           (p.hash_key.empty() ? ", saved by the driver\n" : "\n");
  }
  if (p.key_id != KeyId{}) {
    out += "  key      " + format_key_id(p.key_id) + " (phos's images are encrypted)\n";
  }
  struct Sum {
    uint64_t count = 0, bytes = 0;
  };
  std::map<std::pair<MemoryPath, MemoryKind>, Sum> sums;
  Sum total;
  for (const AllocationInfo& a : p.allocations) {
    for (Sum* sum : {&sums[{a.path, a.kind}], &total}) {
      if (sum == &total && a.path == MemoryPath::kCopy) continue;  // of what is listed
      sum->count++;
      sum->bytes += a.size;
    }
  }
  auto row = [&](const char* path, const char* kind, const Sum& sum) {
    out += format("  %-8s  %-8s  %11" PRIu64 "  %12s\n", path, kind, sum.count,
                  human_bytes(sum.bytes).c_str());
  };
  if (!sums.empty()) out += "  path      kind      allocations          size\n";
  for (const auto& [key, sum] : sums) row(to_string(key.first), to_string(key.second), sum);
  const uint64_t unlisted = sums.empty() ? 0 : unlisted_bytes(p);
  if (unlisted) {
    out += format("  %-8s  %-8s  %11s  %12s\n", to_string(MemoryPath::kDriver), "other", "-",
                  human_bytes(unlisted).c_str());
    total.bytes += unlisted;
  }
  if (sums.size() + (unlisted ? 1 : 0) > 1) row("total", "", total);
  if (!p.hash_key.empty()) out += saved_table(p, chain);
  out += "  timings  scan " + human_time(p.timings.scan_us) + ", lock " +
         human_time(p.timings.lock_us) + ", checkpoint " + human_time(p.timings.checkpoint_us) +
         "\n";
  if (p.timings.stopped_us) out += stop_text(p.timings);
  return out;
}

}  // namespace

std::string to_json(const ImageSet& set, const ShownRuns* runs,
                    const std::function<void(JsonWriter&)>& more) {
  JsonWriter json;
  json.begin_object().key("dump_id");
  DumpId id = dump_id_of(set);
  if (id == DumpId{}) {
    json.null();
  } else {
    json.value(format_dump_id(id));
  }
  json.key("processes").begin_array();
  for (size_t i = 0; i < set.processes.size(); i++) {
    write_process(json, set.processes[i], chain_of(set, i), runs ? &(*runs)[i] : nullptr);
  }
  json.end_array();
  const PageStatistics statistics = page_statistics(set.processes);
  if (statistics.pages) write_statistics(json, statistics);
  json.key("files").begin_array();
  for (const DeviceFile& file : set.files.files) {
    json.begin_object().member("id", file.id).member("path", file.path);
    json.member("flags", file.flags).end_object();
  }
  json.end_array();
  if (more) more(json);
  json.end_object();
  return json.str() + "\n";
}

std::string to_table(const ImageSet& set, const ShownRuns* runs) {
  DumpId id = dump_id_of(set);
  if (id == DumpId{}) return "no phos images\n";
  DumpStage stage = set.processes.empty() ? DumpStage::kDump : set.processes.front().stage;
  std::string out = to_string(stage) + (" " + format_dump_id(id)) + "\n";
  for (size_t i = 0; i < set.processes.size(); i++) {
    out += process_table(set.processes[i], chain_of(set, i));
  }
  out += statistics_table(page_statistics(set.processes));
  for (size_t i = 0; runs && i < runs->size(); i++) out += runs_table(set.processes[i], (*runs)[i]);
  if (!set.files.files.empty()) out += "\n  file id  flags       path\n";
  for (const DeviceFile& file : set.files.files) {
    out += format("  %7u  %-10s  ", file.id, hex(file.flags).c_str()) + printable(file.path) + "\n";
  }
  return out;
}

}  // namespace phos
