# SPDX-License-Identifier: GPL-2.0-only
"""container.py ROOT PROGRAM ARGUMENT...: makes ROOT the root of the mount namespace that it was
started in, leaves nothing of the old one mounted, and becomes PROGRAM there, with /output as its
output. With PHOS_TEST_TWO it has a child besides, which writes to /output-2."""
import ctypes
import os
import sys

MS_BIND, MNT_DETACH, SYS_PIVOT_ROOT = 4096, 2, 155


def main(root, *argv):
    libc = ctypes.CDLL(None, use_errno=True)

    def done(result, what):
        if result:
            raise OSError(ctypes.get_errno(), what)

    path = root.encode()
    done(libc.mount(path, path, None, MS_BIND, None), 'bind mount')
    os.chdir(root)
    done(libc.mount(b'proc', b'proc', b'proc', 0, None), 'mounting /proc')
    # The old root comes to lie on top of the new one (pivot_root(2)).
    done(libc.syscall(SYS_PIVOT_ROOT, b'.', b'.'), 'pivot_root')
    done(libc.umount2(b'.', MNT_DETACH), 'umount')
    os.chdir('/')
    os.setsid()
    output = '/output'
    if os.environ.get('PHOS_TEST_TWO') and os.fork() == 0:
        output = '/output-2'
    for fd, name, flags in ((0, '/input', os.O_RDONLY), (1, output, os.O_WRONLY | os.O_APPEND)):
        os.dup2(os.open(name, flags), fd)
    os.dup2(1, 2)
    os.closerange(3, 64)
    os.execve(argv[0], argv, {'LD_LIBRARY_PATH': '/opt/cuda'})


if __name__ == '__main__':
    main(*sys.argv[1:])
