// SPDX-License-Identifier: GPL-2.0-only
// Managed memory through the window that phosd and the agent share.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#include "gpu-tracker/inject/agent.h"

namespace phos {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// The agent's copies go one after the other; what is done with a piece takes a few times as long.
constexpr unsigned kThreads = 4;
constexpr milliseconds kLocksTimeout{1000};
// Nothing is on its way for so long: a copy of 2 MiB takes a millisecond at worst, but memory may
// have to move first.
constexpr milliseconds kStall{60000};
constexpr timespec kSlice = {0, 20000000};
constexpr uint32_t kUnitBytes = 65536;

}  // namespace

// Pieces 0 to n-1 in the order of their slots, each used on one of several threads.
class Agent::Window {
 public:
  Window(Agent& agent, const UseManagedPiece& use) : agent_(agent), use_(use) {
    volatile phos_mailbox& m = agent_.mailbox_->shared();
    for (volatile phos_window_slot& slot : m.slots) {
      slot.state = PHOS_SLOT_FREE;
      slot.number = UINT32_MAX;
    }
  }

  // After the command was started, and until it has ended.
  Result<void> run(std::span<const AgentAllocation> memory, std::span<const ManagedPiece> pieces,
                   bool reading) {
    memory_ = memory;
    pieces_ = pieces;
    reading_ = reading;
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < kThreads; i++) threads.emplace_back([this] { work(); });
    for (std::thread& t : threads) t.join();
    if (!error_ && !reading) {
      if (auto r = say_that_was_all(); !r) error_ = r.error();
    }
    if (error_) agent_.mailbox_->cancel();
    auto idle = agent_.mailbox_->wait_idle(kStall);
    if (!idle) return idle.error();
    if (!*idle) return process_error(agent_.pid_, ETIMEDOUT, "phos's agent in it does not answer");
    // Why it has ended early it says itself, unless it was told to.
    auto answer = agent_.answer();
    if (error_ && (error_->code() != EPIPE || answer)) return *error_;
    if (answer || answer.error().domain() != Domain::kCuda) return answer;
    char text[120];
    snprintf(text, sizeof text, "its managed memory at %#llx could not be %s: CUDA error %d",
             static_cast<unsigned long long>(agent_.mailbox_->shared().next_address),
             reading_ ? "read" : "written", answer.error().code());
    return Error(Domain::kCuda, answer.error().code(),
                 "process " + std::to_string(agent_.pid_) + ": " + text);
  }

 private:
  void work() {
    for (;;) {
      size_t number;
      {
        std::lock_guard<std::mutex> hold(mutex_);
        if (error_ || next_ == pieces_.size()) return;
        number = next_++;
      }
      auto done = pass(number);
      if (done) continue;
      std::lock_guard<std::mutex> hold(mutex_);
      if (!error_) error_ = done.error();
    }
  }

  Result<void> pass(size_t number) {
    ManagedPiece piece = pieces_[number];
    const uint64_t address = memory_[piece.allocation].address + piece.offset;
    volatile phos_window_slot& slot = slot_of(number);
    piece.number = number;
    piece.data = agent_.mailbox_->payload().window[number % PHOS_WINDOW_SLOTS];
    if (auto r = wait_for(number); !r) return r;
    if (!reading_) {
      if (auto r = use_(piece); !r) return r;
      slot.address = address;
      slot.bytes = piece.bytes;
      slot.number = static_cast<uint32_t>(number);
      hand_over(slot, PHOS_SLOT_FULL);
      return {};
    }
    const uint64_t got = slot.address;
    const uint32_t bytes = slot.bytes;
    if (got != address || bytes != piece.bytes) {
      return process_error(agent_.pid_, EPROTO,
                           "phos's agent in it hands over other memory than it was asked for");
    }
    const uint32_t end = (bytes + kUnitBytes - 1) / kUnitBytes * kUnitBytes;
    memset(piece.data + bytes, 0, end - bytes);
    auto used = use_(piece);
    hand_over(slot, PHOS_SLOT_FREE);
    return used;
  }

  Result<void> say_that_was_all() {
    volatile phos_window_slot& slot = slot_of(pieces_.size());
    if (auto r = wait_for(pieces_.size()); !r) return r;
    slot.bytes = 0;
    hand_over(slot, PHOS_SLOT_FULL);
    return {};
  }

  volatile phos_window_slot& slot_of(size_t number) const {
    return agent_.mailbox_->shared().slots[number % PHOS_WINDOW_SLOTS];
  }

  static void hand_over(volatile phos_window_slot& slot, uint32_t state) {
    auto* word = const_cast<uint32_t*>(&slot.state);
    __atomic_store_n(word, state, __ATOMIC_RELEASE);
    syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // A slot is free for LOAD only when whoever had it before has filled it, and it was emptied.
  bool is_ours(size_t number, uint32_t state) const {
    const uint32_t of = slot_of(number).number;
    if (reading_) return state == PHOS_SLOT_FULL && of == static_cast<uint32_t>(number);
    const bool first = number < PHOS_WINDOW_SLOTS;
    const auto before = static_cast<uint32_t>(number - PHOS_WINDOW_SLOTS);
    return state == PHOS_SLOT_FREE && (first || of == before);
  }

  Result<void> wait_for(size_t number) {
    auto* word = const_cast<uint32_t*>(&slot_of(number).state);
    const auto deadline = steady_clock::now() + kStall;
    for (;;) {
      // In this order: what it has handed over last it has before it ended.
      const bool ended = agent_.mailbox_->idle();
      const uint32_t state = __atomic_load_n(word, __ATOMIC_ACQUIRE);
      if (is_ours(number, state)) return {};
      {
        std::lock_guard<std::mutex> hold(mutex_);
        if (error_) return *error_;
      }
      if (ended) return process_error(agent_.pid_, EPIPE, "phos's agent in it has given up");
      if (steady_clock::now() > deadline) {
        return process_error(agent_.pid_, ETIMEDOUT,
                             "its managed memory does not come; its driver hangs");
      }
      if (auto alive = agent_.mailbox_->wait_idle(milliseconds(0)); !alive) return alive.error();
      syscall(SYS_futex, word, FUTEX_WAIT, state, &kSlice, nullptr, 0);
    }
  }

  Agent& agent_;
  const UseManagedPiece& use_;
  std::span<const AgentAllocation> memory_;
  std::span<const ManagedPiece> pieces_;
  bool reading_ = true;
  std::mutex mutex_;  // of what follows
  size_t next_ = 0;
  std::optional<Error> error_;
};

