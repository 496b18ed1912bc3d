// SPDX-License-Identifier: GPL-2.0-only
// usage: compress_bench [--mib N] [--runs N] [FILE...]
//
// What storing pages compressed, encrypted, or both costs a thread, and what is left of them: a
// line for each kind of data and each way to store it. GB/s are of the pages' bytes and of the
// processor's time, the median of N runs (5) on N MiB (64). The ratio is of what a pages file grows
// by, in units of 4096 bytes. A FILE is measured instead of the data made here: what `phos extract`
// writes says what a dump of the same program would be.
//
//   random  nothing to gain
//   fp16    weights, normally distributed (deviation 0.02)
//   bf16    the same
//   fp32    values with 8 bits of mantissa, as of bf16 that was converted
//   text    words, every second page zeros (which a dump would not store at all)
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gpu-tracker/image/page_codec.h"
#include "tools/bench/bench.h"

namespace {

using namespace bench;
using namespace phos;
using Bytes = std::vector<uint8_t>;

// `size` bytes of what `next` gives.
template <typename T>
Bytes fill(size_t size, const std::function<T()>& next) {
  Bytes bytes(size);
  for (size_t at = 0; at + sizeof(T) <= size; at += sizeof(T)) {
    const T value = next();
    memcpy(bytes.data() + at, &value, sizeof value);
  }
  return bytes;
}

uint32_t bits(float value) {
  uint32_t b;
  memcpy(&b, &value, sizeof b);
  return b;
}

std::vector<std::pair<std::string, Bytes>> made_data(size_t size) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> weight(0, 0.02f);
  auto fp16 = [&] {
    const auto value = static_cast<_Float16>(weight(random));
    uint16_t b;
    memcpy(&b, &value, sizeof b);
    return b;
  };
  static const char* const kWords[] = {"the ",  "memory ", "of ",    "a ",     "process ", "page ",
                                       "model", "layer ",  "train ", "token ", "and\n",    "is "};
  Bytes text;
  while (text.size() < size) {
    const char* word = kWords[random() % std::size(kWords)];
    text.insert(text.end(), word, word + strlen(word));
  }
  text.resize(size);
  for (size_t at = 0; at < size; at += 2 * kImagePageSize) memset(&text[at], 0, kImagePageSize);
  return {{"random", fill<uint64_t>(size, [&] { return random(); })},
          {"fp16", fill<uint16_t>(size, fp16)},
          {"bf16",
           fill<uint16_t>(size, [&] { return static_cast<uint16_t>(bits(weight(random)) >> 16); })},
          {"fp32", fill<uint32_t>(size, [&] { return bits(weight(random)) & 0xffff0000; })},
          {"text", std::move(text)}};
}

// Whole pages; zeros fill up the last one, as in a dump.
Bytes read_file(const char* path) {
  std::ifstream in(path, std::ios::binary);
  Bytes bytes(std::istreambuf_iterator<char>(in), {});
  if (bytes.empty()) die(std::string(path) + " cannot be read, or is empty");
  bytes.resize((bytes.size() + kImagePageSize - 1) / kImagePageSize * kImagePageSize);
  return bytes;
}

// Of this thread's own time: others may have the processor meanwhile.
double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) / 1e9;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void measure(const std::string& name, const Bytes& data, const PageCodec& codec,
             const std::string& how, int runs) {
  const size_t pages = data.size() / kImagePageSize;
  Bytes stored(data.size()), page(kImagePageSize);
  std::vector<uint32_t> sizes(pages);
  std::vector<Seal> seals(pages);
  std::vector<double> encode, decode;
  const double gigabytes = static_cast<double>(data.size()) / 1e9;
  auto timed = [&](std::vector<double>* to, const std::function<void(size_t page)>& work) {
    const double start = now();
    for (size_t i = 0; i < pages; i++) work(i);
    to->push_back(gigabytes / (now() - start));
  };
  for (int run = 0; run < runs; run++) {
    timed(&encode, [&](size_t i) {
      const size_t at = i * kImagePageSize;
      auto size = codec.encode(&data[at], &stored[at], &seals[i]);
      if (!size) die(size.error().message());
      sizes[i] = *size;
    });
    timed(&decode, [&](size_t i) {
      auto ok = codec.decode(&stored[i * kImagePageSize], sizes[i], &seals[i], page.data());
      if (!ok) die(ok.error().message());
    });
  }
  uint64_t units = 0;
  for (uint32_t size : sizes) units += (size + kPageUnit - 1) / kPageUnit;
  const double ratio = static_cast<double>(data.size()) / static_cast<double>(units * kPageUnit);
  printf("%-12s %-16s %8.2f %8.2f %8.2f\n", name.c_str(), how.c_str(), median(encode),
         median(decode), ratio);
  fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  size_t mib = 64;
  int runs = 5, at = 1;
  for (; at + 1 < argc && argv[at][0] == '-'; at += 2) {
    const std::string option = argv[at];
    const int value = atoi(argv[at + 1]);
    if (value < 1 || (option != "--mib" && option != "--runs")) break;
    if (option == "--mib") mib = static_cast<size_t>(value);
    if (option == "--runs") runs = value;
  }
  if (at < argc && argv[at][0] == '-') die("usage: compress_bench [--mib N] [--runs N] [FILE...]");
  std::vector<std::pair<std::string, Bytes>> data;
  for (; at < argc; at++) {
    const std::string path = argv[at];
    data.emplace_back(path.substr(path.rfind('/') + 1), read_file(argv[at]));
  }
  if (data.empty()) data = made_data(mib << 20);

  SecretKey key;
  key.data()[0] = 1;
  printf("%-12s %-16s %8s %8s %8s\n", "data", "stored", "encode", "decode", "ratio");
  for (const auto& [name, bytes] : data) {
    for (const char* how : {"none", "lz4", "zstd:1", "zstd:3"}) {
      const CompressionChoice compression = *parse_compression(how);
      const PageCodec clear(compression, {}), encrypting(compression, key);
      if (!clear.plain()) measure(name, bytes, clear, how, runs);
      const std::string both = clear.plain() ? "encrypted" : std::string(how) + " encrypted";
      measure(name, bytes, encrypting, both, runs);
    }
  }
}
