# SPDX-License-Identifier: GPL-2.0-only
"""Empties and refills PyTorch's cache of GPU memory at every step, beside a tensor that stays, and
asks the driver about its memory in the ways a program can. Prints `tick N ... ok`, or what is wrong."""
import ctypes
import sys
import time

import torch

MIB = 1 << 20
cuda = ctypes.CDLL('libcuda.so.1')
CONTEXT, MEMORY_TYPE, DEVICE_POINTER, IS_MANAGED = 1, 2, 3, 8  # CUpointer_attribute
DEVICE = 2                                                     # CU_MEMORYTYPE_DEVICE


def attribute(which, pointer, of):
    value = of()
    result = cuda.cuPointerGetAttribute(ctypes.byref(value), which, ctypes.c_uint64(pointer))
    assert result == 0, f'cuPointerGetAttribute {which}: {result}'
    return value.value


def check_driver(tensor):
    at = tensor.data_ptr()
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    result = cuda.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size),
                                          ctypes.c_uint64(at))
    assert result == 0, f'cuMemGetAddressRange: {result}'
    end = at + tensor.numel() * tensor.element_size()
    assert base.value <= at and end <= base.value + size.value, 'cuMemGetAddressRange: wrong range'
    assert attribute(MEMORY_TYPE, at, ctypes.c_uint) == DEVICE
    assert attribute(DEVICE_POINTER, at, ctypes.c_uint64) == at
    assert attribute(IS_MANAGED, at, ctypes.c_uint) == 0
    context = ctypes.c_void_p()
    assert cuda.cuCtxGetCurrent(ctypes.byref(context)) == 0
    assert attribute(CONTEXT, at, ctypes.c_void_p) == context.value
    if 'noipc' in sys.argv:
        return
    handle = (ctypes.c_char * 64)()
    result = cuda.cuIpcGetMemHandle(handle, ctypes.c_uint64(at))
    assert result == 0, f'cuIpcGetMemHandle: {result}'


torch.manual_seed(1)
kept = torch.randint(0, 1 << 62, (32 * MIB,), device='cuda')  # 256 MiB
total = int(kept.sum())
for step in range(1, 100000):
    check_driver(kept)
    # Of many sizes: some in PyTorch's blocks, some their own allocations.
    sizes = [(1 + (step * 7 + i * 13) % 97) * MIB // 2 for i in range(6)]
    filled = [torch.full((n,), step * 10 + i, dtype=torch.int64, device='cuda')
              for i, n in enumerate(sizes)]
    for i, (n, tensor) in enumerate(zip(sizes, filled)):
        assert int(tensor.sum()) == n * (step * 10 + i), f'step {step}: tensor {i} of {n}'
    check_driver(filled[0])
    assert int(kept.sum()) == total, f'step {step}: what stays has changed'
    del filled, tensor
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] // MIB
    print(f'tick {step} reserved {torch.cuda.memory_reserved() // MIB} free {free} ok', flush=True)
    time.sleep(0.02)
