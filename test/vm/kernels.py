# SPDX-License-Identifier: GPL-2.0-only
"""Debian's stock kernels for guests, by suite, unpacked below the build directory and kept there; of one
also what modules are built with.

They are fetched by apt, which checks the archive's signature, with lists and settings of its own:
nothing is installed on this machine, its package lists stay as they are, and the suite need not be
this machine's. They come from the Debian archive among this machine's apt sources, or from the
one that PHOS_DEBIAN_MIRROR names.

    python3 test/vm/kernels.py DIRECTORY

fetches all that the tests use, however long it takes; the tests themselves do not wait for long.
"""

import glob
import os
import shutil
import subprocess
import sys

KEYRING = '/usr/share/keyrings/debian-archive-keyring.gpg'
PACKAGE = 'linux-image-amd64'
# The suites that tests ask for, with the kernel that each has.
SUITES = {'bookworm': '6.1', 'trixie': '6.12', 'bookworm-backports': '6.12'}


class Missing(Exception):
    """What the guest needs and cannot be had."""


class Kernel:
    """An unpacked kernel: paths of its image and its modules."""

    def __init__(self, root):
        image, = glob.glob(f'{root}/boot/vmlinuz-*')
        self.image = image
        self.release = os.path.basename(image).removeprefix('vmlinuz-')
        self.modules = f'{root}/lib/modules/{self.release}'


def mirror():
    """The URI of a Debian archive; raises Missing."""
    named = os.environ.get('PHOS_DEBIAN_MIRROR')
    if named:
        return named
    targets = subprocess.run(['apt-get', 'indextargets', '--format', '$(REPO_URI)',
                              'Created-By: Packages'], capture_output=True, text=True, check=False)
    for uri in targets.stdout.split():
        # Its updates for security have an archive of their own.
        if uri.rstrip('/').endswith('/debian'):
            return uri
    raise Missing("no Debian archive among apt's sources; name one in PHOS_DEBIAN_MIRROR")


class Apt:
    """apt-get and apt-cache with everything that they keep in `directory`."""

    def __init__(self, directory, suite, patience, component='main'):
        for program in ('apt-cache', 'apt-get', 'dpkg-deb', 'depmod'):
            if not shutil.which(program):
                raise Missing(f"no {program}, to get Debian's kernel with")
        if not os.path.exists(KEYRING):
            raise Missing(f'no {KEYRING} (package debian-archive-keyring)')
        self.directory = directory
        self.patience = patience
        os.makedirs(f'{directory}/lists/partial')
        with open(f'{directory}/sources', 'w') as f:
            f.write(f'deb [signed-by={KEYRING}] {mirror()} {suite} {component}\n')
        settings = {'Dir::Etc::sourcelist': f'{directory}/sources',
                    'Dir::Etc::sourceparts': '/dev/null',
                    'Dir::Etc::preferencesparts': '/dev/null',
                    'Dir::State': directory,
                    'Dir::State::status': '/dev/null',
                    'Dir::Cache': directory,
                    'APT::Architecture': 'amd64',
                    'APT::Sandbox::User': 'root',
                    # A failed update is an error, and soon: tests wait for it.
                    'APT::Update::Error-Mode': 'any',
                    'Acquire::Languages': 'none',
                    'Acquire::Retries': '0',
                    'Acquire::http::Timeout': '10'}
        self.options = [word for name, value in settings.items()
                        for word in ('-o', f'{name}={value}')]

    def run(self, program, *args, cwd=None):
        """Standard output; raises Missing with apt's first complaint."""
        try:
            result = subprocess.run([program, *self.options, *args], text=True, capture_output=True,
                                    cwd=cwd, env=dict(os.environ, LC_ALL='C'),
                                    timeout=self.patience)
        except subprocess.TimeoutExpired:
            raise Missing(f'{program} {args[0]} takes more than {self.patience} s; '
                          'ci/deps vm waits for it') from None
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if line.startswith(('E:', 'Err'))]
            raise Missing(f"{program} {args[0]}: {(errors or ['failed'])[0]}")
        return result.stdout

    def depends(self, package, prefixes):
        """The packages with one of these prefixes that it depends on; raises Missing if there is
        none."""
        names = [line.split()[1] for line in self.run('apt-cache', 'depends', package).splitlines()
                 if line.strip().startswith('Depends: ')]
        names = [name for name in names if name.startswith(prefixes)]
        if not names:
            raise Missing(f'no package {package}')
        return names

    def unpack(self, names, root):
        """Downloads packages and unpacks them below `root`."""
        os.makedirs(root, exist_ok=True)
        self.run('apt-get', 'download', '-q', *names, cwd=self.directory)
        for package in glob.glob(f'{self.directory}/*.deb'):
            subprocess.run(['dpkg-deb', '-x', package, root], check=True)
            os.remove(package)


def fetch(directory, suite, patience, component, unpack):
    """Makes `directory` anew: unpack(apt, new) puts into `new` what belongs there. Raises Missing."""
    for leftover in (directory, f'{directory}.new', f'{directory}.apt'):
        shutil.rmtree(leftover, ignore_errors=True)
    apt = Apt(f'{directory}.apt', suite, patience, component)
    apt.run('apt-get', 'update', '-q')
    unpack(apt, f'{directory}.new')
    shutil.rmtree(f'{directory}.apt')
    os.rename(f'{directory}.new', directory)  # the name says that it is complete


def unpack_kernel(apt, new):
    apt.unpack(apt.depends(PACKAGE, 'linux-image-')[:1], new)
    if not os.path.exists(f'{new}/lib'):  # trixie's lies in /usr/lib only
        os.symlink('usr/lib', f'{new}/lib')
    subprocess.run(['depmod', '-b', new, Kernel(new).release], check=True)


def kernel(directory, suite, patience=60):
    """The suite's kernel, fetched the first time, by commands that take no more than `patience`
    seconds (None: any time); raises Missing where that cannot be done."""
    root = os.path.abspath(f'{directory}/{suite}/root')
    if not os.path.isdir(root):
        fetch(root, suite, patience, 'main', unpack_kernel)
    return Kernel(root)


def headers(directory, suite, patience=60):
    """(source, output): the directories that modules for kernel(directory, suite) are built with."""
    release = kernel(directory, suite, patience).release
    root = os.path.abspath(f'{directory}/{suite}/headers-{release}')

    def unpack(apt, new):
        package = f'linux-headers-{release}'
        apt.unpack([package, *apt.depends(package, ('linux-headers-', 'linux-kbuild-'))], new)
        # It names the other directory as if it were installed.
        makefile = f'{new}/usr/src/{package}/Makefile'
        with open(makefile, encoding='utf-8') as f:
            text = f.read()
        with open(makefile, 'w', encoding='utf-8') as f:
            f.write(text.replace('/usr/src/', f'{root}/usr/src/'))

    if not os.path.isdir(root):
        fetch(root, suite, patience, 'main', unpack)
    source, = glob.glob(f'{root}/usr/src/linux-headers-*-common')
    return source, f'{root}/usr/src/linux-headers-{release}'


def main():
    for suite in SUITES:
        try:
            kernel(sys.argv[1], suite, None)
        except Missing as e:
            return f'no kernel of {suite}: {e}'
    return 0


if __name__ == '__main__':
    sys.exit(main())
