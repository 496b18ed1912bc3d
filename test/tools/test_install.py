# SPDX-License-Identifier: GPL-2.0-only
"""`make install` and `make uninstall`: what lies where afterwards."""
import configparser
import os
import shutil
import stat
import subprocess
import tempfile
import unittest

REPO = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.abspath(os.environ.get('PHOS_BUILD', os.path.join(REPO, 'build')))

PROGRAMS = ['bin/phos', 'sbin/criu', 'libexec/phos/phosd']
UNITS = ['lib/systemd/system/phosd.service', 'lib/systemd/system/phosd.socket']
MAN_PAGES = ['share/man/man1/criu-phos.1', 'share/man/man1/phos.1', 'share/man/man8/phosd.8']
OWN_CRIU = 'libexec/phos/criu'  # where the machine had none


def unit(path):
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # names as they are written
    with open(path) as f:
        parser.read_file(f)
    return parser


class Install(unittest.TestCase):
    def setUp(self):
        if not os.path.exists(os.path.join(BUILD, 'bin', 'phos')):
            self.skipTest('phos is not built here')
        if not os.path.exists(os.path.join(REPO, 'Makefile')):
            self.skipTest('no Makefile here, as in a bundle')
        if not shutil.which('make'):
            self.skipTest('needs make')
        self.directory = tempfile.mkdtemp(prefix='phos-install-')
        self.addCleanup(shutil.rmtree, self.directory)

    def make(self, target, *settings):
        # As it was built: -o all keeps make from building anything.
        result = subprocess.run(['make', '-C', REPO, '-o', 'all', target, f'B={BUILD}', *settings],
                                capture_output=True, text=True, timeout=60,
                                env={k: v for k, v in os.environ.items()
                                     if not k.startswith('MAKE')})
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def files(self, root):
        """Path below `root`: mode."""
        found = {}
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.join(directory, name)
                found[os.path.relpath(path, root)] = stat.S_IMODE(os.lstat(path).st_mode)
        found.pop(os.path.join(os.path.relpath(self.prefix, root), OWN_CRIU), None)
        return found

    def expected(self, prefix, plugins):
        modes = {os.path.join(prefix, name): 0o755 for name in PROGRAMS}
        modes |= {os.path.join(prefix, name): 0o644 for name in UNITS + MAN_PAGES}
        modes[os.path.join(plugins, 'phos_plugin.so')] = 0o644
        return modes

    def check_units(self, installed, prefix):
        service = unit(os.path.join(installed, UNITS[0]))
        program, *arguments = service['Service']['ExecStart'].split()
        self.assertEqual(program, os.path.join(prefix, 'libexec/phos/phosd'))
        self.assertEqual(arguments, ['--foreground'])
        self.assertEqual(service['Unit']['Requires'], 'phosd.socket')
        socket = unit(os.path.join(installed, UNITS[1]))['Socket']
        self.assertEqual(socket['SocketMode'], '0600')
        self.assertEqual(socket['DirectoryMode'], '0700')
        self.assertEqual(socket['ListenSequentialPacket'], '/run/phos/phosd.sock')
        for name in UNITS:
            with open(os.path.join(installed, name)) as f:
                self.assertNotIn('@', f.read(), name)

    def same(self, a, b):
        with open(a, 'rb') as f, open(b, 'rb') as g:
            return f.read() == g.read()

    def install_below(self, prefix, plugins, *settings):
        """Into a staging directory, and out of it again."""
        root = os.path.join(self.directory, 'root')
        self.prefix = root + prefix
        settings = [f'DESTDIR={root}', *settings]
        for _ in range(2):  # a second time over the first
            self.make('install', *settings)
            self.assertEqual(self.files(root), self.expected(prefix[1:], plugins[1:]))
        self.check_units(root + prefix, prefix)
        for installed, built in (('bin/phos', 'bin/phos'), ('sbin/criu', 'bin/criu'),
                                 ('libexec/phos/phosd', 'libexec/phos/phosd')):
            self.assertTrue(self.same(os.path.join(root + prefix, installed),
                                      os.path.join(BUILD, built)), installed)
        self.make('uninstall', *settings)
        self.assertEqual(self.files(root), {})
        self.assertFalse(os.path.exists(os.path.join(root + prefix, OWN_CRIU)))
        self.assertFalse(os.path.exists(os.path.join(root + prefix, 'libexec/phos')))

    def test_where_it_goes_by_default(self):
        self.install_below('/usr/local', '/usr/lib/criu')

    def test_where_it_is_told_to_go(self):
        self.install_below('/opt/phos', '/opt/plugins', 'PREFIX=/opt/phos', 'PLUGINDIR=/opt/plugins')

    def test_stock_criu_is_left_alone(self):
        stock = os.path.join(self.directory, 'usr/local/sbin/criu')
        os.makedirs(os.path.dirname(stock))
        with open(stock, 'w') as f:
            f.write('#!/bin/sh\n')
        said = self.make('install', f'DESTDIR={self.directory}')
        self.assertIn('is stock criu: left alone', said)
        self.make('uninstall', f'DESTDIR={self.directory}')
        with open(stock) as f:
            self.assertEqual(f.read(), '#!/bin/sh\n')

    def test_what_was_there_stays(self):
        others = [os.path.join(self.directory, name) for name in
                  ('usr/lib/criu/other_plugin.so', 'usr/local/libexec/phos/notes',
                   'usr/local/lib/systemd/system/other.service')]
        for path in others:
            os.makedirs(os.path.dirname(path))
            with open(path, 'w') as f:
                f.write('other')
        self.make('install', f'DESTDIR={self.directory}')
        self.make('uninstall', f'DESTDIR={self.directory}')
        self.prefix = os.path.join(self.directory, 'usr/local')
        self.assertEqual(set(self.files(self.directory)),
                         {os.path.relpath(path, self.directory) for path in others})

    def test_programs_run(self):
        prefix = os.path.join(self.directory, 'prefix')
        self.make('install', f'PREFIX={prefix}', f'PLUGINDIR={self.directory}/plugins')
        for name in ('bin/phos', 'libexec/phos/phosd'):
            result = subprocess.run([os.path.join(prefix, name), '--help'], capture_output=True,
                                    text=True, timeout=60)
            self.assertEqual(result.returncode, 0, result.stderr)
            self.assertIn('Usage: ', result.stdout)

    def test_systemd_takes_the_units(self):
        if not shutil.which('systemd-analyze'):
            self.skipTest('no systemd-analyze here')
        # Where ExecStart really is.
        prefix = os.path.join(self.directory, 'prefix')
        self.make('install', f'PREFIX={prefix}', f'PLUGINDIR={self.directory}/plugins')
        result = subprocess.run(['systemd-analyze', 'verify', '--man=no',
                                 *(os.path.join(prefix, name) for name in UNITS)],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual((result.returncode, result.stderr), (0, ''))


if __name__ == '__main__':
    unittest.main()
