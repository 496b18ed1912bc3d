#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Dump and restore of one CUDA process by stock criu: with phos, and with NVIDIA's plugin beside it.

The two take turns in one run, on the same program, the same directory and the same criu; what is
compared is the ratio within each pair. Needs a real GPU, root, and for the comparison NVIDIA's
cuda_plugin.so (criu's plugins/cuda) and cuda-checkpoint.

  dump     from the start of `criu dump` until it has ended and the process is gone
  restore  from the start of `criu restore -d` until it has ended
  resumed  from the start of `criu restore -d` until the program's first line of output
"""
import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
STEPS = ('dump', 'restore', 'resumed')


def wait_for(condition, what, limit=120):
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            sys.exit(f'dump_restore: waited {limit} s for {what}')
        time.sleep(0.001)


def reap():
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def one_run(options, criu, plugin_dir, program):
    directory = tempfile.mkdtemp(prefix='phos-bench-', dir=options.directory)
    images = os.path.join(directory, 'images')
    os.mkdir(images, 0o700)
    output = os.path.join(directory, 'output')
    with open(output, 'w') as out:
        target = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=subprocess.STDOUT, start_new_session=True)

    def size():
        return os.path.getsize(output)

    def text():
        with open(output) as f:
            return f.read()
    wait_for(lambda: 'tick 5 ' in text(), 'tick 5')
    times = {}
    common = ['-D', images, '-L', plugin_dir, '-v1']

    def run(command, *args):
        argv = [criu, command, *args, *common, '-o', f'{command}.log']
        result = subprocess.run(argv, stdin=subprocess.DEVNULL)
        if result.returncode:
            log = open(os.path.join(images, f'{command}.log'), errors='replace').read()
            sys.exit(f'dump_restore: {" ".join(argv)} failed:\n{log[-3000:]}')
    start = time.monotonic()
    run('dump', '-t', str(target.pid))
    target.wait()
    times['dump'] = time.monotonic() - start
    wait_for(lambda: reap() or not os.path.exists(f'/proc/{target.pid}'), 'the pid to be free')
    before = size()
    start = time.monotonic()
    run('restore', '-d')
    times['restore'] = time.monotonic() - start
    wait_for(lambda: size() > before, 'output of the restored process')
    times['resumed'] = time.monotonic() - start
    os.kill(target.pid, signal.SIGKILL)
    wait_for(lambda: reap() or not os.path.exists(f'/proc/{target.pid}'), 'the process to die')
    if 'WRONG' in text():
        sys.exit('dump_restore: the restored process computed something wrong')
    shutil.rmtree(directory)
    return times


def summary(values):
    return (f'{statistics.median(values):8.3f} ({min(values):.3f} - {max(values):.3f})')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--build', default=os.path.join(REPO, 'build'))
    parser.add_argument('--criu', help='stock criu (default: of the build directory)')
    parser.add_argument('--nvidia-plugin-dir', help='directory with cuda_plugin.so alone')
    parser.add_argument('--directory', default='/dev/shm', help='where images go (%(default)s)')
    parser.add_argument('--mib', type=int, nargs='+', default=[64, 1024, 8192])
    parser.add_argument('--runs', type=int, default=5)
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    criu = options.criu or os.path.join(options.build, 'criu', 'criu')
    variants = {'phos': os.path.join(options.build, 'lib', 'criu')}
    if options.nvidia_plugin_dir:
        if not shutil.which('cuda-checkpoint'):
            sys.exit('dump_restore: cuda-checkpoint is not in PATH; NVIDIA\'s plugin needs it')
        variants['nvidia'] = options.nvidia_plugin_dir
    try:
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # subreaper: restored processes become ours
    except OSError:
        pass
    program = os.path.join(options.build, 'test', 'runtime_counter')
    results = []
    for mib in options.mib:
        times = {v: [] for v in variants}
        for _ in range(options.runs):
            for variant, plugin_dir in variants.items():
                times[variant].append(one_run(options, criu, plugin_dir, [program, str(mib)]))
        for step in STEPS:
            row = {'mib': mib, 'step': step}
            for variant in variants:
                row[variant] = [t[step] for t in times[variant]]
            if 'nvidia' in variants:
                row['ratio'] = [b[step] / a[step]
                                for a, b in zip(times['phos'], times['nvidia'])]
            results.append(row)
            if not options.json:
                print(f'{mib:6} MiB  {step:8}', *(f'{v} {summary(row[v])} s ' for v in variants),
                      f'nvidia/phos {summary(row["ratio"])}' if 'ratio' in row else '', flush=True)
    if options.json:
        json.dump(results, sys.stdout)


if __name__ == '__main__':
    main()
