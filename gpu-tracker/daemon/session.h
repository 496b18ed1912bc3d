// SPDX-License-Identifier: GPL-2.0-only
// Session: what phosd does for one run of criu, free of sockets and processes' plumbing, so that
// the tests drive it with a simulated or failing driver.
//
// A process that inspect() has found is held by the session until undo() brings it back, or until
// it is gone. Whatever ends the session early, recover() brings back what is still held.
#pragma once

#include <array>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stop_token>
#include <string>
#include <vector>

#include "gpu-tracker/base/result.h"
#include "gpu-tracker/base/unique_fd.h"
#include "gpu-tracker/daemon/gate_pins.h"
#include "gpu-tracker/daemon/gpu_engines.h"
#include "gpu-tracker/daemon/image_storage.h"
#include "gpu-tracker/daemon/live_copy.h"
#include "gpu-tracker/daemon/memory_loader.h"
#include "gpu-tracker/daemon/memory_release.h"
#include "gpu-tracker/daemon/process_lock.h"
#include "gpu-tracker/driver/gpu_driver.h"
#include "gpu-tracker/image/durability.h"
#include "gpu-tracker/image/image.h"

namespace phos {

struct FoundProcess {
  int pid;
  int restore_tid;
  CudaState state;
};

// When to stop copying the memory of processes that run.
struct CopyLimits {
  unsigned max_rounds = 8;
  std::chrono::milliseconds budget{60000};  // begin no further round after this time
  double max_slowdown = 0;  // share of its speed the application may lose; 0: no limit
  TrackerChoice tracker = TrackerChoice::kContent;
  // What is copied may be taken away from the GPU before the driver's checkpoint.
  bool release = true;
};

// Told of each round of each process, one at a time, on any thread. False: give up.
using CopyProgress = std::function<bool(int pid, unsigned number, const RoundReport& report)>;

// Not thread-safe; several sessions may share a driver, each on a thread of its own. Every call may
// block in the driver for as long as the target does not answer.
class Session {
 public:
  // How long processes wait for room on their GPUs, all of a run of criu together; then a restore
  // fails, and recover() goes on trying. Criu waits meanwhile, and its other tasks with it.
  static constexpr std::chrono::milliseconds kRoomPatience{30000};

  // All outlive the session. `lock_dir`: where one lock file a process keeps two dumps apart; in
  // phosd's run directory.
  // `engines`: null if GPU memory is left to the driver.
  Session(GpuDriver& driver, std::string lock_dir, GpuEngines* engines = nullptr);
  // Closes what it has open of the GPUs, which takes a while.
  ~Session() { ends_soon(); }
  // Its client has gone: who wants to dump one of its processes waits until it has ended.
  void ends_soon() const;
  void set_room_patience(std::chrono::milliseconds time) { room_patience_ = time; }
  // Says at once, on any thread, until ends_soon(), whether the client has gone.
  void set_client_gone(std::function<bool()> gone) { client_gone_ = std::move(gone); }

  // A dump or pre-dump into `image_dir` (takes ownership). Removes phos images of an earlier dump
  // there. It builds on what the directory's link `parent` leads to. kMemory: see take_unsynced().
  Result<void> begin_dump(UniqueFd image_dir, DumpStage stage = DumpStage::kDump,
                          ImageStorage storage = {}, Durability durability = Durability::kDisk);

  // A restore from `image_dir`: refuses images this machine cannot take.
  Result<FilesImage> begin_restore(UniqueFd image_dir);

  // A dump into `image_dir` whose phosd died; to be followed by undo() of what it held.
  void begin_take_over(UniqueFd image_dir) { image_dir_ = std::move(image_dir); }
  // The same; the directory is opened by its path when it is needed.
  void begin_take_over(const std::string& image_dir) { noted_dir_ = image_dir; }
  // Holds a process that a phosd which died has left; recover() brings it back, if it has not
  // ended. EBUSY, EAGAIN: somebody else does. Any other error: what is noted of it stays, try
  // again.
  Result<void> take_over(const LeftProcess& left);

  // The processes will probably go on when the dump is done: what they will need is read ahead.
  void expect_to_go_on() { will_go_on_ = true; }

  // The task and its descendants run. Refuses, before anything is locked, what could not be
  // restored; holds the others. Returns all CUDA processes of that tree which the session holds.
  Result<std::vector<FoundProcess>> inspect(int pid);

  // Copies the GPU memory of all held processes that were found running, while they run. A dump
  // goes on without what cannot be copied; a pre-dump fails.
  Result<void> copy(const CopyLimits& limits, const CopyProgress& progress,
                    const std::stop_token& stop = {});

