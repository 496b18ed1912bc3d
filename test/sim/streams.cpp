// SPDX-License-Identifier: GPL-2.0-only
// The engine thread, streams and events.
#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <mutex>
#include <set>

#include "test/sim/engine.h"

struct CUstream_st {
  CUcontext context;
  unsigned flags;
  uint64_t last;  // ticket of the newest work
};

struct CUevent_st {
  CUcontext context;
  unsigned flags;
  bool recorded;
  uint64_t ticket;
  int64_t time_ns;  // written by the engine thread
};

namespace phos_sim {
namespace {

struct Engine {
  std::mutex mutex;
  std::condition_variable work_came, work_done;
  std::deque<std::function<CUresult()>> queue;
  uint64_t submitted = 0, done = 0;
  bool at_work = false;
  CUresult error = CUDA_SUCCESS;
  std::set<CUstream> streams;
  std::set<CUevent> events;
};

Engine& engine() {
  static Engine& e = *new Engine;
  return e;
}

void do_next(Engine& e, std::unique_lock<std::mutex>& hold) {
  auto work = std::move(e.queue.front());
  e.queue.pop_front();
  e.at_work = true;
  bool dead = e.error != CUDA_SUCCESS;  // after a fault the context does nothing any more
  hold.unlock();
  CUresult r = dead ? CUDA_SUCCESS : work();
  work = nullptr;
  hold.lock();
  e.at_work = false;
  if (r != CUDA_SUCCESS) e.error = r;
  e.done++;
  e.work_done.notify_all();
  if (!e.queue.empty()) e.work_came.notify_one();
}

bool may_begin(const Engine& e) {
  return !e.queue.empty() && !e.at_work;
}

void* run_engine(void*) {
  pthread_setname_np(pthread_self(), "cuda-EvtHandlr");  // as a thread of the real driver
  Engine& e = engine();
  std::unique_lock<std::mutex> hold(e.mutex);
  for (;;) {
    e.work_came.wait(hold, [&] { return may_begin(e); });
    do_next(e, hold);
  }
  return nullptr;
}

// A GPU works on when all threads of the process are frozen but the one that waits for it: then it
// does the engine's work.
CUresult wait_or_work(Engine& e, std::unique_lock<std::mutex>& hold, uint64_t ticket) {
  constexpr std::chrono::milliseconds kEngineIsFrozen{5};
  while (e.done < ticket) {
    const uint64_t before = e.done;
    e.work_done.wait_for(hold, kEngineIsFrozen, [&] { return e.done >= ticket; });
    if (e.done > before) continue;
    while (e.done < ticket && may_begin(e)) do_next(e, hold);
  }
  return e.error;
}

bool is_default(CUstream stream) {
  return !stream || stream == CU_STREAM_LEGACY || stream == CU_STREAM_PER_THREAD;
}

// The ticket to wait for when synchronising with `stream`. Engine mutex held.
uint64_t last_ticket(CUstream stream) {
  return is_default(stream) ? engine().submitted : stream->last;
}

}  // namespace

bool start_engine() {
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  pthread_t thread;
  bool ok = pthread_create(&thread, nullptr, run_engine, nullptr) == 0;
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  if (ok) pthread_detach(thread);
  return ok;
}

uint64_t submit(CUstream stream, std::function<CUresult()> work) {
  Engine& e = engine();
  std::lock_guard<std::mutex> hold(e.mutex);
  e.queue.push_back(std::move(work));
  uint64_t ticket = ++e.submitted;
  if (!is_default(stream)) stream->last = ticket;
  e.work_came.notify_one();
  return ticket;
}

bool is_done(uint64_t ticket) {
  std::lock_guard<std::mutex> hold(engine().mutex);
  return engine().done >= ticket;
}

CUresult wait_for(uint64_t ticket) {
  Engine& e = engine();
  std::unique_lock<std::mutex> hold(e.mutex);
  return wait_or_work(e, hold, ticket);
}

CUresult wait_for_all() {
  Engine& e = engine();
  std::unique_lock<std::mutex> hold(e.mutex);
  return wait_or_work(e, hold, e.submitted);
}

bool wait_idle(int64_t deadline_ns) {
  Engine& e = engine();
  std::unique_lock<std::mutex> hold(e.mutex);
  auto idle = [&] { return e.done == e.submitted; };
  if (!deadline_ns) {
    e.work_done.wait(hold, idle);
    return true;
  }
  int64_t left = deadline_ns - monotonic_ns();
  return e.work_done.wait_for(hold, std::chrono::nanoseconds(left > 0 ? left : 0), idle);
}

CUresult engine_error() {
  std::lock_guard<std::mutex> hold(engine().mutex);
  return engine().error;
}

CUresult check_stream(CUstream stream) {
  if (is_default(stream)) return CUDA_SUCCESS;
  std::lock_guard<std::mutex> hold(engine().mutex);
  return engine().streams.count(stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

void destroy_streams_of(CUcontext context) {
  Engine& e = engine();
  std::lock_guard<std::mutex> hold(e.mutex);
  std::erase_if(e.streams, [&](CUstream s) {
    if (s->context != context) return false;
    delete s;
    return true;
  });
  std::erase_if(e.events, [&](CUevent v) {
    if (v->context != context) return false;
    delete v;
    return true;
  });
}

namespace {

CUresult check_event(CUevent event) {
  std::lock_guard<std::mutex> hold(engine().mutex);
  return event && engine().events.count(event) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

}  // namespace
namespace {

CUresult synchronize(CUstream stream) {
  if (CUresult r = check_stream(stream)) return r;
  uint64_t ticket;
  {
    std::lock_guard<std::mutex> hold(engine().mutex);
    ticket = last_ticket(stream);
  }
  return wait_for(ticket);
}

CUresult query(CUstream stream) {
  if (CUresult r = check_stream(stream)) return r;
  std::lock_guard<std::mutex> hold(engine().mutex);
  return engine().done >= last_ticket(stream) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

}  // namespace
}  // namespace phos_sim

using namespace phos_sim;

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned int flags, int) {
  PHOS_SIM_API(kContext);
  if (!stream || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  auto* s = new CUstream_st{current_context(), flags, 0};
  std::lock_guard<std::mutex> hold(engine().mutex);
  engine().streams.insert(s);
  *stream = s;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned int flags) {
  PHOS_SIM_API(kContext);
  if (!stream || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  auto* s = new CUstream_st{current_context(), flags, 0};
  std::lock_guard<std::mutex> hold(engine().mutex);
  engine().streams.insert(s);
  *stream = s;
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(engine().mutex);
  if (!engine().streams.erase(stream)) return CUDA_ERROR_INVALID_HANDLE;
  delete stream;  // queued work goes on without it
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuStreamDestroy, cuStreamDestroy_v2);

CUresult cuStreamSynchronize(CUstream stream) {
  PHOS_SIM_API(kContext);
  return synchronize(stream);
}

PHOS_SIM_EXPORT CUresult cuStreamSynchronize_ptsz(CUstream stream) {
  PHOS_SIM_API(kContext);
  return synchronize(per_thread(stream));
}

CUresult cuStreamQuery(CUstream stream) {
  PHOS_SIM_API(kContext);
  return query(stream);
}

PHOS_SIM_EXPORT CUresult cuStreamQuery_ptsz(CUstream stream) {
  PHOS_SIM_API(kContext);
  return query(per_thread(stream));
}

// The engine runs everything in submission order: whatever the event stands for comes first anyway.
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int) {
  PHOS_SIM_API(kContext);
  if (CUresult r = check_stream(stream)) return r;
  return check_event(event);
}

CUresult cuEventCreate(CUevent* event, unsigned int flags) {
  PHOS_SIM_API(kContext);
  if (!event) return CUDA_ERROR_INVALID_VALUE;
  auto* v = new CUevent_st{current_context(), flags, false, 0, 0};
  std::lock_guard<std::mutex> hold(engine().mutex);
  engine().events.insert(v);
  *event = v;
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  PHOS_SIM_API(kContext);
  if (CUresult r = check_event(event)) return r;
  if (CUresult r = check_stream(stream)) return r;
  uint64_t ticket = submit(stream, [event] {
    int64_t now = monotonic_ns();
    std::lock_guard<std::mutex> hold(engine().mutex);
    if (engine().events.count(event)) event->time_ns = now;
    return CUDA_SUCCESS;
  });
  std::lock_guard<std::mutex> hold(engine().mutex);
  event->ticket = ticket;
  event->recorded = true;
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  PHOS_SIM_API(kContext);
  if (CUresult r = check_event(event)) return r;
  return wait_for(event->ticket);
}

CUresult cuEventQuery(CUevent event) {
  PHOS_SIM_API(kContext);
  if (CUresult r = check_event(event)) return r;
  return is_done(event->ticket) ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

CUresult cuEventDestroy(CUevent event) {
  PHOS_SIM_API(kInit);
  std::lock_guard<std::mutex> hold(engine().mutex);
  if (!engine().events.erase(event)) return CUDA_ERROR_INVALID_HANDLE;
  delete event;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuEventDestroy, cuEventDestroy_v2);

CUresult cuEventElapsedTime(float* ms, CUevent start, CUevent end) {
  PHOS_SIM_API(kContext);
  if (!ms) return CUDA_ERROR_INVALID_VALUE;
  if (check_event(start) || check_event(end)) return CUDA_ERROR_INVALID_HANDLE;
  if (!start->recorded || !end->recorded) return CUDA_ERROR_INVALID_HANDLE;
  if (!is_done(start->ticket) || !is_done(end->ticket)) return CUDA_ERROR_NOT_READY;
  std::lock_guard<std::mutex> hold(engine().mutex);
  *ms = static_cast<float>(end->time_ns - start->time_ns) / 1e6f;
  return CUDA_SUCCESS;
}
PHOS_SIM_ALIAS(cuEventElapsedTime, cuEventElapsedTime_v2);
