#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Where the fields of nvidia-uvm's structures lie, by driver version: what phosd goes by
(gpu-tracker/track/uvm_layout_table.cpp) where nvidia-uvm carries no BTF.

    kmod/layouts.py REPOSITORY [FIRST]

prints the rows of that table, for the releases from FIRST on (default: 535) in a clone of
https://github.com/NVIDIA/open-gpu-kernel-modules. The definitions are taken out of each release's
headers and compiled with the kernel's own types beside them, which are the same in all kernels
but for struct mutex: its size is part of a layout. A release whose definitions do not compile, or
whose functions take other arguments than phos.ko reads, is left out, and it is said why.
"""

import re
import subprocess
import sys
import tempfile
import textwrap

UVM = 'kernel-open/nvidia-uvm'
# Without lock debugging.
MUTEX_BYTES = 32
FIELDS = ('block_range', 'block_start', 'range_space', 'range_start', 'range_end', 'range_type',
          'wrapper_vma')

# What phos.ko reads of their arguments (kmod/hooks.c); `...`: not read.
PROTOTYPES = {
    'uvm_va_block_map': ('uvm_va_block_t *, uvm_va_block_context_t *, uvm_processor_id_t, '
                         'uvm_va_block_region_t, const uvm_page_mask_t *, uvm_prot_t, '
                         'UvmEventMapRemoteCause, uvm_tracker_t *'),
    'uvm_va_block_write_from_cpu': ('uvm_va_block_t *, uvm_va_block_context_t *, NvU64, '
                                    'uvm_mem_t *, size_t'),
    'uvm_va_range_create_mmap': ('uvm_va_space_t *, struct mm_struct *, uvm_vma_wrapper_t *, ...'),
    'uvm_va_range_destroy': 'uvm_va_range_t *, struct list_head *',
    'uvm_va_space_mm_register': 'uvm_va_space_t *',
}

PROGRAM = '''
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#define PAGE_SIZE 4096
#define NV_U8_MAX 255
#define NV_U16_MAX 65535
#define DECLARE_BITMAP(name, bits) unsigned long name[((bits) + 63) / 64]
#define UVM_IS_DEBUG() 0
typedef uint8_t NvU8; typedef uint16_t NvU16; typedef uint32_t NvU32; typedef uint64_t NvU64;
/* The kernel's. */
typedef struct { int counter; } atomic_t;
typedef struct { long counter; } atomic_long_t;
struct list_head { void *next, *prev; };
struct rb_node { unsigned long parent; void *right, *left; };
struct mutex { long all[%(mutex)d / 8]; };
typedef struct { struct mutex stands_for_any; } uvm_rw_semaphore_t; /* nothing follows it */
typedef struct uvm_va_space_struct uvm_va_space_t;
typedef struct uvm_va_range_struct uvm_va_range_t;
typedef struct uvm_va_range_managed_struct uvm_va_range_managed_t;
typedef struct uvm_va_block_struct uvm_va_block_t;
%(definitions)s
_Static_assert(sizeof(uvm_va_block_region_t) == 4 && sizeof(uvm_page_mask_t) == 64, "");
_Static_assert(UVM_PROT_READ_WRITE == 2 && UVM_VA_RANGE_TYPE_MANAGED == 1, "");
#define AT(type, member) (unsigned)offsetof(type, member)
int main(void) {
  printf("%%u %%u %%u %%u %%u %%u %%u", AT(uvm_va_block_t, %(range)s), AT(uvm_va_block_t, start),
         AT(uvm_va_range_t, va_space), AT(uvm_va_range_t, node.start), AT(uvm_va_range_t, node.end),
         AT(uvm_va_range_t, type), AT(uvm_vma_wrapper_t, vma));
  return 0;
}
'''


class Unknown(Exception):
    """Why a release is left out."""


def take(text, pattern, what):
    """The match of `pattern`, as text; raises Unknown."""
    found = re.search(pattern, text, re.M | re.S)
    if not found:
        raise Unknown(f'no {what}')
    return found.group(0)


class Release:
    def __init__(self, repository, version):
        self.repository = repository
        self.version = version

    def header(self, path):
        shown = subprocess.run(['git', '-C', self.repository, 'show', f'{self.version}:{path}'],
                               capture_output=True, text=True, check=False)
        if shown.returncode:
            raise Unknown(f'no {path}')
        return re.sub(r'/\*.*?\*/', '', re.sub(r'//[^\n]*', '', shown.stdout), flags=re.S)

    def check_prototypes(self):
        headers = ''.join(self.header(f'{UVM}/{name}.h')
                          for name in ('uvm_va_block', 'uvm_va_range', 'uvm_va_space_mm'))
        for function, wanted in PROTOTYPES.items():
            text = take(headers, rf'^\w[\w ]*\b{function}\([^;{{]*\)', f'{function}()')
            arguments = text[text.index('(') + 1:-1].split(',')
            # Their names do not matter.
            types = [' '.join(re.sub(r'\w+\s*$', '', argument).split()) for argument in arguments]
            wanted = wanted.split(', ')
            if len(types) != len(wanted) or any(w not in ('...', t)
                                                for t, w in zip(types, wanted)):
                raise Unknown(f'{function}({", ".join(types)})')

    def definitions(self):
        processors = self.header(f'{UVM}/uvm_processors.h')
        ranges = self.header(f'{UVM}/uvm_va_range.h')
        block = self.header(f'{UVM}/uvm_va_block.h')
        types = self.header(f'{UVM}/uvm_types.h')
        yield take(self.header('kernel-open/common/inc/nvlimits.h'),
                   r'^#define NV_MAX_DEVICES\b[^\n]*', 'NV_MAX_DEVICES')
        for line in re.findall(r'^#define UVM_(?:PARENT_)?(?:ID_)?MAX_\w+ [^\n]*', types + processors,
                               re.M):
            yield line
        if 'UVM_PROCESSOR_MASK(uvm_processor_mask_t' in processors:
            bits = take(processors, r'UVM_PROCESSOR_MASK\(uvm_processor_mask_t,.*?\)', 'mask')
            bits = [word.strip(' \\\n') for word in bits.split(',')][2]
            yield f'typedef struct {{ DECLARE_BITMAP(bitmap, {bits}); }} uvm_processor_mask_t;'
        yield take(self.header('kernel-open/common/inc/nv-kref.h'),
                   r'^typedef struct nv_kref\b.*?nv_kref_t;', 'nv_kref_t')
        yield take(self.header(f'{UVM}/uvm_lock.h'),
                   r'^typedef struct\s*\{\s*struct mutex m;.*?uvm_mutex_t;', 'uvm_mutex_t')
        yield take(self.header(f'{UVM}/uvm_range_tree.h'),
                   r'^typedef struct uvm_range_tree_node_struct.*?uvm_range_tree_node_t;', 'node')
        yield take(self.header(f'{UVM}/uvm_hal_types.h'),
                   r'^typedef enum\s*\{[^{}]*\} uvm_prot_t;', 'uvm_prot_t')
        yield take(self.header(f'{UVM}/uvm_va_block_types.h'),
                   r'^#define UVM_VA_BLOCK_BITS.*?uvm_page_mask_t;', 'uvm_page_mask_t')
        yield take(ranges, r'^typedef enum\s*\{[^{}]*\} uvm_va_range_type_t;', 'types of ranges')
        yield take(ranges, r'^typedef struct\s*\{[^{}]*\} uvm_vma_wrapper_t;', 'uvm_vma_wrapper_t')
        # Of these two what comes behind the last field that is read does not matter.
        yield take(ranges, r'^struct uvm_va_range_struct\s*\{.*?uvm_va_range_type_t type;',
                   'struct uvm_va_range_struct') + '};'
        yield take(block, r'^struct uvm_va_block_struct\s*\{.*?NvU64 end;',
                   'struct uvm_va_block_struct') + '};'
        if 'managed_range;' in block:
            take(ranges, r'^struct uvm_va_range_managed_struct\s*\{\s*uvm_va_range_t va_range;',
                 'range at the beginning of a managed range')

    def layout(self):
        """The offsets of FIELDS; raises Unknown."""
        self.check_prototypes()
        definitions = '\n'.join(self.definitions())
        # Until driver 560 a block names a range, then a managed range, which begins with one.
        field = 'managed_range' if 'managed_range;' in definitions else 'va_range'
        with tempfile.TemporaryDirectory() as tmp:
            with open(f'{tmp}/layout.c', 'w', encoding='utf-8') as f:
                f.write(PROGRAM % {'mutex': MUTEX_BYTES, 'definitions': definitions,
                                   'range': field})
            built = subprocess.run(['cc', '-std=gnu11', '-o', f'{tmp}/layout', f'{tmp}/layout.c'],
                                   capture_output=True, text=True, check=False)
            if built.returncode:
                raise Unknown(next(line for line in built.stderr.splitlines() if 'error' in line))
            shown = subprocess.run([f'{tmp}/layout'], capture_output=True, text=True, check=True)
        return tuple(int(word) for word in shown.stdout.split())


def releases(repository, first):
    """The names of the releases from `first` on, in order."""
    tags = subprocess.run(['git', '-C', repository, 'tag'], capture_output=True, text=True,
                          check=True).stdout.split()
    numbers = {tag: [int(part) for part in tag.split('.')]
               for tag in tags if re.fullmatch(r'\d+(\.\d+)+', tag)}
    wanted = [int(part) for part in first.split('.')]
    return sorted((tag for tag in numbers if numbers[tag] >= wanted), key=numbers.get)


def main():
    if len(sys.argv) not in (2, 3):
        return __doc__
    rows = {}
    for version in releases(sys.argv[1], (sys.argv + ['535'])[2]):
        try:
            rows.setdefault(Release(sys.argv[1], version).layout(), []).append(version)
        except Unknown as e:
            print(f'{version} is left out: {e}', file=sys.stderr)
    for layout, versions in rows.items():
        fields = ', '.join(f'.{name} = {at}' for name, at in zip(FIELDS, layout))
        print(textwrap.fill(f'{{{fields}, .mutex_bytes = {MUTEX_BYTES}}}', 100))
        print(textwrap.fill(' '.join(versions), 100) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
