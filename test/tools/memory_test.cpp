// SPDX-License-Identifier: GPL-2.0-only
// The commands that read images, or write them anew, take memory by --jobs, not by the size of the
// images.
#include "gpu-tracker/image/page_appender.h"
#include "gpu-tracker/image/page_store.h"
#include "test/tools/images_fixture.h"

namespace phos::test {
namespace {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kMany = 4096 * kMiB / kPage;
// Of what describes a page, once for each dump.
constexpr uint64_t kBytesForAPage = 64;
// And of one that is stored anew: where it was, where it is going to be, and how to find it.
constexpr uint64_t kBytesForANewPage = 256;
// Of pages that are compressed: 128 MiB in 8.
constexpr uint64_t kCompressed = 128 * kMiB / kPage;

class Memory : public Images {
 protected:
  // A dump with an allocation that has so many pages.
  struct Dump {
    Dump(const std::string& directory, uint64_t pages, uint8_t id = 1) : dir(directory) {
      std::filesystem::create_directory(dir);
      write_file(dir + "/inventory.img", kInventory);
      fd = open_dir(dir);
      image = image_without_memory(4242);
      image.dump_id.fill(id);
      const std::string bytes = key.to_bytes();
      image.hash_key.assign(bytes.begin(), bytes.end());
      allocation.address = 0x7f0000000000;
      allocation.size = pages * kPage;
      allocation.gpu = 0;
      allocation.path = MemoryPath::kReleased;
    }
    SavedHash hash() const { return hash_page(key, page.get(), kPage).bytes; }
    std::string write() {
      image.allocations.push_back(allocation);
      auto written = write_process_image(fd.get(), image);
      EXPECT_TRUE(written) << written.error().message();
      return dir;
    }

    const std::string dir;
    UniqueFd fd;
    const PageHashKey key = *PageHashKey::generate();
    ProcessImage image;
    AllocationInfo allocation;
    const std::unique_ptr<char, void (*)(void*)> page{
        static_cast<char*>(aligned_alloc(4096, kPage)), free};
  };

  // All pages but the last are zeros that the file has as a hole: it takes no room on the disk.
  std::string sparse(const std::string& name, uint64_t pages) const {
    Dump d(root(name), pages);
    memset(d.page.get(), 0, kPage);
    d.allocation.hashes.assign(pages, d.hash());
    d.page.get()[7] = 1;
    d.allocation.hashes.back() = d.hash();
    d.allocation.extents.push_back({0, static_cast<uint32_t>(pages), PageSource::kHere, 0});
    auto file = PageFileWriter::create(d.fd.get(), 4242, 0, d.image.dump_id);
    EXPECT_TRUE((*file)->write(pages - 1, d.page.get(), 1));
    EXPECT_TRUE((*file)->finish());
    return d.write();
  }

  // Pages that differ and are stored as zstd makes them.
  std::string compressed(const std::string& name, uint64_t pages, uint8_t id = 1) const {
    Dump d(root(name), pages, id);
    PageStoreOptions options;
    options.compression = {Compression::kZstd, 1};
    auto store = PageStore::create(d.fd.get(), d.image.dump_id, options);
    const uint32_t file = *(*store)->add_file(4242, 0);
    const uint32_t key = (*store)->add_key(d.image.hash_key);
    d.image.layout = (*store)->layout();
    PageAppender appender(&d.image, &d.allocation);
    for (uint64_t i = 0; i < pages; i++) {
      for (size_t at = 0; at < kPage; at += 8) {
        const uint64_t word = at % 64 ? at : i * 0x9e3779b97f4a7c15;
        memcpy(d.page.get() + at, &word, sizeof word);
      }
      auto claim = (*store)->claim(file, key, d.hash(), nullptr);
      EXPECT_TRUE(claim && claim->is_new);
      const PageStore::NewPage fresh{claim->page, d.page.get()};
      EXPECT_TRUE((*store)->store(file, {&fresh, 1}));
      appender.add(d.hash(), (*store)->place(claim->page));
    }
    EXPECT_TRUE((*store)->finish());
    return d.write();
  }

  // The dump after that in `parent`, of which it has all pages.
  std::string upon(const std::string& parent, const std::string& name) const {
    std::filesystem::create_directory(root(name));
    std::filesystem::create_directory_symlink("../" + parent, root(name) + "/parent");
    write_file(root(name) + "/inventory.img", kInventory);
    auto image = read_process_image(open_dir(root(parent)).get(), 4242);
    EXPECT_TRUE(image) << image.error().message();
    image->parent_dump_id = image->dump_id;
    image->dump_id.fill(3);
    image->layout = {};
    AllocationInfo& a = image->allocations.at(0);
    a.extents = {{0, static_cast<uint32_t>(a.hashes.size()), PageSource::kParent}};
    a.packed.clear();
    EXPECT_TRUE(write_process_image(open_dir(root(name)).get(), *image));
    return root(name);
  }
  // A copy of those images whose pages hold something else.
  std::string damaged(const std::string& of, const std::string& name) const {
    std::filesystem::copy(root(of), root(name));
    const std::string file = root(name) + "/phos-pages-4242-0.img";
    std::string bytes = read_file(file);
    for (size_t at = kPage; at < bytes.size(); at += 4096) bytes[at + 20] ^= 1;
    write_file(file, bytes);
    return root(name);
  }

