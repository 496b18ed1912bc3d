# SPDX-License-Identifier: GPL-2.0-only
"""Asks NVML for the memory of GPU 0 again and again."""
import time

import pynvml

pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
tick = 0
while True:
    tick += 1
    total = pynvml.nvmlDeviceGetMemoryInfo(gpu).total
    print(f'tick {tick} total {total}', 'ok' if total > 0 else 'WRONG', flush=True)
    time.sleep(0.05)
