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

void write_process(JsonWriter& json, const ProcessImage& p) {
  json.begin_object();
  json.member("pid", p.pid).member("comm", p.comm).member("state", to_string(p.state));
  json.member("driver_release", p.driver_release).member("driver_api", p.driver_api);
  json.member("created_us", p.created_us).member("phos_version", p.phos_version);
  if (p.device_bytes) json.member("device_bytes", p.device_bytes);
  json.key("gpus").begin_array();
  for (const GpuInfo& gpu : p.gpus) {
    json.begin_object().member("uuid", format_gpu_uuid(gpu.uuid)).member("name", gpu.name);
    json.member("total_bytes", gpu.total_bytes).end_object();
  }
  json.end_array().key("allocations").begin_array();
  for (const AllocationInfo& a : p.allocations) {
    // The address as text: a JSON number loses bits above 2^53 in many readers.
    json.begin_object().member("address", hex(a.address)).member("size", a.size);
    json.member("gpu", a.gpu).member("kind", to_string(a.kind));
    json.member("path", to_string(a.path)).end_object();
  }
  json.end_array().key("timings").begin_object();
  auto timing = [&](const char* name, uint64_t us) {
    if (us) json.member(name, us);
  };
  timing("scan_us", p.timings.scan_us);
  timing("lock_us", p.timings.lock_us);
  timing("checkpoint_us", p.timings.checkpoint_us);
  json.end_object().end_object();
}

std::string process_table(const ProcessImage& p) {
  std::string out =
      format("\nprocess %d  ", p.pid) + printable(p.comm) + "  " + to_string(p.state) + "\n";
  out += "  dumped   " + utc(p.created_us) + " by phos " + printable(p.phos_version) + ", driver " +
         printable(p.driver_release) + ", CUDA " + cuda_version(p.driver_api) + "\n";
  for (size_t i = 0; i < p.gpus.size(); i++) {
    out += format("  GPU %-3zu  ", i) + printable(p.gpus[i].name) + ", " +
           human_bytes(p.gpus[i].total_bytes) + ", " + format_gpu_uuid(p.gpus[i].uuid) + "\n";
  }
  if (p.device_bytes) {
    out += "  memory   " + human_bytes(p.device_bytes) + " on the GPUs, saved by the driver\n";
  }
  struct Sum {
    uint64_t count = 0, bytes = 0;
  };
  std::map<std::pair<MemoryPath, MemoryKind>, Sum> sums;
  Sum total;
  for (const AllocationInfo& a : p.allocations) {
    for (Sum* sum : {&sums[{a.path, a.kind}], &total}) {
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
  if (sums.size() > 1) row("total", "", total);
  out += "  timings  scan " + human_time(p.timings.scan_us) + ", lock " +
         human_time(p.timings.lock_us) + ", checkpoint " + human_time(p.timings.checkpoint_us) +
         "\n";
  return out;
}

}  // namespace

std::string to_json(const ImageSet& set) {
  JsonWriter json;
  json.begin_object().key("dump_id");
  DumpId id = dump_id_of(set);
  if (id == DumpId{}) {
    json.null();
  } else {
    json.value(format_dump_id(id));
  }
  json.key("processes").begin_array();
  for (const ProcessImage& p : set.processes) write_process(json, p);
  json.end_array().key("files").begin_array();
  for (const DeviceFile& file : set.files.files) {
    json.begin_object().member("id", file.id).member("path", file.path);
    json.member("flags", file.flags).end_object();
  }
  json.end_array().end_object();
  return json.str() + "\n";
}

std::string to_table(const ImageSet& set) {
  DumpId id = dump_id_of(set);
  if (id == DumpId{}) return "no phos images\n";
  std::string out = "dump " + format_dump_id(id) + "\n";
  for (const ProcessImage& p : set.processes) out += process_table(p);
  if (!set.files.files.empty()) out += "\n  file id  flags       path\n";
  for (const DeviceFile& file : set.files.files) {
    out += format("  %7u  %-10s  ", file.id, hex(file.flags).c_str()) + printable(file.path) + "\n";
  }
  return out;
}

}  // namespace phos
