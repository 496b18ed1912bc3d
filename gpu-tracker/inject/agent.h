// SPDX-License-Identifier: GPL-2.0-only
// The agent in a CUDA process (gpu-tracker/agent), seen from phosd: brings it there, and asks it
// about device memory and for handles to it. None of the process's own threads is ever stopped but
// the driver's restore thread, for about a millisecond when the agent is loaded or unloaded.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "gpu-tracker/abi/mailbox.h"
#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/inject/mailbox.h"

namespace phos {

enum class AllocationKind {
  kUnknown = PHOS_KIND_UNKNOWN,
  kDevice = PHOS_KIND_DEVICE,      // cuMemAlloc, above 1 MiB
  kSmall = PHOS_KIND_SMALL,        // a 2 MiB block of smaller ones; left to the driver
  kVmm = PHOS_KIND_VMM,            // one cuMemMap: own memory, or imported by file descriptor
  kPool = PHOS_KIND_POOL,          // a block of a memory pool; left to the driver
  kManaged = PHOS_KIND_MANAGED,    // cuMemAllocManaged
  kImported = PHOS_KIND_IMPORTED,  // a module's globals or a legacy IPC import
};
const char* to_string(AllocationKind kind);

enum class ExportType {
  kNone = PHOS_EXPORT_NONE,
  kIpc = PHOS_EXPORT_IPC,  // cuIpcOpenMemHandle
  kFd = PHOS_EXPORT_FD,    // cuMemImportFromShareableHandle
};

struct AddressRange {
  uint64_t begin, end;
};

struct AgentAllocation {
  AllocationKind kind = AllocationKind::kUnknown;
  uint64_t address = 0;
  uint64_t size = 0;  // bytes
  uint64_t mapping_address = 0, mapping_size = 0;
  uint64_t buffer_id = 0;  // never used twice in a process: tells new memory at an old address
  uint64_t context = 0;    // CUcontext in the process; 0: none owns it
  int device = -1;         // ordinal in the process
  std::array<uint8_t, 16> device_uuid{};
  ExportType export_type = ExportType::kNone;
};

enum class ExportStatus {
  kExported = PHOS_EXPORTED,
  kStale = PHOS_EXPORT_STALE,    // freed, or freed and allocated anew, since it was enumerated
  kFailed = PHOS_EXPORT_FAILED,  // driver_result says why
  kUnguarded = PHOS_EXPORT_UNGUARDED,  // the gate was open; untouched
};

// Why no thread of the process allocates or frees memory while the driver is asked about it, or
// handles to it are made. The driver (580) does not protect itself against that: the process would
// end by SIGSEGV in the agent's thread.
enum class AgentGuard {
  // Threads that would are parked at the gate, and none was under way: MemoryGuard
  // (gpu-tracker/gate) sees to it. The agent does neither while the gate is open.
  kGate = PHOS_GUARD_GATE,
  // The caller knows: the process is locked by the driver, nobody but the agent runs in it, the
  // gate is closed and the driver quiet, or, in a test, its threads do nothing.
  kCaller = PHOS_GUARD_CALLER,
};

struct AgentExport {
  ExportStatus status = ExportStatus::kFailed;
  int driver_result = 0;  // CUresult
  ExportType type = ExportType::kNone;
  std::array<uint8_t, 64> ipc_handle{};  // CUipcMemHandle, for kIpc
  UniqueFd fd;                           // for kFd
};

struct AgentOptions {
  std::chrono::milliseconds start_timeout{3000};    // for each step of loading the agent
  std::chrono::milliseconds command_timeout{5000};  // for each command
};

enum class ReleaseStatus {
  kReleased = PHOS_RELEASE_DONE,            // freed; its addresses are kept
  kStale = PHOS_RELEASE_STALE,              // no longer what was enumerated; untouched
  kUnsuitable = PHOS_RELEASE_UNSUITABLE,    // left to the driver; untouched
  kFailed = PHOS_RELEASE_FAILED,            // driver_result says why; untouched
  kReallocated = PHOS_RELEASE_REALLOCATED,  // the driver's memory is there again, contents gone
  kLost = PHOS_RELEASE_LOST,                // freed, addresses taken by others: undo
  kNotReached = PHOS_RELEASE_NOT_REACHED,   // comes after a kLost; untouched
};
struct AgentRelease {
  ReleaseStatus status = ReleaseStatus::kNotReached;
  int driver_result = 0;  // CUresult
};

enum class ReleasedState {
  kReserved = PHOS_RELEASED_RESERVED,  // no memory; driver_result: why it could not be mapped
  kLost = PHOS_RELEASED_LOST,          // no memory, and its addresses are not to be had
  kNative = PHOS_RELEASED_NATIVE,      // cuMemAlloc memory again, contents undefined
  kAdopted = PHOS_RELEASED_ADOPTED,    // VMM memory in its place, contents undefined
  kInUse = PHOS_RELEASED_IN_USE,       // VMM memory in its place, of an earlier map_back()
};
struct ReleasedMemory {
  // As enumerate() describes it, for export_memory(); without memory there is nothing to export.
  AgentAllocation memory;
  ReleasedState state = ReleasedState::kReserved;
  int driver_result = 0;  // CUresult
};

struct MapBackOptions {
  // How often cuMemAlloc may answer with another address than wanted before all that is left
  // becomes VMM memory; at most 64, 0: VMM memory at once.
  unsigned native_misses = 16;
};

// Bytes of managed memory on their way, in the window that the process shares: what is in it is not
// trusted, and may be written to.
struct ManagedPiece {
  size_t allocation = 0;    // index into what was asked for
  uint64_t offset = 0;      // in the allocation
  uint32_t bytes = 0;       // kManagedPiece but for the last of an allocation
  uint8_t* data = nullptr;  // kManagedPiece bytes, page-aligned
  size_t number = 0;        // of the piece, in the order in which they go
};
inline constexpr uint32_t kManagedPiece = PHOS_WINDOW_PIECE;
// For each piece, on any of several threads. An error ends it all.
using UseManagedPiece = std::function<Result<void>(const ManagedPiece&)>;

// What the last enumerate() took.
struct ScanCost {
  uint64_t driver_calls = 0;
  std::chrono::nanoseconds time{0};  // in the agent
  uint64_t probed_bytes = 0;         // of address space
};

enum class DriverCopies {
  kKept = PHOS_COPIES_KEPT,    // never emptied, or not needed any more
  kEmpty = PHOS_COPIES_EMPTY,  // or about to be
  kBack = PHOS_COPIES_BACK,    // the contents are there again, for the driver to restore from
};

// One thread at a time. Errors name the process; ESRCH: it has ended.
class Agent {
 public:
  // Finds the agent in process `pid`, or loads it on thread `restore_tid`, which sleeps in poll(2).
  // Refuses, with the process unharmed, one that is stopped, frozen, traced or ending, or has no
  // libcuda; EBUSY if another phos uses the agent. Works on a locked process too.
  static Result<Agent> attach(int pid, int restore_tid, const AgentOptions& options = {});
  // The agent that is in process `pid` already; nothing: none is, or none that serves. Also of a
  // process that is frozen or traced: of its threads only the agent's must be able to run.
  static Result<std::optional<Agent>> find(int pid, int restore_tid,
                                           const AgentOptions& options = {});
  // After find() has found none: takes out what a phosd has left that died while it brought the
  // agent or took it out. Refuses as attach().
  static Result<void> remove_leftovers(int pid, int restore_tid, const AgentOptions& options = {});

