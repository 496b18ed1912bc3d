// SPDX-License-Identifier: GPL-2.0-only
#include "test/image/fuzz.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "gpu-tracker/image/codec.h"
#include "gpu-tracker/image/page_codec.h"
#include "gpu-tracker/image/page_file.h"
#include "gpu-tracker/image/sealed.h"

namespace phos::image_test {
namespace {

constexpr size_t kLargestPart = 0xffff;

uint32_t kind_of(Part::File file) {
  return file == Part::kFiles ? 2 : 1;
}
bool is_pages(Part::File file) {
  return file == Part::kPages0 || file == Part::kPages1 || file == Part::kParentPages;
}

Part payload(Part::File file, const Result<Bytes>& bytes) {
  return {file, Part::kSealed, bytes ? *bytes : Bytes()};
}

// `units`: of a packed file, what is stored in each.
Part pages(Part::File file, uint64_t slots, uint32_t gpu, uint8_t dump,
           const PageFileFormat& format = {}, const std::vector<Bytes>& units = {}) {
  Bytes header = {'P', 'H', 'O', 'S', 'P', 'A', 'G', 0};
  auto put = [&](uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) header.push_back(static_cast<uint8_t>(value >> (8 * i)));
  };
  put(format.layout.packed ? 2 : 1, 4);
  put(65536, 4);
  put(slots, 8);
  for (int i = 0; i < 16; i++) put(dump, 1);
  put(7, 4);
  put(gpu, 4);
  put(format.layout.packed, 1);
  put(static_cast<uint64_t>(format.compression), 1);
  put(format.layout.sealed, 2);
  for (size_t i = 0; i < units.size(); i++) {
    header.resize(52 + i * kPageUnit);
    header.insert(header.end(), units[i].begin(), units[i].end());
  }
  return {file, Part::kSealed, header};
}

// What is stored of a page of one letter.
Bytes compressed(Compression method, char letter) {
  const Bytes page(kImagePageSize, static_cast<uint8_t>(letter));
  Bytes out(kImagePageSize);
  auto bytes = PageCodec({method, 1}, std::nullopt).encode(page.data(), out.data(), nullptr);
  out.resize(bytes ? *bytes : 0);
  return out;
}

ProcessImage process(uint8_t dump) {
  ProcessImage image;
  image.dump_id.fill(dump);
  image.pid = 7;
  image.comm = "app";
  image.driver_release = "580.1";
  image.driver_api = 13000;
  image.phos_version = "1";
  image.hash_key = {'k', 'e', 'y'};
  image.rounds = {{4, 4, 4 << 16, 9}};
  image.timings.scan_us = 5;
  return image;
}

template <typename T>
T& one_of(std::vector<T>& items, std::mt19937& random) {
  return items[random() % items.size()];
}

uint64_t number(std::mt19937& random) {
  static const uint64_t kEdges[] = {
      0,          1,     2,     3,       7,       64,       127, 128,
      65535,      65536, 65537, 1 << 20, 1 << 30, 1u << 31, ~0u, uint64_t{1} << 32,
      ~0ull >> 1, ~0ull};
  if (random() % 8 == 0) return uint64_t{random()} << (random() % 33);
  const uint64_t edge = kEdges[random() % std::size(kEdges)];
  return edge + (random() % 4 == 0 ? uint64_t{random() % 3} - 1 : 0);
}

void mutate_bytes(Bytes& bytes, std::mt19937& random) {
  switch (random() % 4) {
    case 0:
      bytes.resize(random() % (bytes.size() + 20));
      break;
    case 1:
      bytes.insert(bytes.end(), bytes.begin(), bytes.end());
      break;
    default:
      if (!bytes.empty()) one_of(bytes, random) ^= static_cast<uint8_t>(1 << random() % 8);
  }
  if (bytes.size() > kLargestPart / 4) bytes.resize(kLargestPart / 4);
}

// Each list of fields in a message, its own and those of messages in it, as often as it has fields.
void collect(WireMessage& message, std::vector<WireMessage*>* lists) {
  lists->insert(lists->end(), message.size(), &message);
  for (WireField& field : message) collect(field.children, lists);
}

void mutate_message(WireMessage& message, std::mt19937& random) {
  std::vector<WireMessage*> lists;
  collect(message, &lists);
  if (lists.empty()) return;
  WireMessage& list = *one_of(lists, random);
  WireField& field = one_of(list, random);
  switch (random() % 12) {
    case 0:
      list.erase(list.begin() + (&field - list.data()));
      return;
    case 1:
      list.push_back(WireField(field));
      return;
    case 2:
      std::swap(field, one_of(list, random));
      return;
    case 3:  // the same field, of another message
      for (WireField& other : *one_of(lists, random)) {
        if (other.number == field.number && other.kind == field.kind) {
          field = WireField(other);
          return;
        }
      }
      return;
    case 4:
      if (random() % 4 == 0) field.number = number(random) % 32;
      return;
    case 5:
      if (random() % 4 == 0) field.lie = number(random);
      return;
    default:
      if (field.kind == WireField::Kind::kNumber) {
        field.value = random() % 4 == 0 ? field.value + random() % 3 - 1 : number(random);
      } else if (field.kind == WireField::Kind::kBytes) {
        mutate_bytes(field.data, random);
      } else {
        mutate_message(field.children, random);
      }
  }
}

void mutate_part(Part& part, std::mt19937& random) {
  if (part.how == Part::kRaw || part.file == Part::kLink) return mutate_bytes(part.content, random);
  if (random() % 32 == 0) {  // with the checksums of what it was
    if (is_pages(part.file)) {
      part.content = seal_page_header(part.content);
      part.content.resize(60);
    } else if (part.file == Part::kFiles) {
      part.content = seal_payload(part.content, 2);
    } else {
      part.content = process_file(part);
    }
    part.how = Part::kRaw;
    return mutate_bytes(part.content, random);
  }
  if (is_pages(part.file)) {
    part.content.resize(std::max<size_t>(part.content.size(), 52));
    const uint64_t value = number(random);
    memcpy(part.content.data() + 4 * (random() % 12), &value, 4 + 4 * (random() % 2));
    // How pages are stored, and what is stored.
    if (random() % 2) part.content[48 + random() % 4] = static_cast<uint8_t>(random() % 4);
    if (random() % 2) one_of(part.content, random) ^= static_cast<uint8_t>(1 << random() % 8);
    return;
  }
  WireMessage message = parse_payload(part.content, kind_of(part.file));
  mutate_message(message, random);
  part.content = serialise(message);
}

}  // namespace