  // `command` on a dump of one page, and on one of `pages`: the peaks differ by no more than that
  // for each job, and what describes the pages.
  void expect_bounded(const Words& command, const Words& little, const Words& much, unsigned jobs,
                      uint64_t for_a_job, uint64_t pages,
                      uint64_t for_a_page = kBytesForAPage) const {
    auto peak = [&](const Words& dirs) {
      Words args = command;
      args.insert(args.end(), dirs.begin(), dirs.end());
      const Outcome o = phos(args);
      EXPECT_EQ(o.code, 0) << o.err;
      return o.peak_bytes;
    };
    const uint64_t before = peak(little), after = peak(much);
    EXPECT_LT(after, before + jobs * for_a_job + pages * for_a_page)
        << command[0] << ", " << jobs << " jobs: " << before << " bytes for one page";
  }
};

TEST_F(Memory, Verify) {
  const std::string one = sparse("one", 1), many = sparse("many", kMany);
  for (unsigned jobs : {1, 2, 8}) {
    // A thread has a stack and a heap, too.
    expect_bounded({"verify", "-j", std::to_string(jobs)}, {one}, {many}, jobs, kMiB + kMiB / 4,
                   kMany);
  }
}

TEST_F(Memory, VerifyOfCompressedPages) {
  const std::string one = compressed("one", 1), many = compressed("many", kCompressed);
  for (unsigned jobs : {1, 8}) {
    expect_bounded({"verify", "-j", std::to_string(jobs)}, {one}, {many}, jobs, 4 * kMiB,
                   kCompressed);
  }
}

TEST_F(Memory, Diff) {
  const std::string one = sparse("one", 1), other = sparse("other", 1);
  const std::string many = sparse("many", kMany), more = sparse("more", kMany);
  for (unsigned jobs : {1, 4}) {
    expect_bounded({"diff", "-j", std::to_string(jobs)}, {one, other}, {many, more}, jobs,
                   2 * kMiB + kMiB / 4, 2 * kMany);
  }
}

TEST_F(Memory, Extract) {
  const std::string one = sparse("one", 1), many = sparse("many", kMany / 16);
  expect_bounded(
      {"extract", "--pid", "4242", "--address", "0x7f0000000000", "-f", "-o", root("memory")},
      {one}, {many}, 1, kMiB + kMiB / 4, kMany / 16);
}

TEST_F(Memory, Squash) {
  compressed("one", 1);
  compressed("many", kCompressed);
  const std::string one = upon("one", "child of one"), many = upon("many", "child of many");
  for (unsigned jobs : {1, 8}) {
    const std::string number = std::to_string(jobs);
    expect_bounded({"squash", "-j", number}, {one, "-o", root("one " + number)},
                   {many, "-o", root("many " + number)}, jobs, 3 * kMiB, kCompressed,
                   kBytesForANewPage);
  }
  expect_bounded({"squash", "-j", "1"}, {one}, {many}, 1, 3 * kMiB, kCompressed, kBytesForANewPage);
}

// To nothing, in place, and then to what has all of its pages.
TEST_F(Memory, Rebase) {
  compressed("one", 1);
  compressed("many", kCompressed);
  const std::string one = upon("one", "child of one"), many = upon("many", "child of many");
  const Words command = {"rebase", "-j", "1"};
  expect_bounded(command, {one}, {many}, 1, 3 * kMiB, kCompressed, kBytesForANewPage);
  expect_bounded(command, {one, "-p", root("one")}, {many, "-p", root("many")}, 1, 3 * kMiB,
                 kCompressed, kBytesForANewPage);
}

// Every page is hashed with another key, and then stored, since the parent has none of them.
TEST_F(Memory, RebaseWithAnotherKey) {
  const std::string other = compressed("other", 1, 2);
  const std::string one = compressed("one", 1), many = compressed("many", kCompressed);
  expect_bounded({"rebase", "--rehash", "-j", "1"}, {one, "-p", other, "-o", root("new one")},
                 {many, "-p", other, "-o", root("new many")}, 1, 3 * kMiB, kCompressed,
                 kBytesForANewPage);
}

TEST_F(Memory, Repair) {
  const std::string one = compressed("one", 1), many = compressed("many", kCompressed);
  expect_bounded({"verify", "-j", "1"}, {damaged("one", "damaged one"), "--repair-from", one},
                 {damaged("many", "damaged many"), "--repair-from", many}, 1, 3 * kMiB, kCompressed,
                 kBytesForANewPage);
}

TEST_F(Memory, JobsAreChecked) {
  const std::string one = sparse("one", 1);
  for (const char* jobs : {"0", "-1", "1025"}) {
    expect_refused(phos({"diff", "-j", jobs, one, one}), "--jobs must be from 1 to 1024", 2);
  }
}

}  // namespace
}  // namespace phos::test
