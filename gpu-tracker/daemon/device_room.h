// SPDX-License-Identifier: GPL-2.0-only
// How much memory of the GPUs phosd may use for a while, so that processes which are to get theirs
// back find room for it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <vector>

#include "gpu-tracker/driver/gpu_context.h"
#include "gpu-tracker/driver/gpu_driver.h"

namespace phos {

// Of all GPUs and sessions. Thread-safe.
class DeviceRoom {
 public:
  using Bytes = std::map<GpuUuid, uint64_t>;

  // Memory that some process will need, or is about to take, until this is destroyed. Movable.
  class Claim {
   public:
    Claim(Claim&& other) noexcept;
    Claim& operator=(Claim&& other) noexcept;
    ~Claim();

    const GpuUuid& gpu() const { return gpu_; }

   private:
    friend class DeviceRoom;
    Claim(DeviceRoom* owner, Bytes DeviceRoom::*kind, const GpuUuid& gpu, uint64_t bytes)
        : owner_(owner), kind_(kind), gpu_(gpu), bytes_(bytes) {}
    DeviceRoom* owner_;
    Bytes DeviceRoom::*kind_;
    GpuUuid gpu_;
    uint64_t bytes_;
  };

  // Who uses memory that allocate() has given. Called on any thread, between enter() and leave().
  class Guest {
   public:
    virtual ~Guest() = default;
    // Frees what it has of that GPU, unless so many bytes are free without.
    virtual void make_room(const GpuUuid& gpu, uint64_t bytes) = 0;
  };
  void enter(Guest* guest);
  // Waits until no call to it is under way. It may keep what it has for as long as it is at work
  // with it.
  void leave(Guest* guest);

  Claim claim(const GpuUuid& gpu, uint64_t bytes);
  // Has guests make room for all that is claimed of these GPUs.
  void make_room(const std::vector<Claim>& claims);

  // What a process is about to take of a GPU: the driver first, then who loads what was released.
  struct Need {
    GpuUuid gpu{};
    uint64_t by_driver = 0, later = 0;
    uint64_t bytes() const { return by_driver + later; }
  };
  struct Admission {
    std::vector<Claim> by_driver, later;  // each is given up when that is taken
  };
  // A GPU that has too little free, without what others have been admitted for and have not taken.
  struct Shortage {
    GpuUuid gpu{};
    uint64_t needed = 0, free = 0;
  };
  // All of it or nothing. `free` tells how much memory of a GPU nobody has; none: it cannot be
  // told, and is taken to suffice.
  using FreeMemory = std::function<std::optional<uint64_t>(const GpuUuid&)>;
  std::optional<Shortage> admit(const std::vector<Need>& needs, const FreeMemory& free,
                                Admission* admission);

  // Device memory of `context`, which is on that GPU, if with it there is still as much free as is
  // claimed, and a share of all that the GPU has, for others. 0: there is not, or the driver has
  // none.
  uint64_t allocate(GpuContext& context, const GpuUuid& gpu, uint64_t bytes);
  void free(GpuContext& context, const GpuUuid& gpu, uint64_t address, uint64_t bytes);

  // What free() was called for so far.
  using Freed = Bytes;
  Freed freed() const;
  // The driver had too little for these: has guests give up what they have of those GPUs, and waits
  // for loads that are at work with it, half a minute at most. False: nothing has been freed there
  // since freed() was `before`, so that there is no use in another attempt.
  bool reclaim(const std::vector<Claim>& claims, const Freed& before);

 private:
  std::mutex guests_mutex_;
  std::set<Guest*> guests_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  Bytes claimed_, admitted_, in_use_;
  Freed freed_;
};

}  // namespace phos