Bytes process_file(const Part& part) {
  if (part.how != Part::kEncrypted) return seal_payload(part.content, 1);
  SealedHeader header;
  for (const WireField& field : parse_payload(part.content, 1)) {
    if (field.number != 1 || field.data.size() != header.dump_id.size()) continue;
    std::copy(field.data.begin(), field.data.end(), header.dump_id.begin());
  }
  header.key_id = fuzz_key()->id();
  header.nonce.fill(3);  // inputs are the same every time
  Bytes sealed(sizeof header + part.content.size());
  const auto keys = fuzz_key()->derive(header.dump_id);
  const bool done = keys && gcm_encrypt(keys->image, header.nonce, part.content.data(),
                                        part.content.size(), &sealed[sizeof header], &header.tag)
                                .ok();
  if (!done) return {};
  memcpy(sealed.data(), &header, sizeof header);
  return seal_payload(sealed, 3, 2);
}

Input unpack(const uint8_t* data, size_t size) {
  Input input;
  while (size >= 4) {
    const size_t length = std::min<size_t>(data[2] | data[3] << 8, size - 4);
    Part part{static_cast<Part::File>(data[0] % Part::kFileCount),
              static_cast<Part::How>(data[1] % Part::kHowCount),
              Bytes(data + 4, data + 4 + length)};
    input.push_back(std::move(part));
    data += 4 + length;
    size -= 4 + length;
  }
  return input;
}

Bytes pack(const Input& input) {
  Bytes out;
  for (const Part& part : input) {
    const size_t length = std::min(part.content.size(), kLargestPart);
    out.insert(out.end(), {part.file, part.how, static_cast<uint8_t>(length),
                           static_cast<uint8_t>(length >> 8)});
    out.insert(out.end(), part.content.begin(),
               part.content.begin() + static_cast<ptrdiff_t>(length));
  }
  return out;
}

