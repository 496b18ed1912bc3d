// SPDX-License-Identifier: GPL-2.0-only
// The C++ side of test_reader.py.
//
//   image_tool write TOP MEMORY   writes a chain of dumps TOP/1, TOP/2, TOP/3 of two processes,
//   with
//                                 real hashes, and what was in their memory to MEMORY/<level>/
//   image_tool store HOW TOP MEMORY   the same as phosd stores it: each page once; HOW: none, zstd
//                                     or lz4; with +key encrypted, but for the second dump
//   image_tool read DIR MEMORY    reads the chain of DIR, and writes what it holds to MEMORY/
//   image_tool verify DIR         hashes every page; fails if there is damage
//
// Memory is in files <pid>-<uuid>-<address>, the key in the file $KEY_FILE.
#include <fcntl.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include "gpu-tracker/copy/page_hash.h"
#include "gpu-tracker/image/chain.h"
#include "gpu-tracker/image/image_key.h"
#include "gpu-tracker/image/page_store.h"
#include "gpu-tracker/image/verify.h"

namespace phos {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;

struct Free {
  void operator()(void* memory) const { free(memory); }
};

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "image_tool: %s\n", what.c_str());
  exit(1);
}
template <typename T>
T must(Result<T> result) {
  if (!result) fail(result.error().message());
  return std::move(*result);
}
void must(const Result<void>& result) {
  if (!result) fail(result.error().message());
}

UniqueFd open_directory(const std::string& path) {
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) fail("cannot open " + path);
  return fd;
}

void put_memory(const std::string& directory, int pid, const GpuUuid& uuid, uint64_t address,
                const Bytes& bytes) {
  std::string name = std::to_string(pid) + "-";
  char text[24];
  for (uint8_t byte : uuid) {
    snprintf(text, sizeof text, "%02x", byte);
    name += text;
  }
  snprintf(text, sizeof text, "-%llx", static_cast<unsigned long long>(address));
  std::ofstream out(directory + "/" + name + text, std::ios::binary);
  out.write(reinterpret_cast<const char*>(bytes.data()),
            static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) fail("cannot write " + name);
}

SavedHash hash_of(const PageHashKey& key, const void* page) {
  return hash_page(key, page, kImagePageSize).bytes;
}

std::shared_ptr<const ImageKey> use_key() {
  const char* path = getenv("KEY_FILE");
  auto key = std::make_shared<const ImageKey>(must(ImageKey::read(path ? path : "")));
  add_image_key(key);
  return key;
}

// ---- writing ----

struct Memory {
  GpuUuid gpu{};
  uint64_t address = 0;
  Bytes bytes;
};

GpuUuid gpu(uint8_t number) {
  GpuUuid uuid;
  uuid.fill(number);
  return uuid;
}

// By a PageStore; what is not stored yet is stored at once.
void store_pages(PageStore& store, const PreviousPages* previous, const Memory& m,
                 ProcessImage* image, AllocationInfo* a) {
  const uint32_t key = store.add_key(image->hash_key);
  const PageHashKey hash_key = must(PageHashKey::from_bytes(image->hash_key));
  const uint32_t file = must(store.add_file(image->pid, a->gpu));
  const auto* known = previous ? previous->find(m.gpu, a->address, a->size) : nullptr;
  std::unique_ptr<uint8_t, Free> page(static_cast<uint8_t*>(aligned_alloc(4096, kImagePageSize)));
  PageAppender pages(image, a);
  for (uint64_t i = 0; i < page_count(*a); i++) {
    const size_t offset = i * kImagePageSize;
    const size_t size = std::min<size_t>(kImagePageSize, m.bytes.size() - offset);
    memset(page.get(), 0, kImagePageSize);
    memcpy(page.get(), m.bytes.data() + offset, size);
    const SavedHash hash = hash_of(hash_key, page.get());
    if (std::all_of(page.get(), page.get() + size, [](auto b) { return b == 0; })) {
      pages.add(hash, PageSource::kZero);
    } else if (known && known->hashes[i] == hash) {
      pages.add(hash, PageSource::kParent);
    } else {
      const auto claim = must(store.claim(file, key, hash, previous));
      const PageStore::NewPage fresh{claim.page, page.get()};
      if (claim.is_new) must(store.store(file, {&fresh, 1}));
      pages.add(hash, store.place(claim.page));
    }
  }
}

