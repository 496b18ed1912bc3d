# SPDX-License-Identifier: GPL-2.0-only
"""The real nvidia-uvm.ko for guests without a GPU: Debian's source of NVIDIA's open modules, built for
the kernels of bookworm-backports and, without BTF, of bookworm, over a stub of nvidia.ko
(stub_rm/). Kept below the build directory; building takes two to five minutes each, once.

    python3 test/vm/uvm.py BUILD/vm

builds it, however long that takes. PHOS_NVIDIA_SOURCE names another source, a directory like
kernel-open/ of NVIDIA's repository, for trying other releases of the driver.
"""

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile

import kernels
from kernels import Missing

# What builds for bookworm-backports' kernel run with: its headers' compiler, and BTF for modules.
SUITE = 'bookworm-backports'
# Its headers have no vmlinux, so modules are built without BTF.
NO_BTF_SUITE = 'bookworm'
PROGRAMS = {'gcc-12': 'gcc-12', 'x86_64-linux-gnu-gcc-12': 'gcc-12', 'make': 'make',
            'pahole': 'dwarves', 'strip': 'binutils', 'xz': 'xz-utils'}
# The session is a success; the rest needs a GPU.
SUCCEEDS = re.compile('nvUvmInterface(SessionDestroy|RegisterUvm.*|DeRegisterUvm.*)')
NV_ERR_NOT_SUPPORTED = 0x56


def check_programs():
    for program, package in PROGRAMS.items():
        if not shutil.which(program):
            raise Missing(f'no {program} (package {package})')


def nvidia_source(directory, patience):
    """NVIDIA's kernel-open directory, fetched the first time."""
    named = os.environ.get('PHOS_NVIDIA_SOURCE')
    if named:
        return os.path.abspath(named)
    root = os.path.abspath(f'{directory}/nvidia-open')

    def unpack(apt, new):
        apt.unpack(['nvidia-open-kernel-source'], f'{new}/package')
        archive, = glob.glob(f'{new}/package/usr/src/*.tar.xz')
        with tarfile.open(archive) as tar:
            tar.extractall(new)
        shutil.rmtree(f'{new}/package')

    if not os.path.isdir(root):
        kernels.fetch(root, 'trixie', patience, 'contrib', unpack)
    found = glob.glob(f'{root}/**/nvidia-uvm/nvidia-uvm.Kbuild', recursive=True)
    return os.path.dirname(os.path.dirname(found[0]))


def make(directory, headers, target, **variables):
    source, output = headers
    command = ['make', '-s', '-C', source, f'O={output}', f'M={directory}', 'ARCH=x86_64',
               f'-j{len(os.sched_getaffinity(0))}', target]
    with open(f'{directory}/make.log', 'w', encoding='utf-8') as log:
        result = subprocess.run(command + [f'{k}={v}' for k, v in variables.items()], stdout=log,
                                stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise RuntimeError(f'{target} does not build; see {directory}/make.log')


def build_stub(directory, nvidia, headers):
    """stub_rm.ko in `directory`, which has its sources."""
    with open(f'{nvidia}/common/inc/nv_uvm_interface.h', encoding='utf-8') as f:
        names = sorted(set(re.findall(r'^[\w ]+ \*?(nvUvmInterface\w+)\(', f.read(), re.MULTILINE)))
    names.remove('nvUvmInterfaceSessionCreate')
    with open(f'{directory}/stub_rm_names.h', 'w', encoding='utf-8') as f:
        for name in names:
            status = 0 if SUCCEEDS.fullmatch(name) else NV_ERR_NOT_SUPPORTED
            f.write(f'STUB({name}, {status});\n')
    make(directory, headers, 'modules', PHOS_NVIDIA=nvidia)


def build_uvm(directory, headers, symbols):
    """nvidia-uvm.ko in `directory`, which has NVIDIA's sources."""
    # Only this module's, but with what nvidia's own would find out about the kernel.
    make(directory, headers, 'nvidia-uvm.ko', NV_KERNEL_MODULES='nvidia nvidia-uvm',
         NV_KERNEL_SOURCES=headers[0], NV_KERNEL_OUTPUT=headers[1], CC='gcc-12',
         KBUILD_EXTRA_SYMBOLS=symbols)


def build_phos(directory, suite, patience=60):
    """phos.ko for the suite's kernel, built anew: it may have changed. Its path; raises Missing, and
    RuntimeError if it does not build without warnings."""
    check_programs()
    headers = kernels.headers(directory, suite, patience)
    work = os.path.abspath(f'{directory}/{suite}/phos')
    top = os.path.abspath(f'{os.path.dirname(__file__)}/../..')
    shutil.rmtree(work, ignore_errors=True)
    subprocess.run(['make', '-s', '-C', f'{top}/kmod', 'source', f'TO={work}'], check=True)
    make(work, headers, 'modules', W='1')
    with open(f'{work}/make.log', encoding='utf-8') as log:
        warnings = [line for line in log if 'warning:' in line]
    if warnings:
        raise RuntimeError(f'phos.ko builds with warnings: {warnings[0]}')
    return f'{work}/phos.ko'


def modules(directory, suite=SUITE, patience=60):
    """The directory with stub_rm.ko and nvidia-uvm.ko for the suite's kernel, built the first time;
    raises Missing where the parts cannot be had, RuntimeError where they do not build."""
    check_programs()
    headers = kernels.headers(directory, suite, patience)
    nvidia = nvidia_source(directory, patience)
    release = os.path.basename(headers[1])
    with open(f'{nvidia}/common/inc/nv_uvm_interface.h', 'rb') as f:
        key = hashlib.sha256(f.read() + nvidia.encode()).hexdigest()[:8]
    done = os.path.abspath(f'{directory}/uvm-{release}-{key}')
    if os.path.isdir(done):
        return done
    work = f'{done}.new'
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'stub_rm'),
                    f'{work}/stub')
    build_stub(f'{work}/stub', nvidia, headers)
    # A copy: what is built lies among the sources.
    shutil.copytree(nvidia, f'{work}/nvidia', ignore=shutil.ignore_patterns('*.o_binary'))
    build_uvm(f'{work}/nvidia', headers, f'{work}/stub/Module.symvers')
    for module in ('stub/stub_rm.ko', 'nvidia/nvidia-uvm.ko'):
        # Its BTF stays, if it has any.
        subprocess.run(['strip', '--strip-debug', '-o', f'{work}/{os.path.basename(module)}',
                        f'{work}/{module}'], check=True)
    shutil.rmtree(f'{work}/nvidia')
    shutil.rmtree(f'{work}/stub')
    os.rename(work, done)
    return done


def main():
    try:
        for suite in (SUITE, NO_BTF_SUITE):
            modules(sys.argv[1], suite, None)
    except (Missing, RuntimeError) as e:
        return str(e)
    return 0


if __name__ == '__main__':
    sys.exit(main())
