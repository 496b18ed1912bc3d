#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""How fast phos writes and reads pages files, against fio on the same file system.

Taking turns, into and from a directory that the user names: phos (image_bench), which hashes what it
writes or not (as the GPU has done so), and fio with io_uring, O_DIRECT, requests of the same size
and as many in flight, both until the file is durable (fsync); then phos and fio read the very same
file, from the disk. fio runs twice each time: with memory as it takes it, and with large pages, as
phos has where there are any; for these /proc/sys/vm/nr_hugepages is raised for as long as fio runs.

A ratio is that of one round: phos's speed by fio's.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HUGE = '/proc/sys/vm/nr_hugepages'
# As phos does: WriteQueue::kRequestBytes and kDepth; a buffer of the pool, and reader_threads().
WRITE = {'bs': '4m', 'iodepth': '32'}
READ = {'bs': '32m', 'iodepth': '4'}


def output(command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            check=False)
    if result.returncode:
        sys.exit(f'image_io: {" ".join(command)}: {result.stderr or result.stdout}')
    return result.stdout


class HugePages:
    """So many bytes of them."""

    def __init__(self, size):
        self.pages = size >> 21

    def __enter__(self):
        with open(HUGE) as f:
            self.before = int(f.read())
        with open('/proc/sys/vm/compact_memory', 'w') as f:
            f.write('1')
        if self.set(self.before + self.pages) < self.before + self.pages:
            self.set(self.before)
            sys.exit(f'image_io: there are no {self.pages} large pages to be had')

    def __exit__(self, *_):
        self.set(self.before)

    @staticmethod
    def set(pages):
        """How many there are then."""
        with open(HUGE, 'w') as f:
            f.write(str(pages))
        with open(HUGE) as f:
            return int(f.read())


class Bench:
    def __init__(self, options, directory):
        self.options = options
        self.directory = directory
        self.images = os.path.join(directory, 'images')
        self.image = os.path.join(self.images, 'phos-pages-1-0.img')
        self.file = os.path.join(directory, 'fio')
        self.tool = os.path.join(options.build, 'test', 'image_bench')
        self.size = options.gib << 30

    def clean(self):
        shutil.rmtree(self.images, ignore_errors=True)
        os.mkdir(self.images, 0o700)
        if os.path.exists(self.file):
            os.remove(self.file)

    def phos(self, what, *args):
        """GB/s."""
        if what == 'read':
            self.cool()
        else:
            self.clean()
        command = [self.tool, what, self.images, '--mib', str(self.options.gib << 10), *args]
        result = json.loads(output(command))
        return result['bytes'] / result['seconds'] / 1e9

    def fio(self, what, huge):
        """GB/s."""
        if what == 'read':
            self.cool()
            # Behind the header, so that both read the same bytes.
            where = [f'--filename={self.image}', '--offset=64k', '--rw=read']
            settings = READ
        else:
            self.clean()
            where = [f'--filename={self.file}', '--rw=write', '--end_fsync=1',
                     f'--fallocate={self.options.fallocate}']
            settings = WRITE
        command = ['fio', '--name=phos', '--ioengine=io_uring', '--direct=1',
                   '--scramble_buffers=0', f'--size={self.size}', '--output-format=json',
                   '--iomem=' + ('mmaphuge' if huge else 'malloc'), *where,
                   *(f'--{k}={v}' for k, v in settings.items())]
        if huge:
            with HugePages(512 << 20):
                text = output(command)
        else:
            text = output(command)
        job = json.loads(text[text.index('{'):])['jobs'][0]
        return job['read' if what == 'read' else 'write']['io_bytes'] / job['job_runtime'] / 1e6

    def cool(self):
        """The file that is read is not in the page cache."""
        fd = os.open(self.image, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def summary(values, digits=2):
    return (f'{statistics.median(values):.{digits}f} '
            f'({min(values):.{digits}f} - {max(values):.{digits}f})')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('directory', help='where to write; it needs twice the size')
    parser.add_argument('--gib', type=int, default=4, help='size of a file (%(default)s)')
    parser.add_argument('--runs', type=int, default=5, help='(%(default)s)')
    parser.add_argument('--fallocate', choices=('native', 'none'), default='native',
                        help='does fio take the disk space before its time begins? (%(default)s)')
    parser.add_argument('--build', default=os.path.join(REPO, 'build'))
    options = parser.parse_args()
    if not shutil.which('fio'):
        sys.exit('image_io: there is no fio to compare with; install it (Debian: fio)')
    if os.geteuid():
        sys.exit('image_io: only root may make large pages, which phos is compared with too')
    with tempfile.TemporaryDirectory(prefix='phos-bench-', dir=options.directory) as directory:
        bench = Bench(options, directory)
        # The last one leaves the file that is read.
        ways = [('fio writes', lambda: bench.fio('write', False)),
                ('fio writes, large pages', lambda: bench.fio('write', True)),
                ('phos writes, hashing too', lambda: bench.phos('write', '--hash')),
                ('phos writes', lambda: bench.phos('write')),
                ('fio reads', lambda: bench.fio('read', False)),
                ('fio reads, large pages', lambda: bench.fio('read', True)),
                ('phos reads', lambda: bench.phos('read'))]
        found = {name: [] for name, _ in ways}
        for _ in range(options.runs):
            for name, way in ways:
                found[name].append(way())
                print(f'  {name}: {found[name][-1]:.2f} GB/s', flush=True)
        print('\n| what | GB/s | of fio | of fio with large pages |\n|---|---|---|---|')
        for name, values in found.items():
            other = 'fio reads' if ' reads' in name else 'fio writes'
            ratios = [summary([a / b for a, b in zip(values, found[against])])
                      for against in (other, other + ', large pages')]
            print(f'| {name} | {summary(values)} | {" | ".join(ratios)} |')


if __name__ == '__main__':
    main()