  // Locks all held processes that were found running and are not locked yet: submitted work is
  // finished and new CUDA calls block. Threads of those that copy() has copied are parked before,
  // where that can be. On failure they run again.
  Result<void> lock(unsigned timeout_ms);

  // Of the processes that are locked: those whose managed memory checkpoint() will take away.
  std::vector<FoundProcess> with_managed_memory() const;

  // Has copy() begun what complete_copies() must complete?
  bool has_copies() const;
  // Copies what the locked processes have changed since their last round, and takes what is saved
  // away from the GPU where the gate is closed. What fails is given up with a word in the log: the
  // driver saves everything. An error: some process is not as it was, undo() it.
  Result<void> complete_copies();

  // The task is frozen, has device files open and was not found to use CUDA. Refuses it if it uses
  // the GPU in some other way, which would be lost.
  Result<void> check_leftover(int pid);

  // The task is frozen, its restore thread runs. Moves device memory into the process and writes
  // phos-<pid>.img. Does nothing for a process without CUDA.
  Result<void> checkpoint(int pid);

  // Back to the state that inspect() found, as soon as its GPUs have room for it (kRoomPatience).
  // The restore thread runs, and the agent's. `found` is used for a process this session does not
  // hold: one that a session which died had paused. A gate is left for recover() to take away, once
  // the process runs.
  Result<void> undo(int pid, CudaState found);

  // The restore thread of a restored process, if the images hold this process. The first call is
  // for the root of the tree, all of which is frozen.
  Result<std::optional<FoundProcess>> find_restored(int pid);

  // A restored task, frozen, its restore thread runs, and the agent's: back to the state recorded
  // at the dump, as soon as its GPUs have room for it. A gate is left for recover() to take away.
  // Returns how many recorded processes are still to be resumed.
  Result<uint32_t> resume(int pid);

  Result<void> add_file(const DeviceFile& file);

  // CRIU is done. On failure or --leave-running the plugin has called undo(); on success the tasks
  // are about to be killed, unless a post-dump script keeps them: recover() tells. Completes the
  // images of a pre-dump and lets go of its processes.
  Result<void> finish(bool success);

  // What a dump that has succeeded left to be made durable; null: nothing. Once.
  std::unique_ptr<UnsyncedFiles> take_unsynced();

  // Of the dump that is made or restored; zeros as long as there is none.
  const DumpId& dump_id() const { return dump_id_; }

  // Brings back every process still held, once nobody traces it any more, and opens what gates are
  // left. Returns when none is: brought back, gone, or given up with the reason in the log. That is
  // one that the driver has lost, or that somebody else has gone on with; never for now only.
  void recover();

 private:
  // Memory on GPUs that a process will need.
  struct Room {
    std::vector<DeviceRoom::Claim> claims;
    DeviceRoom::Admission admission;  // from when it is about to take it
    bool reclaimed = false;           // others have been made to give up theirs, which is done once
  };
  struct Held {
    Held(int tid, CudaState state, uint64_t start, ProcessLock process_lock)
        : restore_tid(tid), found(state), start_time(start), lock(std::move(process_lock)) {}

    int restore_tid;
    CudaState found;
    uint64_t start_time;
    ProcessLock lock;
    ProcessMemory memory;
    std::chrono::microseconds scan_time{0}, lock_time{0};
    std::optional<std::chrono::steady_clock::time_point> stopped;  // when it was first
    // Kept after it is completed, too: with it go phosd's contexts, which takes a while.
    std::unique_ptr<LiveCopy> copy;
    bool copy_completed = false;    // what it saved is what the memory holds
    bool locked = false;            // by us
    bool failure_reported = false;  // of bringing it back
    std::optional<Error> lost;      // by the driver: it cannot come back

    // The released path.
    std::unique_ptr<MemoryRelease> release;         // null: not taken
    std::vector<AgentAllocation> to_release;        // asked for
    std::vector<AgentAllocation> managed;           // to be saved and released once it is frozen
    std::vector<std::unique_ptr<KeptMemory>> kept;  // of to_release, on its GPUs
    std::string not_released;                       // why the path was given up
    std::optional<ProcessImage> image;              // written before anything was released
    std::unique_ptr<PageChain> chain;               // what brings it back
    std::unique_ptr<MemoryLoader> loader;
    Room room;                              // from when its memory is away until it is back
    std::vector<AddressRange> copies;       // the driver's own copy, if it is saved in `image`
    std::unique_ptr<PageChain> copy_chain;  // what has it, once it may be gone from the process
    std::chrono::microseconds gate_time{0}, validate_time{0}, write_time{0}, release_time{0};
    std::chrono::microseconds copy_time{0};
    bool noted = false;          // for another phosd, should this one die
    bool taken_over = false;     // from a phosd that died
    bool release_known = false;  // of one taken over: whether its memory is away (`release`)
    bool restored = false;       // by criu, from the images that are being restored
    bool leaving = false;        // back, but for its gate
  };
  // The pages of a restored process.
  struct Saved {
    std::unique_ptr<PageChain> chain;
    std::unique_ptr<MemoryLoader> loader;
  };
  using Group = std::map<int, Held>;  // by pid