Result<void> Agent::check_no_locks() {
  const auto before = options_.command_timeout;
  options_.command_timeout = kLocksTimeout;
  auto r = run(PHOS_COMMAND_NO_LOCKS, 0);
  options_.command_timeout = before;
  if (r || r.error().code() != ETIMEDOUT) return r;
  return process_error(pid_, EDEADLK,
                       "one of its threads was stopped in the middle of malloc() or free(), which "
                       "keeps its managed memory from being saved; try again");
}

Result<void> Agent::read_managed(std::span<const AgentAllocation> memory, bool to_release,
                                 const UseManagedPiece& use) {
  for (auto left = memory; !left.empty();) {
    if (auto r = settle(); !r) return r;
    const auto some = left.first(std::min<size_t>(left.size(), PHOS_MAILBOX_MAX_ALLOCATIONS));
    std::vector<ManagedPiece> pieces;
    for (size_t i = 0; i < some.size(); i++) {
      phos_allocation a = {};
      a.address = some[i].address;
      a.size = some[i].size;
      a.buffer_id = some[i].buffer_id;
      memcpy(&mailbox_->payload().allocations[i], &a, sizeof a);
      for (uint64_t at = 0; at < a.size; at += kManagedPiece) {
        const auto bytes = static_cast<uint32_t>(std::min<uint64_t>(a.size - at, kManagedPiece));
        pieces.push_back({.allocation = i, .offset = at, .bytes = bytes});
      }
    }
    const size_t first = memory.size() - left.size();
    const UseManagedPiece use_of_all = [&](const ManagedPiece& piece) {
      ManagedPiece of_all = piece;
      of_all.allocation += first;
      return use(of_all);
    };
    Window window(*this, use_of_all);
    mailbox_->shared().argument = to_release ? PHOS_READ_TO_RELEASE : PHOS_READ_AGAIN;
    mailbox_->start(PHOS_COMMAND_READ, static_cast<uint32_t>(some.size()));
    auto r = window.run(some, pieces, true);
    // CRIU dumps what is there.
    if (mailbox_->idle()) mailbox_->drop_payload();
    if (!r) return r;
    left = left.subspan(some.size());
  }
  return {};
}

Result<void> Agent::load_managed(std::span<const AgentAllocation> memory,
                                 std::span<const ManagedPiece> pieces,
                                 const UseManagedPiece& fill) {
  if (auto r = settle(); !r) return r;
  Window window(*this, fill);
  mailbox_->start(PHOS_COMMAND_LOAD, 0);
  auto r = window.run(memory, pieces, false);
  if (mailbox_->idle()) mailbox_->drop_payload();
  return r;
}

}  // namespace phos
