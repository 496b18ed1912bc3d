# SPDX-License-Identifier: GPL-2.0-only
"""Trains a small model and prints the loss and a checksum of the weights at every step."""
import os
import sys
import time

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
import torch  # noqa: E402

steps = int(sys.argv[1])
pause = float(sys.argv[2]) if len(sys.argv) > 2 else 0.05
torch.manual_seed(1)
torch.use_deterministic_algorithms(True)
model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 4096),
                            torch.nn.GELU(), torch.nn.Linear(4096, 10)).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(1, steps + 1):
    x = torch.randn(256, 1024, device='cuda')
    y = torch.randint(0, 10, (256,), device='cuda')
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    checksum = sum(p.double().sum().item() for p in model.parameters())
    print(f'tick {step} loss {loss.item():.9f} weights {checksum!r} ok', flush=True)
    time.sleep(pause)
print('done', flush=True)
time.sleep(1000)