  Result<ProcessLock> take_lock(int pid, uint64_t start_time, bool what_is_left = false) const;
  Result<ProcessLock> wait_for_lock(int pid, uint64_t start_time) const;
  // Nothing: no CUDA in it, or it is gone.
  Result<std::optional<Held>> inspect_one(int pid);
  Result<std::optional<Held>> inspect_living(int pid, int restore_tid, uint64_t start_time);
  Result<void> check_restorable(int pid, Held* held) const;
  Result<void> lock_or_leave(int pid, unsigned timeout_ms);
  // One try. Processes that have ended are forgotten. False: some process's work did not finish in
  // time; then none is locked.
  Result<bool> try_lock(const std::vector<int>& pids, unsigned timeout_ms);
  std::vector<int> to_lock() const;
  void note_stopped(const std::vector<int>& pids);
  Result<void> lock_all(std::chrono::steady_clock::time_point deadline, unsigned timeout_ms);
  Result<void> unlock_all(const std::vector<int>& pids);

  void close_gates(const std::vector<int>& pids);
  bool has_gates() const;
  Result<void> check_outside_users() const;
  void open_gates(const std::vector<int>& pids, const std::string& why);
  std::map<int, Error> not_quiet(const std::vector<int>& pids);
  // False: some process's work did not finish in time; then none is locked.
  Result<bool> lock_parked(const std::vector<int>& pids,
                           std::chrono::steady_clock::time_point deadline, unsigned timeout_ms);
  // False: nothing is locked, no gate closed.
  Result<bool> lock_behind_gates(const std::vector<int>& pids,
                                 std::chrono::steady_clock::time_point deadline,
                                 unsigned timeout_ms);
  Result<bool> lock_behind_closed_gates(const std::vector<int>& pids,
                                        std::chrono::steady_clock::time_point deadline,
                                        unsigned timeout_ms);
  // Opens the gate; the driver's path is taken.
  void give_up_release(int pid, Held* held, const std::string& why);
  static void leave_to_driver(Held* held);
  Result<void> catch_up(int pid, Held* held);
  Result<void> release_memory(int pid, Held* held);
  // Only phos can save managed memory, and only with the gate closed.
  static Result<void> check_managed(int pid, const Held& held);
  Result<void> refuse_managed_memory() const;
  Result<void> release_managed(int pid, Held* held);
  Result<void> save_managed(int pid, Held* held);
  static void log_lost(int pid, const Held& held, const std::vector<AgentRelease>& results);
  Result<void> prepare_release(int pid, Held* held);
  static bool note_released(int pid, Held* held, const std::vector<AgentRelease>& results);
  Result<PageChain> open_chain(const Held& held, const ProcessImage& image, PageIo io) const;
  Result<void> open_saved(Held* held, const ProcessImage& image) const;
  Result<void> open_saved_anew(Held* held, const ProcessImage& image) const;
  Result<std::unique_ptr<MemoryRelease>> find_release(int pid, int restore_tid) const;
  Result<void> bring_memory_back(int pid, Held* held);
  Result<void> load_memory(int pid, Held* held, bool all_of_image);
  Result<void> save_copy(int pid, Held* held);
  Result<uint64_t> empty_copy(int pid, Held* held);
  Result<void> open_copy(int pid, const DumpId& dump, Held* held);
  Result<void> put_copy_back(int pid, CudaState state, Held* held, const ProcessImage* image);
  static void forget_copy(const Held& held);
  Result<void> remove_left_probes_of_tree(int root);
  Result<void> open_pages(const ProcessImage& image);
  void prefetch_saved();
  Room claim_room(const ProcessImage& image);
  void make_room(const Room& room);
  DeviceRoom& device_room() { return engines_ ? engines_->room() : own_room_; }
  GpuUuid restored_on(const GpuUuid& gpu) const;
  std::vector<DeviceRoom::Need> needs_of(const ProcessImage& image) const;
  std::vector<DeviceRoom::Need> needs_of(int pid, Held* held);
  std::optional<DeviceRoom::Shortage> admit(const std::vector<DeviceRoom::Need>& needs, Room* room);
  Result<void> wait_for_room(int pid, const std::vector<DeviceRoom::Need>& needs, Room* room);
  std::string remedy(int pid, const Held* held, bool lost) const;
  Result<void> restore_by_driver(int pid, const std::vector<DeviceRoom::Need>& needs, Held* held,
                                 Room* room);
  // A second attempt, if the first fails while phosd uses memory of these GPUs itself, of which the
  // process may need some, and if `may_help` says so of the error.
  Result<void> with_room(int pid, Room* room, const std::function<Result<void>()>& attempt,
                         const std::function<bool(const Error&)>& may_help);
  Result<void> restore_memory(int pid, const ProcessImage& image);
  static void kill_unrestored(int pid, Held* held);

