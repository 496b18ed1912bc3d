# SPDX-License-Identifier: GPL-2.0-only
"""Two processes, one tensor: the child holds memory that the parent exported by CUDA IPC."""
import time

import torch
import torch.multiprocessing as mp


def hold(queue, ready):
    tensor = queue.get()
    ready.put(float(tensor.sum().item()))
    time.sleep(1000)


if __name__ == '__main__':
    mp.set_start_method('spawn')
    queue, ready = mp.Queue(), mp.Queue()
    child = mp.Process(target=hold, args=(queue, ready), daemon=True)
    child.start()
    tensor = torch.ones(16 << 20, device='cuda')
    queue.put(tensor)
    assert ready.get() == 16 << 20
    tick = 0
    while True:
        tick += 1
        tensor.add_(1)
        value = tensor[-1].item()
        print(f'tick {tick} value {value}', 'ok' if value == tick + 1 else 'WRONG', flush=True)
        time.sleep(0.05)
