// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/track/uvm_layout.h"

#include <bpf/btf.h>
#include <bpf/libbpf.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "gpu-tracker/track/uprobe_multi.h"
#include "gpu-tracker/track/uvm_layout_table.h"

namespace phos {
namespace {

constexpr char kBtf[] = "/sys/kernel/btf/nvidia_uvm";
constexpr char kModule[] = "/sys/module/nvidia_uvm";
constexpr char kRemedy[] =
    "build it where pahole and the kernel's vmlinux are (DKMS then makes BTF)";

struct Prototype {
  const char* function;
  std::vector<const char*> arguments;  // their types; "": any
};

// What bpf/uvm.bpf.c hooks, as it is in drivers 535 to 595.
const Prototype kPrototypes[] = {
    {"uvm_va_block_map",
     {"uvm_va_block_t*", "uvm_va_block_context_t*", "uvm_processor_id_t", "uvm_va_block_region_t",
      "uvm_page_mask_t*", "uvm_prot_t", "UvmEventMapRemoteCause", "uvm_tracker_t*"}},
    {"uvm_va_block_write_from_cpu",
     {"uvm_va_block_t*", "uvm_va_block_context_t*", "NvU64", "uvm_mem_t*", "size_t"}},
    {"uvm_va_range_create_mmap", {"uvm_va_space_t*", "mm_struct*", "uvm_vma_wrapper_t*", ""}},
    {"uvm_va_range_destroy", {"uvm_va_range_t*", "list_head*"}},
};

struct Size {
  const char* type;
  int64_t bytes;
};
const Size kSizes[] = {{"uvm_va_block_region_t", 4}, {"uvm_page_mask_t", 64}};

Error unknown(const std::string& what) {
  return Error(Domain::kErrno, ENOTSUP,
               "nvidia-uvm is one that the write tracker does not know: " + what);
}

// "name*" of a pointer, with its constness left out.
std::string type_name(const btf* types, uint32_t id) {
  std::string stars;
  const btf_type* type = btf__type_by_id(types, id);
  while (type && (btf_is_ptr(type) || btf_is_const(type))) {
    if (btf_is_ptr(type)) stars += '*';
    type = btf__type_by_id(types, type->type);
  }
  const char* name = type ? btf__name_by_offset(types, type->name_off) : nullptr;
  return (name ? name : "") + stars;
}

Result<void> check_prototype(const btf* types, const Prototype& wanted) {
  const int32_t id = btf__find_by_name_kind(types, wanted.function, BTF_KIND_FUNC);
  if (id < 0) return unknown("it has no " + std::string(wanted.function) + "()");
  const btf_type* function = btf__type_by_id(types, static_cast<uint32_t>(id));
  const btf_type* prototype = btf__type_by_id(types, function->type);
  if (btf_vlen(prototype) != wanted.arguments.size()) {
    return unknown(std::string(wanted.function) + "() takes " +
                   std::to_string(btf_vlen(prototype)) + " arguments");
  }
  for (size_t i = 0; i < wanted.arguments.size(); i++) {
    const std::string name = type_name(types, btf_params(prototype)[i].type);
    if (*wanted.arguments[i] && name != wanted.arguments[i]) {
      return unknown("argument " + std::to_string(i + 1) + " of " + wanted.function + "() is a " +
                     name);
    }
  }
  return {};
}

Result<void> check_loaded() {
  if (access(kModule, F_OK) == 0) return {};
  return Error(Domain::kErrno, ENOTSUP, "nvidia-uvm is not loaded");
}

bool has_btf() {
  return access(kBtf, R_OK) == 0;
}

struct Types {
  std::unique_ptr<btf, decltype(&btf__free)> kernel{nullptr, btf__free};
  std::unique_ptr<btf, decltype(&btf__free)> uvm{nullptr, btf__free};  // builds on kernel
};

// nvidia-uvm's, checked.
Result<Types> known_types() {
  use_libbpf_log();
  if (auto r = check_loaded(); !r) return r.error();
  if (!has_btf()) {
    return Error(Domain::kErrno, ENOTSUP,
                 std::string("nvidia-uvm was built without BTF: ") + kRemedy);
  }
  Types types;
  btf* kernel = btf__load_vmlinux_btf();
  if (libbpf_get_error(kernel)) return unknown("the kernel has no BTF");
  types.kernel.reset(kernel);
  btf* uvm = btf__parse_split(kBtf, kernel);
  if (libbpf_get_error(uvm)) return unknown("its BTF cannot be read");
  types.uvm.reset(uvm);
  for (const Prototype& wanted : kPrototypes) {
    if (auto r = check_prototype(uvm, wanted); !r) return r.error();
  }
  for (const Size& wanted : kSizes) {
    const int32_t id = btf__find_by_name_kind(uvm, wanted.type, BTF_KIND_TYPEDEF);
    const int64_t bytes = id < 0 ? 0 : btf__resolve_size(uvm, static_cast<uint32_t>(id));
    if (bytes != wanted.bytes) return unknown(std::string("the size of ") + wanted.type);
  }
  return types;
}

// Where `member` lies in the structure that the type `name` stands for, in bytes; -1: nowhere.
int64_t offset_of(const btf* types, const char* name, const char* member) {
  int32_t id = btf__find_by_name_kind(types, name, BTF_KIND_TYPEDEF);
  if (id >= 0) id = btf__resolve_type(types, static_cast<uint32_t>(id));
  const btf_type* type = id < 0 ? nullptr : btf__type_by_id(types, static_cast<uint32_t>(id));
  if (!type || !btf_is_struct(type)) return -1;
  for (uint32_t i = 0; i < btf_vlen(type); i++) {
    const char* found = btf__name_by_offset(types, btf_members(type)[i].name_off);
    if (found && !strcmp(found, member)) return btf_member_bit_offset(type, i) / 8;
  }
  return -1;
}

}  // namespace

Result<void> check_uvm_layout() {
  auto types = known_types();
  if (!types) return types.error();
  return {};
}

Result<phos_kmod_layout> uvm_layout_by_btf() {
  auto types = known_types();
  if (!types) return types.error();
  const btf* t = types->uvm.get();
  int64_t block_range = offset_of(t, "uvm_va_block_t", "managed_range");
  if (block_range < 0) {
    block_range = offset_of(t, "uvm_va_block_t", "va_range");  // until driver 560
  } else if (offset_of(t, "uvm_va_range_managed_t", "va_range") != 0) {
    return unknown("a managed range does not begin with a range");
  }
  const int64_t node = offset_of(t, "uvm_va_range_t", "node");
  const int64_t node_start = offset_of(t, "uvm_range_tree_node_t", "start");
  const int64_t node_end = offset_of(t, "uvm_range_tree_node_t", "end");
  const int64_t fields[] = {block_range,
                            offset_of(t, "uvm_va_block_t", "start"),
                            offset_of(t, "uvm_va_range_t", "va_space"),
                            node < 0 || node_start < 0 ? -1 : node + node_start,
                            node < 0 || node_end < 0 ? -1 : node + node_end,
                            offset_of(t, "uvm_va_range_t", "type"),
                            offset_of(t, "uvm_vma_wrapper_t", "vma")};
  phos_kmod_layout layout = {};  // mutex_bytes stays 0
  static_assert(sizeof fields / 8 + 1 == sizeof layout / 4);
  auto* to = reinterpret_cast<uint32_t*>(&layout);  // all are __u32, in this order
  for (const int64_t field : fields) {
    if (field < 0) return unknown("a field of its structures is missing");
    *to++ = static_cast<uint32_t>(field);
  }
  return layout;
}

Result<UvmLayout> uvm_layout() {
  if (auto r = check_loaded(); !r) return r.error();
  UvmLayout layout;
  if (has_btf()) {
    auto offsets = uvm_layout_by_btf();
    if (!offsets) return offsets.error();
    layout.offsets = *offsets;
    return layout;
  }
  std::ifstream(std::string(kModule) + "/version") >> layout.version;
  if (const phos_kmod_layout* known = find_uvm_layout(layout.version)) {
    layout.offsets = *known;
    return layout;
  }
  return Error(
      Domain::kErrno, ENOTSUP,
      "nvidia-uvm " + (layout.version.empty() ? "without a version" : layout.version) +
          " was built without BTF, and phos has no table of this version's structures: " + kRemedy);
}

}  // namespace phos
