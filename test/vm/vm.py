# SPDX-License-Identifier: GPL-2.0-only
"""A QEMU guest with one of Debian's stock kernels, for what the machine's own kernel may lack:
tracking of written pages (criu pre-dump), fentry, modules, or its age. The guest's root is this
machine's, over 9p, so it runs what was built here; /run and /tmp are its own, but for the current
directory.

    python3 test/vm/vm.py [--build B] [--suite SUITE] [--timeout S] [--module M] COMMAND...

as root, runs COMMAND in a shell in the guest, in the current directory, and exits with its exit code.
"""

import argparse
import fcntl
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading

import kernels
from kernels import Missing

# What a root on 9p needs, and criu's feature check beyond it.
BOOT_MODULES = ('virtio_pci', '9pnet_virtio', '9p')
CRIU_MODULES = ('unix_diag', 'inet_diag', 'tcp_diag', 'udp_diag', 'raw_diag', 'netlink_diag',
                'af_packet_diag', 'nf_tables', 'tun', 'veth')
DONE = 'phos-vm: exit '

INIT = '''#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for m in {boot}; do modprobe $m || echo "vm: no module $m"; done
mkdir -p /new
mount -t 9p -o trans=virtio,version=9p2000.L,msize=1048576,cache=loose host /new || sleep 5
mkdir -p /here
mount -o bind /new{directory} /here
mount -t tmpfs tmpfs /new/run
mount -t tmpfs tmpfs /new/tmp
[ -d /new{directory} ] || {{ mkdir -p /new{directory}; mount -o bind /here /new{directory}; }}
umount /here
for m in {criu}; do modprobe $m 2>/dev/null; done
ip link set lo up
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t cgroup2 cgroup /new/sys/fs/cgroup 2>/dev/null
mount -t bpf bpf /new/sys/fs/bpf
cp /command /new/run/command
exec switch_root /new /bin/bash /run/command
'''

COMMAND = '''export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
cd {directory}
( {command} ) </dev/null
echo "{done}$?"
sync
echo o >/proc/sysrq-trigger
sleep 10
'''


def run(*command, **kwargs):
    return subprocess.run(command, check=True, **kwargs)


def module_needs(modules):
    """For each module its file and those that it needs, by the kernel's own list. What is built in
    is not there."""
    needs = {}
    with open(f'{modules}/modules.dep') as f:
        for line in f:
            file, _, others = line.partition(':')
            name = os.path.basename(file).split('.')[0].replace('-', '_')
            needs[name] = [file] + others.split()
    return needs


def copy_module(source, target):
    """Uncompressed, since busybox's modprobe need not know xz."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    opener = lzma.open if source.endswith('.xz') else open
    with opener(source, 'rb') as f, open(target.removesuffix('.xz'), 'wb') as out:
        shutil.copyfileobj(f, out)


def initramfs(directory, kernel, command, modules):
    release = kernel.release
    tree = f'{directory}/initramfs'
    for d in ('bin', 'proc', 'sys', 'dev', f'lib/modules/{release}'):
        os.makedirs(f'{tree}/{d}')
    busybox = next((p for p in ('/bin/busybox', '/usr/bin/busybox') if os.path.exists(p)), None)
    if not busybox:
        raise Missing('no busybox (package busybox-static)')
    shutil.copy(busybox, f'{tree}/bin/busybox')
    for applet in ('sh', 'mount', 'umount', 'mkdir', 'modprobe', 'switch_root', 'sleep', 'cp', 'ip',
                   'echo'):
        os.symlink('busybox', f'{tree}/bin/{applet}')
    needs = module_needs(kernel.modules)
    boot, criu = ([name for name in names if name in needs]
                  for names in (BOOT_MODULES, CRIU_MODULES + modules))
    for file in {file for name in boot + criu for file in needs[name]}:
        copy_module(f'{kernel.modules}/{file}', f'{tree}/lib/modules/{release}/{file}')
    run('depmod', '-b', tree, release, stderr=subprocess.DEVNULL)
    with open(f'{tree}/init', 'w') as f:
        f.write(INIT.format(boot=' '.join(boot), criu=' '.join(criu),
                            directory=shlex.quote(os.getcwd())))
    os.chmod(f'{tree}/init', 0o755)
    with open(f'{tree}/command', 'w') as f:
        f.write(COMMAND.format(directory=shlex.quote(os.getcwd()), command=command, done=DONE))
    image = f'{directory}/initramfs.cpio'
    with open(image, 'wb') as out:
        names = subprocess.run(['find', '.', '-print0'], cwd=tree, capture_output=True).stdout
        run('cpio', '--null', '-o', '-H', 'newc', '--quiet', cwd=tree, input=names, stdout=out)
    return image


def run_in_guest(command, build, timeout, suite='trixie', out=sys.stdout, modules=(), options=''):
    """Runs it with the kernel of a Debian suite (kernels.SUITES), started with these options and with
    `modules` beside the usual ones, and returns its exit code; raises Missing or
    subprocess.TimeoutExpired."""
    for program in ('qemu-system-x86_64', 'cpio', 'depmod'):
        if not shutil.which(program):
            raise Missing(f'{program} is not installed')
    os.makedirs(f'{build}/vm', exist_ok=True)
    with open(f'{build}/vm/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another guest may be about to start
        kernel = kernels.kernel(f'{build}/vm', suite)
    with tempfile.TemporaryDirectory(prefix='guest-', dir=os.path.abspath(f'{build}/vm')) as own:
        image = initramfs(own, kernel, command, tuple(modules))
        return run_qemu(kernel, image, command, timeout, out, options)


def run_qemu(kernel, image, command, timeout, out, options):
    # One after the other: emulated in parallel, a processor may execute half of what another one has
    # patched (int3 in the kernel's __schedule, an Oops).
    qemu = subprocess.Popen(
        ['qemu-system-x86_64', '-accel', 'tcg,thread=single', '-cpu', 'max', '-m', '4G', '-smp', '2',
         '-nographic', '-no-reboot', '-nic', 'none', '-kernel', kernel.image, '-initrd', image,
         '-append', f'console=ttyS0 quiet panic=-1 oops=panic {options}',
         '-virtfs', 'local,path=/,mount_tag=host,security_model=none,multidevs=remap'],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors='replace')
    timer = threading.Timer(timeout, qemu.kill)
    timer.start()
    code = None
    try:
        for line in qemu.stdout:
            at = line.find(DONE)
            if at >= 0:
                code = int(line[at + len(DONE):].split()[0])
            else:
                out.write(line)
        qemu.wait()
    finally:
        timer.cancel()
        if qemu.poll() is None:
            qemu.kill()
            qemu.wait()
    if code is None:
        raise subprocess.TimeoutExpired(command, timeout)
    return code


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--build', default='build')
    parser.add_argument('--suite', default='trixie', choices=kernels.SUITES)
    parser.add_argument('--timeout', type=float, default=240)
    parser.add_argument('--module', action='append', default=[])
    parser.add_argument('command', nargs='+')
    args = parser.parse_args()
    try:
        return run_in_guest(' '.join(args.command), args.build, args.timeout, args.suite,
                            modules=args.module)
    except Missing as e:
        print(f'vm: {e}', file=sys.stderr)
        return 77
    except subprocess.TimeoutExpired:
        print(f'vm: no end within {args.timeout:.0f} s, or the guest stopped', file=sys.stderr)
        return 124


if __name__ == '__main__':
    sys.exit(main())
