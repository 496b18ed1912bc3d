// SPDX-License-Identifier: GPL-2.0-only
// The GPUs of the simulated machine, read from a file: lines "gpu <uuid, 32 hex digits> <bytes>
// <name...>", anything else is ignored. Without the file there is one GPU with a fixed UUID.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "test/sim/sim.h"

namespace phos_sim {
namespace {

constexpr uint64_t kDefaultBytes = uint64_t{8} << 30;
constexpr unsigned char kDefaultUuid[16] = {0x50, 0x48, 0x4f, 0x53, 0x53, 0x49, 0x4d, 0x00,
                                            0x80, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01};

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Accepts 32 hex digits with or without dashes and "GPU-". Returns what follows, or null.
const char* parse_uuid(const char* text, CUuuid* uuid) {
  if (!strncmp(text, "GPU-", 4)) text += 4;
  for (int i = 0; i < 32; text++) {
    if (*text == '-') continue;
    int digit = hex_digit(*text);
    if (digit < 0) return nullptr;
    char& byte = uuid->bytes[i / 2];
    byte = static_cast<char>(i % 2 ? (byte & 0xf0) | digit : digit << 4);
    i++;
  }
  return text;
}

bool parse_line(const char* line, Gpu* gpu) {
  if (strncmp(line, "gpu ", 4)) return false;
  const char* rest = parse_uuid(line + 4, &gpu->uuid);
  if (!rest) return false;
  char* end = nullptr;
  gpu->bytes = strtoull(rest, &end, 0);
  if (!gpu->bytes) return false;
  while (*end == ' ') end++;
  snprintf(gpu->name, sizeof gpu->name, "%s", *end ? end : "Simulated GPU");
  return true;
}

// FNV-1a, never 0.
uint32_t hash(const char* text) {
  uint32_t h = 2166136261u;
  for (; *text; text++) h = (h ^ static_cast<unsigned char>(*text)) * 16777619u;
  return h ? h : 1;
}

}  // namespace

long read_small_file(const char* path, char* buffer, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  size_t got = 0;
  while (got < size - 1) {
    ssize_t n = read(fd, buffer + got, size - 1 - got);
    if (n <= 0) break;
    got += static_cast<size_t>(n);
  }
  close(fd);
  buffer[got] = 0;
  return static_cast<long>(got);
}

void read_machine(const char* path, Machine* machine) {
  char text[8192];
  machine->count = 0;
  machine->id = 0;
  if (read_small_file(path, text, sizeof text) < 0) {
    Gpu& gpu = machine->gpus[machine->count++];
    memcpy(gpu.uuid.bytes, kDefaultUuid, sizeof kDefaultUuid);
    gpu.bytes = kDefaultBytes;
    snprintf(gpu.name, sizeof gpu.name, "Simulated GPU");
    return;
  }
  machine->id = hash(path);
  char* next = nullptr;
  for (char* line = strtok_r(text, "\n", &next); line && machine->count < kMaxGpus;
       line = strtok_r(nullptr, "\n", &next)) {
    if (parse_line(line, &machine->gpus[machine->count])) machine->count++;
  }
}

}  // namespace phos_sim
