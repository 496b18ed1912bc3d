# SPDX-License-Identifier: GPL-2.0-only
"""A transformers Llama with random weights generates text greedily, a line a token.

usage: generate.py LAYERS TOKENS [PAUSE]; 4096 wide, as Llama-2-7B: about 0.4 GB a layer in bf16.
"""
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

layers, tokens = int(sys.argv[1]), int(sys.argv[2])
pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
torch.manual_seed(2)
config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                     num_hidden_layers=layers, vocab_size=32000)
with torch.device('cuda'):
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
print(f'allocated {torch.cuda.memory_allocated() / 1e9:.2f} GB', flush=True)
ids = torch.arange(1, 9, device='cuda')[None]
cache, step_input = None, ids
with torch.no_grad():
    for step in range(1, tokens + 1):
        out = model(step_input, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step_input = out.logits[:, -1:].argmax(-1)
        score = out.logits[0, -1].double().sum().item()
        print(f'tick {step} token {step_input.item()} score {score!r} ok', flush=True)
        time.sleep(pause)
print('done', flush=True)
time.sleep(1000)
