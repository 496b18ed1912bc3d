// SPDX-License-Identifier: GPL-2.0-only
#include "tools/phos/criu_stats.h"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>

#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/image/criu_fields.h"

namespace phos::cli {
namespace {

// criu/include/magic.h
constexpr uint32_t kServiceMagic = 0x55105940, kStatsMagic = 0x57093306;
constexpr uint8_t kDumpField = 1 << 3 | 2;  // stats_entry.dump, a message
// Fields of dump_stats_entry.
constexpr uint64_t kFrozenTime = 2, kMemdumpTime = 3, kMemwriteTime = 4;

}  // namespace

std::optional<CriuTimes> read_criu_times(int dir_fd) {
  UniqueFd file(openat(dir_fd, "stats-dump", O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!file) return {};
  std::array<uint8_t, 512> bytes;  // it has some fifty
  const ssize_t n = read(file.get(), bytes.data(), bytes.size());
  struct {
    uint32_t service, stats, size;
  } head;
  if (n < static_cast<ssize_t>(sizeof head) + 2) return {};
  memcpy(&head, bytes.data(), sizeof head);
  const size_t left = static_cast<size_t>(n) - sizeof head;
  const uint8_t* message = bytes.data() + sizeof head;
  // The inner message is the outer one's only field; of less than 128 bytes.
  if (head.service != kServiceMagic || head.stats != kStatsMagic || head.size != left ||
      message[0] != kDumpField || message[1] != left - 2 || message[1] >= 0x80) {
    return {};
  }
  Fields fields(message + 2, left - 2);
  CriuTimes times;
  while (auto field = fields.next()) {
    if (field->first == kFrozenTime) times.frozen = field->second;
    if (field->first == kMemdumpTime) times.memory = field->second;
    if (field->first == kMemwriteTime) times.written = field->second;
  }
  return fields.ok() && times.frozen ? std::optional(times) : std::nullopt;
}

std::string to_line(const CriuTimes& times) {
  char text[160];
  const auto ms = [](uint64_t us) { return static_cast<double>(us) / 1000; };
  snprintf(
      text, sizeof text,
      "\ncriu froze all of it for %.1f ms: collecting CPU memory %.1f ms, writing it %.1f ms\n",
      ms(times.frozen), ms(times.memory), ms(times.written));
  return text;
}

void add_to(JsonWriter& json, const CriuTimes& times) {
  json.key("criu").begin_object().member("frozen_us", times.frozen);
  json.member("memory_us", times.memory).member("written_us", times.written).end_object();
}

}  // namespace phos::cli