  Agent(Agent&& other) noexcept;
  Agent& operator=(Agent&&) = delete;
  // As detach(), whatever it says.
  ~Agent();

  // All device memory, by address. Every cuMemAlloc above 1 MiB and every VMM mapping is found;
  // blocks of smaller and pool memory only if their first bytes are in use. EAGAIN: the gate has
  // opened meanwhile (kGate).
  //
  // Must not be called while the process is locked by the driver, which would block the agent until
  // it is unlocked. ETIMEDOUT: it did not answer; it gives up when it can, and sleeps again.
  Result<std::vector<AgentAllocation>> enumerate(AgentGuard guard = AgentGuard::kCaller);
  // The same for what begins in these ranges, which are in ascending order.
  Result<std::vector<AgentAllocation>> enumerate(std::span<const AddressRange> ranges,
                                                 AgentGuard guard = AgentGuard::kCaller);
  const ScanCost& last_scan() const { return cost_; }

  // Handles to allocations as enumerate() described them, one each, in order. The caller owns
  // them; in the process no descriptor stays open, at most PHOS_EXPORT_MAX_FDS are for a moment.
  Result<std::vector<AgentExport>> export_memory(std::span<const AgentAllocation> allocations,
                                                 AgentGuard guard);

  // Is a command under way, that it has not answered in time?
  bool is_busy() const { return mailbox_ && !mailbox_->idle(); }
  void set_command_timeout(std::chrono::milliseconds timeout) {
    options_.command_timeout = timeout;
  }

