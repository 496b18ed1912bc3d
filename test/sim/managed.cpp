// SPDX-License-Identifier: GPL-2.0-only
// Where managed memory is to be: advice, and the last prefetch. It is kept for each page of 4 KiB
// and changes nothing here: the memory is where both sides reach it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

constexpr uint64_t kPage = 4096;

bool is_place(const CUmemLocation& l) {
  if (l.type == CU_MEM_LOCATION_TYPE_DEVICE) return device_exists(l.id);
  return l.type == CU_MEM_LOCATION_TYPE_HOST || l.type == CU_MEM_LOCATION_TYPE_HOST_NUMA;
}

// As the older interface numbers places.
int as_device(const CUmemLocation& l) {
  if (l.type == CU_MEM_LOCATION_TYPE_DEVICE) return l.id;
  return l.type == CU_MEM_LOCATION_TYPE_INVALID ? CU_DEVICE_INVALID : CU_DEVICE_CPU;
}

uint64_t bit_of(const CUmemLocation& l) {
  return uint64_t{1} << (l.type == CU_MEM_LOCATION_TYPE_DEVICE ? l.id : 63);
}

// Calls `visit` for the policy of each page that [p, p + size) touches. False: that is not managed
// memory, or not of one allocation. The memory mutex is held.
template <typename Visit>
bool for_each_policy(CUdeviceptr p, uint64_t size, Visit visit) {
  Range* r = find_range(p);
  if (!size || !r || r->kind != Kind::kManaged || size > r->map_base + r->map_size - p)
    return false;
  if (r->policies.empty()) r->policies.resize(r->map_size / kPage);
  for (uint64_t i = (p - r->base) / kPage; i <= (p + size - 1 - r->base) / kPage; i++) {
    visit(r->policies[i]);
  }
  return true;
}

bool advise(Policy* policy, CUmem_advise advice, const CUmemLocation& place) {
  switch (advice) {
    case CU_MEM_ADVISE_SET_READ_MOSTLY:
    case CU_MEM_ADVISE_UNSET_READ_MOSTLY:
      policy->read_mostly = advice == CU_MEM_ADVISE_SET_READ_MOSTLY;
      return true;
    case CU_MEM_ADVISE_SET_PREFERRED_LOCATION:
      policy->preferred = place;
      return true;
    case CU_MEM_ADVISE_UNSET_PREFERRED_LOCATION:
      policy->preferred = {};
      return true;
    case CU_MEM_ADVISE_SET_ACCESSED_BY:
      policy->accessed_by |= bit_of(place);
      return true;
    case CU_MEM_ADVISE_UNSET_ACCESSED_BY:
      policy->accessed_by &= ~bit_of(place);
      return true;
    default:
      return false;
  }
}

bool needs_place(CUmem_advise advice) {
  return advice == CU_MEM_ADVISE_SET_PREFERRED_LOCATION ||
         advice == CU_MEM_ADVISE_SET_ACCESSED_BY || advice == CU_MEM_ADVISE_UNSET_ACCESSED_BY;
}

// What pages that differ have in common, as far as the attributes tell.
void join(Policy* all, const Policy& one) {
  all->read_mostly = all->read_mostly && one.read_mostly;
  all->accessed_by &= one.accessed_by;
  if (memcmp(&all->preferred, &one.preferred, sizeof one.preferred) != 0) all->preferred = {};
  if (memcmp(&all->prefetched, &one.prefetched, sizeof one.prefetched) != 0) all->prefetched = {};
}

CUresult answer(const Policy& policy, CUmem_range_attribute attribute, void* data, size_t size) {
  auto* out = static_cast<int*>(data);
  if (!out || size < sizeof(int) || size % sizeof(int)) return CUDA_ERROR_INVALID_VALUE;
  if (attribute != CU_MEM_RANGE_ATTRIBUTE_ACCESSED_BY && size != sizeof(int)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  switch (attribute) {
    case CU_MEM_RANGE_ATTRIBUTE_READ_MOSTLY:
      *out = policy.read_mostly;
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION:
      *out = as_device(policy.preferred);
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION:
      *out = as_device(policy.prefetched);
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_TYPE:
      *out = policy.preferred.type;
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_PREFERRED_LOCATION_ID:
      *out = policy.preferred.id;
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION_TYPE:
      *out = policy.prefetched.type;
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_LAST_PREFETCH_LOCATION_ID:
      *out = policy.prefetched.id;
      return CUDA_SUCCESS;
    case CU_MEM_RANGE_ATTRIBUTE_ACCESSED_BY: {
      std::fill_n(out, size / sizeof(int), CU_DEVICE_INVALID);
      for (int device = 0; device < 64 && size; device++) {
        if (!(policy.accessed_by >> device & 1)) continue;
        *out++ = device == 63 ? CU_DEVICE_CPU : device;
        size -= sizeof(int);
      }
      return CUDA_SUCCESS;
    }
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

bool common_policy(CUdeviceptr p, uint64_t size, Policy* all) {
  std::lock_guard<std::mutex> hold(memory().mutex);
  bool first = true;
  return for_each_policy(p, size, [&](const Policy& one) {
    if (first) *all = one;
    first = false;
    join(all, one);
  });
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuMemAdvise(CUdeviceptr p, size_t size, CUmem_advise advice, CUmemLocation place) {
  PHOS_SIM_API(kContext);
  if (needs_place(advice) && !is_place(place)) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  bool known = true;
  const bool managed =
      for_each_policy(p, size, [&](Policy& one) { known = known && advise(&one, advice, place); });
  return managed && known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemPrefetchAsync(CUdeviceptr p, size_t size, CUmemLocation place, unsigned int flags,
                            CUstream stream) {
  PHOS_SIM_API(kContext);
  if (CUresult r = check_stream(stream)) return r;
  if (flags || !is_place(place)) return CUDA_ERROR_INVALID_VALUE;
  std::lock_guard<std::mutex> hold(memory().mutex);
  const bool managed = for_each_policy(p, size, [&](Policy& one) { one.prefetched = place; });
  return managed ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemRangeGetAttribute(void* data, size_t data_size, CUmem_range_attribute attribute,
                                CUdeviceptr p, size_t size) {
  PHOS_SIM_API(kContext);
  Policy all;
  if (!common_policy(p, size, &all)) return CUDA_ERROR_INVALID_VALUE;
  return answer(all, attribute, data, data_size);
}

CUresult cuMemRangeGetAttributes(void** data, size_t* data_sizes, CUmem_range_attribute* attributes,
                                 size_t count, CUdeviceptr p, size_t size) {
  PHOS_SIM_API(kContext);
  Policy all;
  if (!data || !data_sizes || !attributes || !count || !common_policy(p, size, &all)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (size_t i = 0; i < count; i++) {
    if (CUresult r = answer(all, attributes[i], data[i], data_sizes[i])) return r;
  }
  return CUDA_SUCCESS;
}
