#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""The live copy: how fast it is against plain DMA, and how much it slows the application down.

Starts a workload (app.py) and pre-dumps it again and again. Needs a real GPU, root, PyTorch and, for
llama, transformers; phosd gets a pool that holds the whole process.

  speed     round 1 of `phos pre-dump --gpu-only` (every page, no parent), until all is in host
            memory, taking turns with plain cuMemcpyDtoHAsync (copy_bench)
  slowdown  units of work a second while the copy engine copies as fast as it can (copy_bench
            --serve), without a pause, against the windows of the same length before and after it,
            in which nothing is copied; and such windows among themselves, which is the noise. Then
            the same with whole pre-dumps one after the other, which mostly write
  attach    how long the agent takes to get into a process and list its allocations (agent_tool)
"""
import argparse
import bisect
import contextlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HERE = os.path.dirname(os.path.abspath(__file__))


def summary(values):
    return f'{statistics.median(values):9.3f} ({min(values):.3f} - {max(values):.3f})'


class Workload:
    """app.py; ends with the `with` block, or when this process does."""

    def __init__(self, directory, name, *args):
        self.rates = os.path.join(directory, f'{name}.rate')
        with open(self.rates, 'w') as out:
            self.process = subprocess.Popen(
                [sys.executable, os.path.join(HERE, 'app.py'), name, *args], stdout=out,
                stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.time() + 120
        while len(self.points()) < 20:
            if self.process.poll() is not None or time.time() > deadline:
                self.stop()
                sys.exit(f'live_copy: {name} does not run ({self.process.returncode})')
            time.sleep(0.1)
        time.sleep(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def points(self):
        with open(self.rates) as f:
            return [tuple(map(float, line.split()[1:])) for line in f.read().split('\n')[:-1]]

    def stop(self):
        # By its number: it may have been dumped and restored, and then is no child of ours.
        try:
            os.kill(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def units_until(points, when):
    times = [t for t, _ in points]
    i = bisect.bisect(times, when)
    if i == 0 or i == len(points):
        return None
    (t0, u0), (t1, u1) = points[i - 1], points[i]
    return u0 + (u1 - u0) * (when - t0) / (t1 - t0)


def rate(points, window):
    begin, end = window
    first, last = units_until(points, begin), units_until(points, end)
    return (last - first) / (end - begin)


class Bench:
    def __init__(self, options, directory):
        self.options = options
        self.directory = directory
        run = os.path.join(directory, 'run')
        os.mkdir(run, 0o700)
        with open(os.path.join(run, 'phosd.conf'), 'w') as f:
            f.write(f'pool_size = {options.pool}\n')
            if options.max_slowdown is not None:
                f.write(f'max_slowdown = {options.max_slowdown}\n')
        self.env = dict(os.environ, PHOS_RUN_DIR=run)
        self.phos = os.path.join(options.build, 'bin', 'phos')
        self.copy_bench = os.path.join(options.build, 'test', 'copy_bench')
        self.agent_tool = os.path.join(options.build, 'test', 'agent_tool')

    def pre_dump(self, pid, *args):
        images = os.path.join(self.directory, 'images')
        shutil.rmtree(images, ignore_errors=True)
        result = subprocess.run([self.phos, 'pre-dump', '--gpu-only', '-t', str(pid), '-D', images,
                                 '--json', *args], env=self.env, capture_output=True, text=True,
                                timeout=180)
        if result.returncode:
            sys.exit(f'live_copy: phos pre-dump failed: {result.stderr}')
        return json.loads(result.stdout)

    def dma(self):
        out = subprocess.run([self.copy_bench, '--mib', '4096', '--rounds', '3', '--no-load'],
                             capture_output=True, text=True, check=True).stdout
        return json.loads(out)['alone_gb_per_s']['dma']['median']

    def stop_daemon(self):
        subprocess.run([self.phos, 'daemon', 'stop'], env=self.env, capture_output=True)


def speed(bench, runs):
    ratios, speeds = [], []
    with Workload(bench.directory, 'idle', str(bench.options.gib)) as work:
        for i in range(runs + 1):
            first = bench.pre_dump(work.process.pid, '--max-rounds', '1')['rounds'][0]
            copy = first['copied_bytes'] / first['copy_microseconds'] / 1e3
            dma = bench.dma()
            print(f'  copied {first["copied_bytes"] / 1e9:.1f} GB at {copy:.1f} GB/s, DMA {dma:.1f} '
                  f'GB/s, written after {first["microseconds"] / 1e6:.1f} s', flush=True)
            if i:  # the first one makes the pool
                speeds.append(copy)
                ratios.append(copy / dma)
    print(f'speed      {bench.options.gib} GiB: GB/s {summary(speeds)}, of DMA {summary(ratios)}',
          flush=True)


class Engine:
    """The copy engine on memory of its own."""

    def __init__(self, bench, arguments):
        command = [bench.copy_bench, '--serve', '--mib', '2048', *arguments]
        if bench.options.max_slowdown is not None:
            command += ['--slowdown', str(bench.options.max_slowdown / 100)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        if self.process.stdout.readline() != 'ready\n':
            sys.exit('live_copy: copy_bench does not run')

    def copy(self, seconds):
        self.process.stdin.write(f'{seconds}\n')
        self.process.stdin.flush()
        return int(self.process.stdout.readline().split()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def pre_dumps(bench, pid, seconds):
    end = time.time() + seconds
    copied = 0
    while time.time() < end:
        copied += sum(r['copied_bytes'] for r in bench.pre_dump(pid)['rounds'])
    return copied


def nothing(seconds):
    time.sleep(seconds)
    return 0


def compare(work, bench, ways):
    """Percent that the workload loses while each of `ways` copies: its median and quartiles."""
    quiet, busy = [], []
    for _ in range(bench.options.windows):
        for _, copy in ways:
            begin = time.time()
            time.sleep(bench.options.window)
            middle = time.time()
            copied = copy(bench.options.window)
            quiet.append((begin, middle))
            busy.append((middle, time.time(), copied))
    begin = time.time()
    time.sleep(bench.options.window)
    quiet.append((begin, time.time()))
    time.sleep(0.3)
    points = work.points()
    loss = [100 * (1 - 2 * rate(points, b[:2]) / (rate(points, before) + rate(points, after)))
            for b, before, after in zip(busy, quiet, quiet[1:])]
    for i, (what, _) in enumerate(ways):
        mine = sorted(loss[i::len(ways)])
        low, median, high = statistics.quantiles(mine, n=4)
        from_, to = median_interval(mine)
        volume = statistics.median(c / (e - b) / 1e9 for b, e, c in busy[i::len(ways)])
        print(f'slowdown   {what}: percent {median:6.2f}, 95 % sure of {from_:.2f} - {to:.2f} '
              f'(quartiles {low:.2f} - {high:.2f}, {len(mine)} windows of {bench.options.window} s),'
              f' copying {volume:.1f} GB/s', flush=True)


def median_interval(ordered):
    """Where the median of what `ordered` samples is, with 95 percent (by ranks, a binomial's)."""
    n = len(ordered)
    reach = 0.98 * n ** 0.5
    return ordered[max(0, math.floor(n / 2 - reach))], ordered[min(n - 1, math.ceil(n / 2 + reach))]


def slowdown(bench, name, args):
    what = ' '.join([name, *args])
    with Workload(bench.directory, name, *args) as work, contextlib.ExitStack() as engines:
        ways = [(f'{what}, nothing (noise)', nothing)]
        for arguments in bench.options.engine or ['']:
            engine = engines.enter_context(Engine(bench, arguments.split()))
            engine.copy(0.5)
            ways.append((f'{what}, engine {arguments}', engine.copy))
        pid = work.process.pid
        if bench.options.whole:
            bench.pre_dump(pid)
            ways.append((f'{what}, pre-dumps', lambda seconds: pre_dumps(bench, pid, seconds)))
        compare(work, bench, ways)


def attach(bench, runs):
    for count in (300, 3000, 20000):
        attached, listed = [], []
        with Workload(bench.directory, 'allocations', str(count)) as work:
            for _ in range(runs + 1):
                out = subprocess.run([bench.agent_tool, str(work.process.pid), 'enumerate', 'unload'],
                                     capture_output=True, text=True, check=True)
                attached.append(float(re.search(r'attached in ([0-9.]+)', out.stderr)[1]))
                listed.append(float(re.search(r'addresses in ([0-9.]+)', out.stderr)[1]))
                found = out.stdout.count(' 2097152 ')
                if found < count:
                    sys.exit(f'live_copy: the agent lists {found} of {count} allocations')
        print(f'attach     {count} allocations: attach ms {summary(attached[1:])}, list ms '
              f'{summary(listed[1:])}', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.path.join(REPO, 'build'))
    parser.add_argument('--directory', default='/dev/shm', help='where images go (%(default)s)')
    parser.add_argument('--gib', type=int, default=26, help='of the speed test (%(default)s)')
    parser.add_argument('--pool', default='40G', help='phosd\'s pool (%(default)s)')
    parser.add_argument('--max-slowdown', type=float, help='phosd\'s, percent')
    parser.add_argument('--engine', nargs='+', metavar='OPTIONS',
                        help="of copy_bench, several: --engine '--pieces 2' '--pieces 8'")
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--window', type=float, default=0.5, help='seconds, at least (%(default)s)')
    parser.add_argument('--windows', type=int, default=20, help='of slowdown (%(default)s)')
    parser.add_argument('--whole', action='store_true', help='slowdown by whole pre-dumps, too')
    parser.add_argument('--only', nargs='+', default=['attach', 'speed', 'llama', 'train', 'storm'])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('live_copy: terminated'))
    directory = tempfile.mkdtemp(prefix='phos-bench-', dir=options.directory)
    bench = Bench(options, directory)
    try:
        if 'attach' in options.only:
            attach(bench, options.runs)
        if 'speed' in options.only:
            speed(bench, options.runs)
        for name, args in (('llama', ['13']), ('train', []), ('storm', ['4'])):
            if name in options.only:
                slowdown(bench, name, args)
    finally:
        bench.stop_daemon()
        shutil.rmtree(directory)


if __name__ == '__main__':
    main()