  Result<void> check_keys(const PreviousPages& previous) const;
  std::optional<PreviousPages> open_previous(int vpid) const;
  Result<std::shared_ptr<PageStore>> page_store();
  bool has_room_for(uint64_t bytes) const;  // in the image directory
  bool has_room_for_copies() const;
  Result<void> note(Held* held);
  Result<void> start_copy(int pid, Held* held, TrackerChoice tracker);
  Result<void> run_rounds(int pid, LiveCopy* copy, const CopyLimits& limits,
                          const CopyProgress& progress, const std::stop_token& stop);
  // Of all that are locked and copied, at the same time. A failure, if it is not of one that ended.
  Result<void> with_copies(Result<void> (Session::*work)(int, Held*));
  Result<void> complete_copy(int pid, Held* held);
  void keep_copies(int pid, Held* held, std::vector<std::unique_ptr<KeptMemory>> room);
  Result<void> finish_pre_dump();

  Result<ProcessImage> describe(int pid, const Held& held) const;
  static void log_memory(int pid, const ProcessImage& image);
  void log_storage();
  static void log_unencrypted(int pid, const ProcessImage& image, uint64_t copy);
  Result<void> write_image(int pid, Held* held, std::chrono::microseconds checkpoint_time);
  static void stop_passing(int pid, Held* held);
  // `image`: of a process that is restored, `held` of another.
  Result<void> bring_back(int pid, CudaState target, Held* held, const ProcessImage* image,
                          Room* room);
  Result<void> wait_to_take_over(int pid, CudaState found);
  Result<void> undo_one(int pid, Held* held);
  bool needs_images() const;  // to bring a process back
  bool is_all_there_is() const;
  void remove_unfinished_images();
  void note_went_on(int pid);
  void remove_left_images();
  Result<void> open_noted_dir();
  // True when done with it.
  bool recover_one(int pid, Held* held);
  bool give_up(int pid, Held* held, const Error& why);

  GpuDriver& driver_;
  const std::string lock_dir_;
  const GatePins pins_;
  GpuEngines* const engines_;
  std::function<bool()> client_gone_;  // may be empty
  UniqueFd image_dir_;
  std::optional<PinnedPool::Peak> pool_peak_;  // of a dump or a restore
  std::unique_ptr<UnsyncedFiles> unsynced_;    // null: files are durable when they have their names
  std::shared_ptr<PageStore> store_;           // of the dump's pages; null: none was needed so far
  std::optional<PageHashKey> hash_key_;        // of its processes that build on nothing
  std::string noted_dir_;                      // not opened yet
  std::string left_dump_;            // of a phosd that died; nothing of it is restored by it
  bool failed_ = false;              // as finish() was told
  bool ended_with_managed_ = false;  // a process of the dump
  bool statistics_logged_ = false;
  bool went_on_ = false;  // a process that was taken over runs again
  DeviceRoom own_room_;   // without engines
  std::chrono::milliseconds room_patience_ = kRoomPatience;
  std::chrono::milliseconds room_waited_{0};  // by all processes together
  Group held_;
  std::vector<int> inspected_;  // whose trees are dumped
  DumpId dump_id_{};
  DumpStage stage_ = DumpStage::kDump;
  ImageStorage storage_;
  bool dumping_ = false;
  bool release_wanted_ = false;
  bool will_go_on_ = false;
  bool finished_ = false;
  std::vector<GpuInfo> gpus_;
  FilesImage files_;
  ImageSet restored_;
  std::map<int, Room> restore_room_;  // by pid in the image
  std::map<int, Saved> saved_;        // by pid in the image
  std::set<int> without_probes_;      // of the restored processes
  std::vector<GpuPair> gpu_pairs_;
  uint32_t to_resume_ = 0;
};

}  // namespace phos
