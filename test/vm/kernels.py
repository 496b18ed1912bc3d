# SPDX-License-Identifier: GPL-2.0-only
"""Debian's stock kernels for guests, by suite, unpacked below the build directory and kept there.

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
SUITES = {'bookworm': '6.1', 'trixie': '6.12'}


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

    def __init__(self, directory, suite, patience):
        self.patience = patience
        os.makedirs(f'{directory}/lists/partial', exist_ok=True)
        with open(f'{directory}/sources', 'w') as f:
            f.write(f'deb [signed-by={KEYRING}] {mirror()} {suite} main\n')
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


def fetch(directory, suite, patience):
    """Unpacks the suite's kernel as directory/root; raises Missing."""
    for program in ('apt-cache', 'apt-get', 'dpkg-deb', 'depmod'):
        if not shutil.which(program):
            raise Missing(f"no {program}, to get Debian's kernel with")
    if not os.path.exists(KEYRING):
        raise Missing(f'no {KEYRING} (package debian-archive-keyring)')
    shutil.rmtree(directory, ignore_errors=True)
    apt = Apt(f'{directory}/apt', suite, patience)
    apt.run('apt-get', 'update', '-q')
    names = [line.split()[1] for line in apt.run('apt-cache', 'depends', PACKAGE).splitlines()
             if 'Depends: linux-image-' in line]
    if not names:
        raise Missing(f'{suite} has no package {PACKAGE}')
    apt.run('apt-get', 'download', '-q', names[0], cwd=directory)
    package, = glob.glob(f'{directory}/{names[0]}_*.deb')
    new = f'{directory}/new'
    subprocess.run(['dpkg-deb', '-x', package, new], check=True)
    if not os.path.exists(f'{new}/lib'):  # trixie's lies in /usr/lib only
        os.symlink('usr/lib', f'{new}/lib')
    subprocess.run(['depmod', '-b', new, Kernel(new).release], check=True)
    os.remove(package)
    shutil.rmtree(f'{directory}/apt')
    os.rename(new, f'{directory}/root')  # the name says that it is complete


def kernel(directory, suite, patience=60):
    """The suite's kernel, fetched the first time, by commands that take no more than `patience`
    seconds (None: any time); raises Missing where that cannot be done."""
    directory = os.path.abspath(f'{directory}/{suite}')
    if not os.path.isdir(f'{directory}/root'):
        fetch(directory, suite, patience)
    return Kernel(f'{directory}/root')


def main():
    for suite in SUITES:
        try:
            kernel(sys.argv[1], suite, None)
        except Missing as e:
            return f'no kernel of {suite}: {e}'
    return 0


if __name__ == '__main__':
    sys.exit(main())