  // Release and map back. From the first of these calls on until contents_loaded() no thread of the
  // process but the agent's may be in the driver or enter it: the caller sees to it (threads parked
  // in front of an entry point's first instruction, or behind it, or the process frozen but for the
  // agent). The process must not be locked by the driver while a call lasts; what is released stays
  // so through the driver's checkpoint and restore, through CRIU's, and through this object: the
  // agent keeps its own record in the process, for any later phos.

  // Frees the memory of `allocations`, as enumerate() described them, and keeps its addresses. One
  // result each, in order. Only cuMemAlloc memory above 2 MiB, and such as was adopted, is taken,
  // and managed memory that read_managed() has read;
  // the contents are gone, so the caller has saved them. Memory that other processes have imported
  // must not be among it, which only the kernel driver knows. An error: refused before anything was
  // touched (EPROTO: the record in the process has been overwritten; ENOTSUP: a libcuda with
  // unknown code at an entry point, which memory mapped back would need), or ESRCH, or ETIMEDOUT:
  // then ask released() once the agent answers again.
  Result<std::vector<AgentRelease>> release(std::span<const AgentAllocation> allocations);
  // After release() or map_back(): what libcuda and the kernel were asked, and answered, when the
  // addresses were given up that became kLost; without such, the last ones. A line each.
  std::vector<std::string> address_events() const;

  // Undoes release(), in the same process or in one restored from its image: everything that is
  // recorded as released gets memory at its old address, and is listed as released() does. The
  // caller loads the contents of what is kNative or kAdopted. Can be called again for what is still
  // kReserved or kLost.
  Result<std::vector<ReleasedMemory>> map_back(const MapBackOptions& options = {});
  // Entry points of libcuda that map_back() could not hook (0: none, else the first from 1): the
  // application's calls about adopted memory get the answers for VMM memory.
  int missing_hook() const { return missing_hook_; }

  // Which dump has the contents of what is released, for whoever brings it back; 16 bytes that
  // release() leaves alone, and that stay with the record.
  void note_released_by(const std::array<uint8_t, 16>& dump_id);
  std::array<uint8_t, 16> released_by() const;

  // Managed memory, of which no handle can be had. Whatever else may write to it must stand still:
  // the threads of the process as well, which reach it without the driver.
  //
  // EDEADLK: a thread that stands still may be in the middle of allocating memory, so that the
  // agent's calls would not end. They have not begun then.
  Result<void> check_no_locks();
  // All bytes of `memory`, as enumerate() describes it, or at least address and size, go through
  // `use`. `to_release`: only of what was read so release() takes managed memory; where it was, and
  // should be, is noted then, and no thread can write to it, until contents_loaded(), which has to
  // be called also if nothing of it was released. A short last piece has zeros after it up to the
  // next 64 KiB.
  Result<void> read_managed(std::span<const AgentAllocation> memory, bool to_release,
                            const UseManagedPiece& use);
  // After map_back() and before contents_loaded(): `fill` writes the bytes of each piece, which go
  // to memory[piece.allocation] from piece.offset on.
  Result<void> load_managed(std::span<const AgentAllocation> memory,
                            std::span<const ManagedPiece> pieces, const UseManagedPiece& fill);

  // After map_back(), where what it has brought back could not be loaded: managed memory goes
  // again, so that no thread finds it without its contents.
  Result<std::vector<ReleasedMemory>> take_away_managed();

  // What is recorded, by address. Needs no thread to be parked, only a process not locked.
  Result<std::vector<ReleasedMemory>> released();

