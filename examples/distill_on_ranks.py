"""MiniLM distilled by several processes together: `torchrun --nproc-per-node 2 examples/distill_on_ranks.py`.

Started as usual it trains in one process, with the same result up to rounding.
"""

import os
from pathlib import Path

import torch

import lissom
from lissom.frontends.models.huggingface import load

on_ranks = "WORLD_SIZE" in os.environ
if on_ranks:
    torch.distributed.init_process_group("gloo")
checkpoint = load("minilm")
lines = Path(__file__).read_text(encoding="utf-8").splitlines()  # any text of your own; thousands of sentences in earnest
sentences = [line.strip() for line in lines if line.strip()]
data = [checkpoint.encode(sentences[at : at + 8]) for at in range(0, len(sentences), 8)]

# Every rank calls the same with the same data, and computes its rows of each batch.
passes = "prune-layers{keep=0.5},distill{steps=10}"
small = lissom.optimize(checkpoint.model, checkpoint.example_inputs, passes=passes, data=data)
if os.environ.get("RANK", "0") == "0":
    print("\n".join(small.report.history.steps[-1].notes))
if on_ranks:
    torch.distributed.destroy_process_group()