// One dump of one process. GPUs in the order of `gpus`. `store`: null, or where its pages go.
void dump(const UniqueFd& dir, int level, int pid, const std::vector<GpuUuid>& gpus,
          const std::vector<Memory>& memory, PageHashKey* key, PageStore* store) {
  ProcessImage image;
  image.dump_id.fill(static_cast<uint8_t>(level));
  image.pid = pid;
  image.comm = "app";
  image.driver_api = 13000;
  image.stage = level < 3 ? DumpStage::kPreDump : DumpStage::kDump;
  for (const GpuUuid& uuid : gpus) image.gpus.push_back({uuid, "GPU", 1 << 30});
  std::optional<PreviousPages> previous;
  if (level > 1) {
    const UniqueFd parent = must(open_parent(dir.get()));
    previous = must(PreviousPages::open(parent.get(), pid));
  }
  if (previous) {
    image.parent_dump_id = previous->dump_id();
    *key = must(PageHashKey::from_bytes(previous->hash_key()));
  }
  const std::string bytes = key->to_bytes();
  image.hash_key.assign(bytes.begin(), bytes.end());
  std::map<int, std::unique_ptr<PageFileWriter>> files;
  std::unique_ptr<uint8_t, Free> page(static_cast<uint8_t*>(aligned_alloc(4096, kImagePageSize)));
  for (const Memory& m : memory) {
    AllocationInfo a{m.address, m.bytes.size()};
    a.gpu = static_cast<int>(std::find(gpus.begin(), gpus.end(), m.gpu) - gpus.begin());
    // One that the driver saves as well.
    a.path = m.address % 0x20000000 ? MemoryPath::kReleased : MemoryPath::kDriver;
    if (store) {
      image.layout = store->layout();
      image.key_id = store->key_id();
      store_pages(*store, previous ? &*previous : nullptr, m, &image, &a);
      image.allocations.push_back(std::move(a));
      continue;
    }
    const auto* known = previous ? previous->find(m.gpu, a.address, a.size) : nullptr;
    std::map<SavedHash, uint32_t> slots;  // equal pages share one
    for (uint32_t i = 0; i < page_count(a); i++) {
      const size_t offset = size_t{i} * kImagePageSize;
      const size_t size = std::min<size_t>(kImagePageSize, m.bytes.size() - offset);
      memset(page.get(), 0, kImagePageSize);
      memcpy(page.get(), m.bytes.data() + offset, size);
      a.hashes.push_back(hash_of(*key, page.get()));
      const bool is_zero =
          std::all_of(page.get(), page.get() + size, [](auto b) { return b == 0; });
      const bool in_parent = known && known->hashes[i] == a.hashes[i];
      PageExtent one{i, 1,
                     is_zero     ? PageSource::kZero
                     : in_parent ? PageSource::kParent
                                 : PageSource::kHere};
      if (one.source == PageSource::kHere) {
        auto& file = files[a.gpu];
        if (!file) file = must(PageFileWriter::create(dir.get(), pid, a.gpu, image.dump_id));
        auto [slot, is_new] = slots.emplace(a.hashes[i], static_cast<uint32_t>(file->slots()));
        one.slot = slot->second;
        if (is_new) must(file->write(one.slot, page.get(), 1));
      }
      if (!a.extents.empty()) {
        PageExtent& last = a.extents.back();
        const bool follows = one.source != PageSource::kHere || last.slot + last.pages == one.slot;
        if (last.source == one.source && follows) {
          last.pages++;
          continue;
        }
      }
      a.extents.push_back(one);
    }
    image.allocations.push_back(std::move(a));
  }
  image.allocations.push_back({0x1000, 4096, -1, MemoryKind::kHost});
  for (auto& [number, file] : files) must(file->finish());
  must(write_process_image(dir.get(), image));
}

void fill(Bytes& bytes, size_t page, uint32_t seed) {
  const size_t from = page * kImagePageSize;
  for (size_t i = from; i < std::min(bytes.size(), from + kImagePageSize); i++) {
    seed = seed * 1664525 + 1013904223;
    bytes[i] = static_cast<uint8_t>(seed >> 24);
  }
}

PageStoreOptions options_for(std::string how, int level) {
  PageStoreOptions options;
  if (how.ends_with("+key")) {
    how.resize(how.size() - 4);
    if (level != 2) options.key = use_key();
  }
  options.compression = must(parse_compression(how));
  return options;
}

