# SPDX-License-Identifier: GPL-2.0-only
"""What every test tier must leave behind: nothing.

The oracle looks at the machine before and after a tier. A test marks its processes by the
environment variable PHOS_TEST_ID, which children (and restored processes) inherit; what other
people run on the machine is not ours and is left alone.
"""

import os
import re
import select
import signal
import time

KERNEL_TROUBLE = re.compile(
    r"WARNING: |\bBUG:|\bOops\b|general protection fault|kernel BUG|INFO: task .* blocked"
    r"|possible recursive locking|KASAN|UBSAN|unregister_netdevice: waiting")


class Process:
    """One process as /proc shows it; `mine` is None where its environment cannot be read."""

    def __init__(self, pid, marker):
        self.pid = pid
        stat = _read(f"/proc/{pid}/stat")
        fields = stat[stat.rindex(b")") + 2:].split()
        self.state = fields[0].decode()
        self.start_time = int(fields[19])
        self.name = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(
            errors="replace").strip() or stat[stat.index(b"("):stat.rindex(b")") + 1].decode(
                errors="replace")
        try:
            self.mine = marker in _read(f"/proc/{pid}/environ").split(b"\0")
        except PermissionError:
            self.mine = None

    def key(self):
        return (self.pid, self.start_time)


def _read(path):
    with open(path, "rb") as f:
        return f.read()


class Oracle:
    def __init__(self, test_id):
        self.marker = f"PHOS_TEST_ID={test_id}".encode()
        self.stopped = {p.key() for p in self._processes() if p.state in "Tt"}
        self.shm = self._shm_files()
        self.kmsg = self._open_kernel_log()

    def close(self):
        if self.kmsg is not None:
            os.close(self.kmsg)
            self.kmsg = None

    def findings(self):
        """One line for each thing that should not be there. Leftover processes are then killed, so
        that the next tier starts clean."""
        found = []
        self._wait_for_exits(5.0)
        leftovers = []
        for p in self._processes():
            if p.mine:
                leftovers.append(p)
                found.append(f"process {p.pid} is left over in state {p.state}: {p.name}")
            elif p.mine is None and p.state in "Tt" and p.key() not in self.stopped:
                found.append(f"process {p.pid} is left stopped: {p.name}")
        for p in leftovers:
            _kill(p)
        for name in sorted(self._shm_files() - self.shm):
            found.append(f"/dev/shm/{name} is left over")
        found += [f"kernel log: {line}" for line in self._kernel_trouble()]
        return found

    def _processes(self):
        result = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                p = Process(int(entry), self.marker)
            except (FileNotFoundError, ProcessLookupError):
                continue  # it went away meanwhile
            if p.state not in "ZX":
                result.append(p)
        return result

    def _wait_for_exits(self, seconds):
        """A daemon that saw its last client go may need a moment to exit; wait for the event."""
        deadline = time.monotonic() + seconds
        for p in self._processes():
            if not p.mine or p.state in "Tt":
                continue
            try:
                fd = os.pidfd_open(p.pid)
            except ProcessLookupError:
                continue
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            os.close(fd)

    @staticmethod
    def _shm_files():
        try:
            return {name for name in os.listdir("/dev/shm") if name.startswith("phos")}
        except FileNotFoundError:
            return set()

    @staticmethod
    def _open_kernel_log():
        try:
            fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            os.lseek(fd, 0, os.SEEK_END)
            return fd
        except OSError:
            os.close(fd)
            return None

    def _kernel_trouble(self):
        lines = []
        while self.kmsg is not None:
            try:
                record = os.read(self.kmsg, 8192).decode(errors="replace")
            except BrokenPipeError:
                continue  # the ring overwrote records; go on with the oldest it has
            except OSError:
                break  # no more records
            text = record.partition(";")[2].partition("\n")[0]
            if KERNEL_TROUBLE.search(text):
                lines.append(text)
        return lines


def _kill(process):
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        # The pid may have been reused since the scan; the pidfd pins what it is now.
        stat = _read(f"/proc/{process.pid}/stat")
        if int(stat[stat.rindex(b")") + 2:].split()[19]) == process.start_time:
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(5000)
    except (ProcessLookupError, FileNotFoundError):
        pass
    finally:
        os.close(fd)
