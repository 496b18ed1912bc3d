# SPDX-License-Identifier: GPL-2.0-only
"""A workload for the benchmarks: works until it is killed and prints how far it is.

    python3 app.py llama|train|storm|idle|resident|allocations [N]

Every 10 ms a line `rate SECONDS UNITS`: the time of day, and how many units of work (tokens, steps,
launches) are done and finished on the GPU. (Not CLOCK_MONOTONIC: CRIU restores a process into a time
namespace, where that goes on as if there had been no dump.)
  llama  transformers LlamaForCausalLM as wide as Llama-2-13B, N layers (40: all of it, 26 GB), bf16,
         random weights, generating
  train  a training loop of a 4-layer MLP, AdamW
  storm  tiny kernels, launched as fast as Python can
  idle   does nothing
  resident  N GiB in pieces of 256 MiB, of which it rewrites 0.5 % all the time. The first 16 GiB are
         random, the others zeros: a dump has to look at them, but needs no room for them
  allocations  does nothing, with N of 2 MiB
It ends when its parent does. N of the others: GiB of further memory, filled with random bytes and
not written any more.
"""
import ctypes
import os
import sys
import time


class Meter:
    def __init__(self):
        self.units = 0
        self.last = 0.0
        self.parent = os.getppid()

    def count(self, units=1):
        self.units += units
        now = time.time()
        if now - self.last >= 0.01:
            print(f'rate {now:.6f} {self.units}', flush=True)
            self.last = now
            if not os.path.exists(f'/proc/{self.parent}'):
                sys.exit()


def llama(meter):
    from transformers import LlamaConfig, LlamaForCausalLM
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_attention_heads=40,
                         num_hidden_layers=int(sys.argv[2]), vocab_size=32000)
    with torch.device('cuda'):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        while True:
            step_input, cache = torch.arange(1, 9, device='cuda')[None], None
            for _ in range(512):
                out = model(step_input, past_key_values=cache, use_cache=True)
                cache, step_input = out.past_key_values, out.logits[:, -1:].argmax(-1)
                step_input.item()
                meter.count()


def train(meter):
    width = 4096
    layers = [torch.nn.Linear(width, width) for _ in range(4)]
    model = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.GELU())]).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(1024, width, device='cuda')
    while True:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        meter.count()


def storm(meter):
    x = torch.zeros(1024, device='cuda')
    while True:
        for _ in range(1000):
            x.add_(1)
        torch.cuda.synchronize()
        meter.count(1000)


def idle(meter):
    while True:
        time.sleep(0.05)
        meter.count()


def resident(meter):
    pieces = int(float(sys.argv[2]) * 4)
    memory = [torch.randint(0, 1 << 62, (1 << 25,), device='cuda') if i < 64 else
              torch.zeros(1 << 25, dtype=torch.int64, device='cuda') for i in range(pieces)]
    size = int(pieces * (1 << 25) * 0.005)
    changing = [m[:(1 << 25) // 2] for m in memory[:-(-size // (1 << 24))]]
    changing[-1] = changing[-1][:size - (len(changing) - 1) * (1 << 24)]
    while True:
        for part in changing:
            part.add_(1)
        torch.cuda.synchronize()
        meter.count()


def allocations(meter):
    driver = ctypes.CDLL('libcuda.so.1')
    context = ctypes.c_void_p()
    if (driver.cuInit(0) or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or
            driver.cuCtxSetCurrent(context)):
        sys.exit('app.py: no CUDA')
    for _ in range(int(sys.argv[2])):
        address = ctypes.c_uint64()
        if driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(2 << 20)):
            sys.exit('app.py: cuMemAlloc failed')
    idle(meter)


def main():
    if sys.argv[1] == 'allocations':  # does without PyTorch
        allocations(Meter())
    global torch
    import torch
    torch.manual_seed(1)
    extra = []
    if len(sys.argv) > 2 and sys.argv[1] not in ('llama', 'resident'):
        for _ in range(int(float(sys.argv[2]) * 4)):
            extra.append(torch.randint(0, 1 << 62, (1 << 25,), device='cuda'))  # 256 MiB each
    torch.zeros(1, device='cuda').item()
    work = {'llama': llama, 'train': train, 'storm': storm, 'idle': idle,
            'resident': resident}[sys.argv[1]]
    work(Meter())


if __name__ == '__main__':
    main()