namespace {

Input plain_seed() {
  constexpr auto kHere = PageSource::kHere;
  ProcessImage parent = process(1), image = process(2);
  parent.stage = DumpStage::kPreDump;
  image.parent_dump_id = parent.dump_id;
  GpuInfo gpu;
  gpu.name = "GPU";
  gpu.total_bytes = 1 << 30;
  for (uint8_t i : {1, 2}) {
    gpu.uuid.fill(i);
    image.gpus.push_back(gpu);
    if (i == 1) parent.gpus.push_back(gpu);
  }
  AllocationInfo saved{1 << 20, (4 << 16) - 100, 0, MemoryKind::kDevice, MemoryPath::kReleased, 3};
  for (uint8_t i = 0; i < 4; i++) {
    saved.hashes.emplace_back();
    saved.hashes.back().fill(i);
  }
  saved.extents = {{0, 1, kHere, 0}, {1, 1, PageSource::kZero}, {2, 2, kHere, 1}};
  parent.allocations = {saved};
  saved.hashes[2].fill(9);
  saved.extents = {{0, 1, PageSource::kParent},
                   {1, 1, PageSource::kZero},
                   {2, 1, kHere, 0},
                   {3, 1, PageSource::kParent}};
  image.allocations = {saved,
                       {2 << 20, 3 << 16, 1, MemoryKind::kVirtual, MemoryPath::kDriver},
                       {4 << 20, 4096, -1, MemoryKind::kHost, MemoryPath::kDriver}};
  image.allocations[1].hashes.resize(3);
  image.allocations[1].extents = {{0, 3, kHere, 0}};
  FilesImage files{image.dump_id, {{7, "/dev/nvidiactl", 2}, {8, "/dev/nvidia0", 2}}};
  const char kTarget[] = "../1";
  return {payload(Part::kProcess, encode(image)),
          payload(Part::kFiles, encode(files)),
          pages(Part::kPages0, 1, 0, 2),
          pages(Part::kPages1, 3, 1, 2),
          {Part::kLink, Part::kRaw, Bytes(kTarget, kTarget + 4)},
          payload(Part::kParentProcess, encode(parent)),
          pages(Part::kParentPages, 3, 0, 1)};
}

Input packed_seed(bool encrypted) {
  constexpr auto kHere = PageSource::kHere, kOther = PageSource::kOther;
  ProcessImage parent = process(1), image = process(2);
  parent.stage = DumpStage::kPreDump;
  image.parent_dump_id = parent.dump_id;
  parent.gpus.resize(1);
  parent.gpus[0].uuid.fill(1);
  parent.gpus[0].name = "GPU";
  image.gpus = parent.gpus;
  parent.layout.packed = true;
  image.layout = {true, encrypted};
  image.other_files = {{parent.dump_id, 7, 0, parent.layout}, {image.dump_id, 7, 1, image.layout}};
  const std::vector<Bytes> in_parent = {compressed(Compression::kZstd, 'a'),
                                        compressed(Compression::kZstd, 'b')};
  const Bytes here = compressed(Compression::kLz4, 'c');
  auto stored = [](const Bytes& bytes) { return PackedPage{static_cast<uint32_t>(bytes.size())}; };
  AllocationInfo a{1 << 20, (5 << 16) - 100, 0, MemoryKind::kDevice, MemoryPath::kReleased, 3};
  for (uint8_t i = 0; i < 5; i++) {
    a.hashes.emplace_back();
    a.hashes.back().fill(i);
  }
  a.extents = {
      {0, 1, kHere, 0}, {1, 1, PageSource::kDropped}, {2, 2, PageSource::kZero}, {4, 1, kHere, 1}};
  a.packed = {stored(in_parent[0]), stored(in_parent[1])};
  parent.allocations = {a};
  a.hashes[2].fill(9);
  a.extents = {{0, 1, PageSource::kParent},
               {1, 1, kHere, 0},
               {2, 1, kOther, 1, 0},
               {3, 1, PageSource::kZero},
               {4, 1, kOther, 0, 1}};
  a.packed = {stored(here), stored(in_parent[1]), stored(here)};
  for (size_t i : {0, 2}) {
    if (encrypted) a.packed[i].seal.nonce.fill(static_cast<uint8_t>(i + 1));
  }
  image.allocations = {a};
  const PageFileFormat own{image.layout, Compression::kLz4};
  const char kTarget[] = "../1";
  Part process = payload(Part::kProcess, encode(image));
  if (encrypted) process.how = Part::kEncrypted;
  return {process,
          payload(Part::kFiles, encode(FilesImage{image.dump_id, {{7, "/dev/nvidiactl", 2}}})),
          pages(Part::kPages0, 1, 0, 2, own, {here}),
          pages(Part::kPages1, 1, 1, 2, own, {here}),
          {Part::kLink, Part::kRaw, Bytes(kTarget, kTarget + 4)},
          payload(Part::kParentProcess, encode(parent)),
          pages(Part::kParentPages, 2, 0, 1, {parent.layout, Compression::kZstd}, in_parent)};
}

}  // namespace

std::vector<Input> seed_inputs() {
  return {plain_seed(), packed_seed(false), packed_seed(true)};
}

std::shared_ptr<const ImageKey> fuzz_key() {
  static const auto kKey = [] {
    SecretKey secret;
    secret.data()[0] = 7;
    return std::make_shared<const ImageKey>(*ImageKey::make(secret));
  }();
  return kKey;
}

Input mutate(Input input, std::mt19937& random) {
  static std::vector<Input> seeds = seed_inputs();
  if (input.empty()) input = one_of(seeds, random);
  for (unsigned times = 1 + random() % 3; times > 0 && !input.empty(); times--) {
    Part& part = one_of(input, random);
    // Payloads have the most to change.
    if (is_pages(part.file) && random() % 2) continue;
    switch (random() % 64) {
      case 0:
        input.erase(input.begin() + (&part - input.data()));
        break;
      case 1:
        part.file = static_cast<Part::File>(random() % Part::kFileCount);
        break;
      case 2:
        part.content = one_of(input, random).content;
        break;
      default:
        mutate_part(part, random);
    }
  }
  return input;
}

}  // namespace phos::image_test
