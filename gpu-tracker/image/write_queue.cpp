// SPDX-License-Identifier: GPL-2.0-only
#include "gpu-tracker/image/write_queue.h"

#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <system_error>

#include "gpu-tracker/base/log.h"
#include "gpu-tracker/base/unique_fd.h"

namespace phos {
namespace {

// One call of pwrite moves less than 2 GiB.
constexpr uint64_t kMaxTransfer = uint64_t{1} << 30;

bool is_direct(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && (flags & O_DIRECT);
}

// Several threads may do this to one file at once.
bool leave_direct(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0;
}

Result<void> written(int code) {
  if (code) return Error::from_errno(code, "write");
  return {};
}

}  // namespace

int write_all(int fd, uint64_t offset, const void* data, uint64_t bytes) {
  auto* from = static_cast<const char*>(data);
  while (bytes) {
    const bool direct = is_direct(fd);
    const ssize_t n = pwrite(fd, from, std::min(bytes, kMaxTransfer), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EINVAL && direct && leave_direct(fd)) continue;
    if (n <= 0) return n ? errno : EIO;
    from += n;
    offset += static_cast<uint64_t>(n);
    bytes -= static_cast<uint64_t>(n);
  }
  return 0;
}

struct WriteQueue::Ring {
  ~Ring() {
    if (made) io_uring_queue_exit(&ring);
  }

  io_uring ring{};
  bool made = false;
  UniqueFd word;  // eventfd: there is something in submitted_, or ending_
};

// What one submit() is about. Its requests are told apart on the queue's thread only.
struct WriteQueue::Write {
  int fd;
  Done done;
  uint64_t left;  // requests
  int code = 0;   // of the first that failed
};

struct WriteQueue::Request {
  Write* write;
  uint64_t offset;
  const char* data;
  uint64_t bytes;
  bool direct = false;  // when it was started
};

WriteQueue::WriteQueue(unsigned depth) : depth_(depth) {}

std::unique_ptr<WriteQueue> WriteQueue::create(unsigned depth) {
  depth = std::max(depth, 1u);
  std::unique_ptr<WriteQueue> queue(new WriteQueue(depth));
  auto synchronous = [&](int code) {
    log(LogLevel::kDebug, "image", "writes are not made by io_uring: %s", strerror(code));
    queue->ring_.reset();
    return std::move(queue);
  };
  queue->ring_ = std::make_unique<Ring>();
  Ring& r = *queue->ring_;
  // One more for wait_for_word().
  if (int code = -io_uring_queue_init(depth + 1, &r.ring, 0)) return synchronous(code);
  r.made = true;
  io_uring_probe* probe = io_uring_get_probe_ring(&r.ring);  // Linux 5.6, as what it looks for
  const bool can_write = probe && io_uring_opcode_supported(probe, IORING_OP_WRITE);
  io_uring_free_probe(probe);
  if (!can_write) return synchronous(EOPNOTSUPP);
  r.word.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!r.word) return synchronous(errno);
  queue->wait_for_word();
  if (int n = io_uring_submit(&r.ring); n < 0) return synchronous(-n);
  try {
    queue->thread_ = std::thread([q = queue.get()] { q->run(); });
  } catch (const std::system_error& e) {
    return synchronous(e.code().value());
  }
  return queue;
}

WriteQueue::~WriteQueue() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> hold(mutex_);
    ending_ = true;
  }
  eventfd_write(ring_->word.get(), 1);
  thread_.join();
}

void WriteQueue::submit(int fd, uint64_t offset, const void* data, uint64_t bytes, Done done) {
  if (!ring_ || bytes == 0) {
    done(written(write_all(fd, offset, data, bytes)));
    return;
  }
  auto* write = new Write{fd, std::move(done), (bytes + kRequestBytes - 1) / kRequestBytes};
  for (auto* from = static_cast<const char*>(data); bytes;) {
    const uint64_t n = std::min(bytes, kRequestBytes);
    auto* request = new Request{write, offset, from, n};
    {
      std::unique_lock<std::mutex> hold(mutex_);
      changed_.wait(hold, [&] { return in_flight_ < depth_; });
      in_flight_++;
      submitted_.push_back(request);
    }
    eventfd_write(ring_->word.get(), 1);
    offset += n;
    from += n;
    bytes -= n;
  }
}

void WriteQueue::drain() {
  std::unique_lock<std::mutex> hold(mutex_);
  changed_.wait(hold, [&] { return in_flight_ == 0; });
}

void WriteQueue::run() {
  for (;;) {
    std::deque<Request*> fresh;
    {
      std::lock_guard<std::mutex> hold(mutex_);
      fresh.swap(submitted_);
      if (ending_ && in_flight_ == 0) return;
    }
    for (Request* request : fresh) start(request);
    const int n = io_uring_submit_and_wait(&ring_->ring, 1);
    // The kernel is short of memory, for one: what it has not taken stays in the ring.
    if (n < 0 && n != -EINTR) poll(nullptr, 0, 1);
    io_uring_cqe* cqe;
    while (io_uring_peek_cqe(&ring_->ring, &cqe) == 0) {
      auto* request = static_cast<Request*>(io_uring_cqe_get_data(cqe));
      const int result = cqe->res;
      io_uring_cqe_seen(&ring_->ring, cqe);
      if (request) {
        complete(request, result);
      } else {
        wait_for_word();
      }
    }
  }
}

// The ring has room: for depth_ requests and this.
void WriteQueue::wait_for_word() {
  eventfd_t count;
  eventfd_read(ring_->word.get(), &count);
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
  io_uring_prep_poll_add(sqe, ring_->word.get(), POLLIN);
  io_uring_sqe_set_data(sqe, nullptr);
}

void WriteQueue::start(Request* request) {
  request->direct = is_direct(request->write->fd);
  io_uring_sqe* sqe = io_uring_get_sqe(&ring_->ring);
  io_uring_prep_write(sqe, request->write->fd, request->data, static_cast<unsigned>(request->bytes),
                      request->offset);
  io_uring_sqe_set_data(sqe, request);
}

void WriteQueue::complete(Request* request, int result) {
  if (result == -EINTR || result == -EAGAIN) return start(request);
  if (result == -EINVAL && request->direct && leave_direct(request->write->fd)) {
    return start(request);
  }
  if (result <= 0) return end(request, result ? -result : EIO);
  const auto n = static_cast<uint64_t>(result);
  request->offset += n;
  request->data += n;
  request->bytes -= n;
  if (request->bytes) return start(request);
  end(request, 0);
}

void WriteQueue::end(Request* request, int code) {
  Write* const write = request->write;
  delete request;
  if (!write->code) write->code = code;
  if (--write->left == 0) {
    write->done(written(write->code));
    delete write;
  }
  std::lock_guard<std::mutex> hold(mutex_);
  in_flight_--;
  changed_.notify_all();
}

}  // namespace phos
