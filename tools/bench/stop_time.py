#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""How long a working process stands still for a dump, and how soon it works again after a restore.

Starts a workload (app.py) and dumps it with stock criu, in turns; those variants that have NVIDIA's
driver move its GPU memory have a process of their own, since memory that the driver has restored
cannot be copied while it runs. The process whose turn it is not is stopped.

  phos      phos pre-dump, some work, `criu dump` on top of it; `read_ahead = gpu`
  cold      `criu dump` without a pre-dump
  snapshot  as phos, with --leave-running
  host      as phos, with `read_ahead = host`
  host-snapshot  as snapshot, with that
  driver    `criu dump` with `release = off`: GPU memory goes through NVIDIA's driver
  nvidia    `criu dump` with NVIDIA's plugin (--nvidia-plugin-dir, cuda-checkpoint in PATH)

Needs a real GPU, root and PyTorch; transformers for llama.

  stopped   from the workload's last unit of work before the dump until criu has ended (the process
            is gone, and its images complete) or, snapshot, until the next unit of work
  gpu       of that, what phos needs for the GPUs: from closing the gate until the driver's
            checkpoint is done and phos's images are written (`phos show`)
  first     from the start of `criu restore -d` until the next unit of work
"""
import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from live_copy import HERE, REPO, Workload, summary

PR_SET_CHILD_SUBREAPER = 36
# The phosd that a variant has, and its settings.
SETTINGS = {
    'phos': 'release = auto\nread_ahead = gpu\n',
    'driver': 'release = off\n',
    'host': 'release = auto\nread_ahead = host\n',
}
BY_DRIVER = ('driver', 'nvidia')
PRE_DUMPED = ('phos', 'snapshot', 'host', 'host-snapshot')


def phosd_of(variant):
    name = variant.removesuffix('-snapshot')
    return name if name in SETTINGS else 'phos'


def wait_for(condition, what, limit=180):
    end = time.time() + limit
    while not condition():
        if time.time() > end:
            sys.exit(f'stop_time: waited {limit} s for {what}')
        time.sleep(0.002)


def gone(pid):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    return not os.path.exists(f'/proc/{pid}')


class Workloads:
    """One process for each group of variants, of which one at a time runs."""

    def __init__(self, directory, argv, stack):
        self.directory, self.argv, self.stack = directory, argv, stack
        self.running = {}

    def turn_of(self, variant):
        group = variant if variant in BY_DRIVER else 'phos'
        for other in self.running.values():
            os.killpg(other.process.pid, signal.SIGSTOP)
        if group not in self.running:
            directory = os.path.join(self.directory, group)
            os.mkdir(directory)
            self.running[group] = self.stack.enter_context(Workload(directory, *self.argv))
        workload = self.running[group]
        os.killpg(workload.process.pid, signal.SIGCONT)
        count = len(workload.points())
        wait_for(lambda: len(workload.points()) > count + 1, 'work')
        return workload


class Bench:
    def __init__(self, options, directory):
        self.options = options
        self.directory = directory
        self.phos = os.path.join(options.build, 'bin', 'phos')
        self.criu = os.path.join(options.build, 'criu', 'criu')
        self.plugins = os.path.join(options.build, 'lib', 'criu')

    def environment(self, variant):
        phosd = phosd_of(variant)
        run = os.path.join(self.directory, f'run-{phosd}')
        if not os.path.exists(run):
            os.mkdir(run, 0o700)
            with open(os.path.join(run, 'phosd.conf'), 'w') as f:
                f.write(f'pool_size = {self.options.pool}\n{SETTINGS[phosd]}')
        return dict(os.environ, PHOS_RUN_DIR=run)

    def run(self, argv, variant, log=None):
        result = subprocess.run(argv, env=self.environment(variant), stdin=subprocess.DEVNULL,
                                capture_output=True, text=True, timeout=300)
        if result.returncode:
            text = open(log, errors='replace').read() if log and os.path.exists(log) else ''
            sys.exit(f'stop_time: {" ".join(argv)}: {result.stderr}\n{text[-3000:]}')
        return result.stdout

    def one(self, variant, workload):
        images = tempfile.mkdtemp(prefix='images-', dir=self.directory)
        pid = workload.process.pid
        previous = []
        snapshot = variant.endswith('snapshot')
        if variant in PRE_DUMPED:
            self.run([self.phos, 'pre-dump', '--gpu-only', '-t', str(pid), '-D', images + '/0'],
                     variant)
            previous = ['--prev-images-dir', '../0']
            time.sleep(1)
        os.mkdir(images + '/1', 0o700)
        plugins = self.options.nvidia_plugin_dir if variant == 'nvidia' else self.plugins
        common = ['-D', images + '/1', '-L', plugins, '-v3', '--shell-job']
        log = images + '/1/dump.log'
        before = time.time()
        leave = ['--leave-running'] if snapshot else []
        self.run([self.criu, 'dump', '-t', str(pid), *previous, *common, *leave, '-o', 'dump.log'],
                 variant, log)
        ended = time.time()
        times = {}
        if snapshot:
            wait_for(lambda: workload.points()[-1][0] > ended, 'work after the snapshot')
        points = workload.points()
        times['stopped'] = max((t1 - t0 for (t0, _), (t1, _) in zip(points, points[1:])
                                if t1 > before), default=0)
        times['gpu'], parts = self.gpu_time(images + '/1', variant)
        if not snapshot:
            times['stopped'] = ended - points[-1][0]
            wait_for(lambda: gone(pid), 'the process to be gone')
            count = len(points)
            log = images + '/1/restore.log'
            start = time.time()
            self.run([self.criu, 'restore', '-d', *common, '-o', 'restore.log'], variant, log)
            times['restore'] = time.time() - start
            wait_for(lambda: len(workload.points()) > count, 'work after the restore')
            times['first'] = workload.points()[count][0] - start
        times['lines'] = parts + [line for name in ('dump.log', 'restore.log')
                          for line in self.phos_lines(images + '/1/' + name)]
        if self.options.logs:
            for name in ('dump.log', 'restore.log', 'stats-dump', 'stats-restore'):
                if os.path.exists(images + '/1/' + name):
                    shutil.copy(images + '/1/' + name,
                                os.path.join(self.options.logs, f'{variant}-{name}'))
        shutil.rmtree(images)
        return times

    def gpu_time(self, images, variant):
        if variant == 'nvidia':
            return 0, []
        process, = json.loads(self.run([self.phos, 'show', '--json', images], variant))['processes']
        timings = process['timings']
        paths = {}
        for a in process['allocations']:
            paths[a['path']] = paths.get(a['path'], 0) + a['size'] / (1 << 20)
        return timings['stopped_us'] / 1e6 if 'stopped_us' in timings else 0, [
            ', '.join(f'{k[:-3]} {v / 1e3:.1f} ms' for k, v in timings.items()) + '; ' +
            ', '.join(f'{size:.0f} MiB {path}' for path, size in paths.items())]

    @staticmethod
    def phos_lines(path):
        if not os.path.exists(path):
            return []
        with open(path, errors='replace') as f:
            return [line.rstrip() for line in f if re.search(r'phos: .*( ms|goes through)', line)]

    def stop_daemons(self):
        for variant in SETTINGS:
            stop = [self.phos, 'daemon', 'stop']  # refused while a session is ending
            wait_for(lambda: subprocess.run(stop, env=self.environment(variant),
                                            capture_output=True).returncode == 0, 'phosd to end')
            own = os.path.join(self.directory, f'run-{variant}', 'bpf')  # until phosd has left
            begin = time.time()
            wait_for(lambda: not os.path.ismount(own), 'phosd to be gone')
            if self.options.verbose:
                print(f'    phosd was gone after {time.time() - begin:.1f} s', flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.path.join(REPO, 'build'))
    parser.add_argument('--directory', default='/dev/shm', help='where images go (%(default)s)')
    parser.add_argument('--nvidia-plugin-dir', help='directory with cuda_plugin.so alone')
    parser.add_argument('--variants', nargs='+', default=['phos', 'cold', 'snapshot', 'driver'])
    parser.add_argument('--pool', default='40G', help='phosd\'s pool (%(default)s)')
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--verbose', action='store_true', help='phosd\'s own account of its time')
    parser.add_argument('--logs', help="keep criu's last logs and statistics of each variant there")
    parser.add_argument('--json', action='store_true')
    parser.add_argument('--workload', nargs='+', default=['llama', '40'], help='of app.py')
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stop_time: terminated'))
    directory = tempfile.mkdtemp(prefix='phos-bench-', dir=options.directory)
    bench = Bench(options, directory)
    results = {v: [] for v in options.variants}
    try:
        with contextlib.ExitStack() as stack:
            workloads = Workloads(directory, options.workload, stack)
            for _ in range(options.runs):
                for variant in options.variants:
                    workload = workloads.turn_of(variant)
                    time.sleep(1)
                    times = bench.one(variant, workload)
                    lines = times.pop('lines')
                    print(f'  {variant}: ' + ', '.join(f'{k} {v:.3f} s' for k, v in times.items()),
                          flush=True)
                    if options.verbose:
                        print('\n'.join('    ' + line for line in lines), flush=True)
                    results[variant].append(times)
    finally:
        bench.stop_daemons()
        shutil.rmtree(directory)
    for variant, times in results.items():
        for step in times[0] if times else []:
            print(f'{variant:9} {step:8} s {summary([t[step] for t in times])}')
    if options.json:
        print(json.dumps(results))


if __name__ == '__main__':
    main()
