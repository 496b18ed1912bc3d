# SPDX-License-Identifier: GPL-2.0-only
"""Two ranks on two GPUs sum a tensor by NCCL again and again; rank 0 prints a line a tick."""
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(rank, ranks):
    # CRIU cannot dump io_uring, which PyTorch's rendezvous uses through libuv.
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='29517', USE_LIBUV='0')
    torch.cuda.set_device(rank)
    dist.init_process_group('nccl', rank=rank, world_size=ranks)
    x = torch.empty(1 << 22, device='cuda')
    tick = 0
    while True:
        tick += 1
        x.fill_(tick + rank)
        dist.all_reduce(x)
        value = x[-1].item()
        expected = sum(tick + r for r in range(ranks))
        if rank == 0:
            print(f'tick {tick} sum {value}', 'ok' if value == expected else 'WRONG', flush=True)
        time.sleep(0.05)


if __name__ == '__main__':
    mp.spawn(run, args=(2,), nprocs=2)
