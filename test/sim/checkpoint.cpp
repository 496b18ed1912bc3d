// SPDX-License-Identifier: GPL-2.0-only
// Lock, checkpoint, restore and unlock of this process, on its restore thread. After a lock no
// other thread is inside the driver, so the memory table is read without its mutex.
#include <cstring>

#include "test/sim/engine.h"
#include "test/sim/memory.h"
#include "test/sim/sim.h"

namespace phos_sim {
namespace {

bool same(const CUuuid& a, const CUuuid& b) {
  return !memcmp(a.bytes, b.bytes, sizeof a.bytes);
}

const Gpu* find_gpu(const Machine& machine, const CUuuid& uuid) {
  for (int i = 0; i < machine.count; i++) {
    if (same(machine.gpus[i].uuid, uuid)) return &machine.gpus[i];
  }
  return nullptr;
}

// Where each GPU of the checkpoint goes. False: some GPU has no place.
bool place_gpus(const Machine& old, const Machine& present, const CUcheckpointGpuPair* pairs,
                unsigned count, Machine* out) {
  out->count = old.count;
  out->id = present.id;
  for (int i = 0; i < old.count; i++) {
    const CUuuid* uuid = count ? nullptr : &old.gpus[i].uuid;
    for (unsigned p = 0; p < count; p++) {
      if (same(pairs[p].oldUuid, old.gpus[i].uuid)) uuid = &pairs[p].newUuid;
    }
    const Gpu* gpu = uuid ? find_gpu(present, *uuid) : nullptr;
    if (!gpu) return false;
    for (int other = 0; other < i; other++) {
      if (same(out->gpus[other].uuid, gpu->uuid)) return false;
    }
    out->gpus[i] = *gpu;
  }
  return true;
}

bool has_managed_memory() {
  for (auto& [base, r] : memory().ranges) {
    if (r.kind == Kind::kManaged) return true;
  }
  return false;
}

// What the real driver says when a process with another's memory is restored: it is lost.
CUresult why_lost() {
  CUresult result = CUDA_SUCCESS;
  for (Backing* b = memory().backings; b; b = b->next) {
    if (b->origin == Origin::kIpcImport) return CUDA_ERROR_INVALID_VALUE;
    if (b->origin == Origin::kFdImport) result = CUDA_ERROR_NOT_SUPPORTED;
  }
  return result;
}

bool has_room() {
  for (int i = 0; i < process().machine.count; i++) {
    if (bytes_in_use(i) > bytes_left_to_us(i)) return false;
  }
  return true;
}

}  // namespace

CUresult do_lock(unsigned timeout_ms) {
  Process& p = process();
  if (p.state != CU_PROCESS_STATE_RUNNING) return CUDA_ERROR_ILLEGAL_STATE;
  int64_t deadline = timeout_ms ? monotonic_ns() + timeout_ms * int64_t{1000000} : 0;
  gate_close();
  if (!gate_wait_empty(deadline) || !wait_idle(deadline)) {
    gate_open();
    return CUDA_ERROR_NOT_READY;
  }
  p.state = CU_PROCESS_STATE_LOCKED;
  return CUDA_SUCCESS;
}

CUresult do_checkpoint() {
  Process& p = process();
  if (p.state != CU_PROCESS_STATE_LOCKED) return CUDA_ERROR_ILLEGAL_STATE;
  if (has_managed_memory()) return CUDA_ERROR_NOT_SUPPORTED;
  Backing* first = memory().backings;
  for (Backing* b = first; b; b = b->next) {
    if (save_backing(b)) continue;
    for (Backing* done = first; done != b; done = done->next) drop_saved(done);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  for (Backing* b = first; b; b = b->next) detach_backing(b);
  close_device_files();
  p.state = CU_PROCESS_STATE_CHECKPOINTED;
  return CUDA_SUCCESS;
}

CUresult do_restore(const CUcheckpointGpuPair* pairs, unsigned count) {
  Process& p = process();
  if (p.state != CU_PROCESS_STATE_CHECKPOINTED) return CUDA_ERROR_ILLEGAL_STATE;
  if (p.lost) return CUDA_ERROR_OPERATING_SYSTEM;
  if (CUresult r = why_lost()) return r;
  Machine present, placed;
  read_machine(p.machine_path, &present);
  if (!place_gpus(p.machine, present, pairs, count, &placed)) return CUDA_ERROR_INVALID_VALUE;
  const Machine before = p.machine;
  p.machine = placed;
  Backing* first = memory().backings;
  bool there = has_room();
  for (Backing* b = first; b && there; b = b->next) there = attach_backing(b);
  if (!there) {
    for (Backing* b = first; b; b = b->next) detach_backing(b);
    p.machine = before;
    lose_process();
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  note_others();
  for (Backing* b = first; b; b = b->next) drop_saved(b);
  open_device_files();
  p.state = CU_PROCESS_STATE_LOCKED;
  return CUDA_SUCCESS;
}

void lose_process() {
  process().lost = true;
}

CUresult do_unlock() {
  Process& p = process();
  if (p.state != CU_PROCESS_STATE_LOCKED) return CUDA_ERROR_ILLEGAL_STATE;
  p.state = CU_PROCESS_STATE_RUNNING;
  gate_open();
  return CUDA_SUCCESS;
}

}  // namespace phos_sim