// Two processes, of which the second one is not in the first dump; the GPUs of the first one are in
// another order each time.
int write_chain(const std::string& top, const std::string& memory_top, const char* how) {
  std::vector<Memory> first = {{gpu(1), 0x10000000, Bytes(5 * kImagePageSize - 1234)},
                               {gpu(2), 0x20000000, Bytes(kImagePageSize + 1)}};
  std::vector<Memory> second = {{gpu(2), 0x10000000, Bytes(3 * kImagePageSize)}};
  PageHashKey keys[2] = {must(PageHashKey::generate()), must(PageHashKey::generate())};
  if (how) keys[1] = keys[0];  // pages of the one are pages of the other
  for (uint32_t page = 0; page < 5; page++) fill(first[0].bytes, page, page == 3 ? 0 : page);
  fill(first[1].bytes, 0, 9);
  for (int level = 1; level <= 3; level++) {
    const std::string directory = top + "/" + std::to_string(level);
    const std::string memory = memory_top + "/" + std::to_string(level);
    if (!fs::create_directory(directory) || !fs::create_directory(memory)) fail(directory);
    fs::permissions(directory, fs::perms::owner_all);
    if (level > 1) fs::create_symlink("../" + std::to_string(level - 1), directory + "/parent");
    const UniqueFd dir = open_directory(directory);
    std::vector<GpuUuid> gpus = {gpu(1), gpu(2)};
    if (level == 2) std::swap(gpus[0], gpus[1]);
    std::unique_ptr<PageStore> store;
    if (how) {
      DumpId id;
      id.fill(static_cast<uint8_t>(level));
      store = must(PageStore::create(dir.get(), id, options_for(how, level)));
      second[0].bytes = first[0].bytes;
      std::rotate(first[0].bytes.begin(), first[0].bytes.begin() + kImagePageSize,
                  first[0].bytes.begin() + 3 * kImagePageSize);
    }
    dump(dir, level, 7, gpus, first, &keys[0], store.get());
    if (level > 1) dump(dir, level, 9, {gpu(2)}, second, &keys[1], store.get());
    if (store) must(store->finish());
    for (const Memory& m : first) put_memory(memory, 7, m.gpu, m.address, m.bytes);
    if (level > 1) {
      for (const Memory& m : second) put_memory(memory, 9, m.gpu, m.address, m.bytes);
    }
    // For the next one: a page that changes, one that becomes zero, one that is no longer; memory
    // that is new.
    fill(first[0].bytes, static_cast<size_t>(level), 100);
    std::fill_n(first[0].bytes.begin(), level == 2 ? kImagePageSize : 0, 0);
    fill(second[0].bytes, static_cast<size_t>(level), 7);
    if (level == 2) first.push_back({gpu(2), 0x50000000, Bytes(100, 'n')});
  }
  return 0;
}

// ---- reading ----

int read_chain(const std::string& directory, const std::string& memory) {
  const UniqueFd dir = open_directory(directory);
  const ImageSet set = must(read_image_set(dir.get()));
  std::unique_ptr<uint8_t, Free> page(static_cast<uint8_t*>(aligned_alloc(4096, kImagePageSize)));
  for (const ProcessImage& image : set.processes) {
    const PageChain chain = must(PageChain::open(dir.get(), image.pid, PageIo::kDirect));
    for (size_t i = 0; i < image.allocations.size(); i++) {
      const AllocationInfo& a = image.allocations[i];
      if (a.hashes.empty()) continue;
      Bytes bytes;
      for (uint64_t number = 0; number < page_count(a); number++) {
        must(chain.read_page(i, number, page.get()));
        bytes.insert(bytes.end(), page.get(), page.get() + kImagePageSize);
      }
      bytes.resize(a.size);
      put_memory(memory, image.pid, image.gpus[static_cast<size_t>(a.gpu)].uuid, a.address, bytes);
    }
  }
  return 0;
}

int verify(const std::string& directory) {
  const MakePageHasher make_hasher = [](const std::vector<uint8_t>& bytes) {
    const PageHashKey key = must(PageHashKey::from_bytes(bytes));
    return Result<PageHasher>([key](const void* page) { return hash_of(key, page); });
  };
  const UniqueFd dir = open_directory(directory);
  const auto report =
      must(verify_images(dir.get(), must(read_image_set(dir.get())), make_hasher, {}));
  for (const PageDamage& damage : report.damage) fprintf(stderr, "%s\n", describe(damage).c_str());
  return report.ok() ? 0 : 1;
}

}  // namespace
}  // namespace phos

int main(int argc, char** argv) {
  const std::string what = argc > 2 ? argv[1] : "";
  if (getenv("KEY_FILE")) phos::use_key();
  if (what == "write" && argc == 4) return phos::write_chain(argv[2], argv[3], nullptr);
  if (what == "store" && argc == 5) return phos::write_chain(argv[3], argv[4], argv[2]);
  if (what == "read" && argc == 4) return phos::read_chain(argv[2], argv[3]);
  if (what == "verify" && argc == 3) return phos::verify(argv[2]);
  fprintf(stderr, "usage: image_tool write|read DIR MEMORY, store HOW DIR MEMORY, verify DIR\n");
  return 2;
}