  // The contents are where they were: the application may go on. Returns what is still recorded.
  Result<std::vector<ReleasedMemory>> contents_loaded();

  // Where in the process the driver keeps its own copy of it: what it has mapped for that since
  // release(), page-aligned, some of which may be gone. To be asked once the driver's checkpoint is
  // done.
  std::vector<AddressRange> driver_copies() const;
  // Drops the contents of such ranges, which stay mapped. They must be there again, all of them,
  // when the driver restores the process. Afterwards, or after wait_idle(), it has been done or
  // will not be.
  Result<void> empty_driver_copies(std::span<const AddressRange> ranges);
  // Where they are in that: kEmpty from when empty_driver_copies() has begun until
  // note_copies(), and for another phosd, too. Back to kKept with release().
  DriverCopies copies_state() const;
  void note_copies(DriverCopies state);
  // Waits for a command that has not been answered in time. ETIMEDOUT: the same again.
  Result<void> wait_idle() { return settle(); }

  // The gate (gpu-tracker/gate), which is who calls these. install_gate() sets the handler of a
  // signal that the application does not use, or keeps the one that an earlier phosd has set;
  // avoids those in `blocked_signals` (bit: number - 1) if it can, and returns its number.
  // remove_gate() puts back what was there; EBUSY while the gate is closed or a thread is in the
  // handler. forget_gate(): afterwards no thread is in the handler nor on its way out, the caller
  // has looked; without it unload() leaves the library. The address is the gate's in the process.
  Result<int> install_gate(uint64_t blocked_signals);
  Result<void> remove_gate();
  Result<void> forget_gate();
  phos_gate& gate();
  // One gate at a time: EBUSY while another has it.
  Result<void> claim_gate();
  void unclaim_gate() { gate_claimed_ = false; }
  // A gate was installed, by whatever phosd, and not forgotten since: threads may be in the
  // handler's code.
  bool gate_was_used();
  uint64_t gate_address() const;
  // Code that calls into libcuda may be in beside the library's own: the agent's, which answers for
  // adopted memory, and its hooks, which go on into the library past the entry points.
  Result<std::vector<AddressRange>> call_code();

  int restore_tid() const { return restore_tid_; }
  // The agent's own thread, as this process numbers it.
  Result<int> thread_id() const;

  // Did attach() bring it into the process, rather than find it there? One that an earlier phosd
  // has brought and could not take out counts as brought.
  bool was_loaded() const { return was_loaded_; }

  // Lets the agent sleep on in the process, with nothing open, for the next attach(). `leaving`:
  // that one is to take it out.
  Result<void> detach(bool leaving = false);
  // Ends the agent: its thread, mailbox and library leave the process; the library stays if the
  // gate has been used and not forgotten. EBUSY while it holds memory of the application, released
  // or adopted, or hooks that no contents_loaded() has taken out since, or while the gate's handler
  // is installed.
  Result<void> unload();

 private:
  class Window;

  Agent(int pid, int restore_tid, const AgentOptions& options, Mailbox mailbox)
      : pid_(pid), restore_tid_(restore_tid), options_(options), mailbox_(std::move(mailbox)) {}

  static Result<Agent> attach_living(int pid, int restore_tid, const AgentOptions& options);
  Result<void> unload_living();
  Result<void> settle();
  Result<void> run(phos_agent_command command, uint32_t count);
  // What the command that has ended answered.
  Result<void> answer();
  Result<void> export_batch(std::span<const AgentAllocation> batch, AgentGuard guard,
                            std::vector<AgentExport>* exports);
  Result<std::vector<AgentAllocation>> read_allocations(uint32_t count);
  Result<std::vector<ReleasedMemory>> run_released(phos_agent_command command);

  int pid_;
  int restore_tid_;
  AgentOptions options_;
  std::optional<Mailbox> mailbox_;  // none once detached
  ScanCost cost_;
  bool was_loaded_ = false;
  int missing_hook_ = 0;
  bool gate_claimed_ = false;
};

// Address ranges of process `pid` in which device memory can lie: inaccessible private memory, and
// what is mapped from the managed memory driver.
Result<std::vector<AddressRange>> device_address_ranges(int pid);

}  // namespace phos
