"""Calls of one compiled model from several threads: `python -m tests.backends.threaded_calls --calls 1000`.

The model runs the C++ kernels on inputs of many lengths, some with results large enough to be kept between layers. Every answer
must equal the one a single thread gets, bit for bit.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import lissom
from lissom.backends.base import Backend

WIDTH = 64
LENGTHS = (2, 3, 7, 16, 33, 64, 130, 700)


class Block(nn.Module):
    """Attention and a gated feed-forward network, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.gate, self.down = (nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(8 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        wide = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(wide)) * self.up(wide))


def differing_calls(model: lissom.CompiledModel, dtype: torch.dtype, threads: int, calls: int) -> int:
    """How many of the calls of each thread, all at once, differ from those of one thread."""
    inputs = [torch.randn(1 + n % 3, tokens, WIDTH).to(dtype) for n, tokens in enumerate(LENGTHS)]
    wanted = [model(x) for x in inputs]

    def differs(number: int) -> bool:
        return not torch.equal(model(inputs[number % len(inputs)]), wanted[number % len(inputs)])

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(differs, range(threads * calls)))


def compiled(dtype: torch.dtype, passes: str = "exact", backend: str | Backend = "eager") -> lissom.CompiledModel:
    """The model, for any batch and length."""
    example = torch.randn(2, 16, WIDTH).to(dtype)
    model = nn.Sequential(Block(), Block()).eval().to(dtype)
    return lissom.compile(model, example, passes=passes, backend=backend, goal=None)


def main() -> int:
    """Run them on each backend; returns 1 when an answer differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--calls", type=int, default=1000, help="of each thread")
    parser.add_argument(
        "--backend", action="append", help="may be given again (default eager, onnxruntime, openvino and inductor)"
    )
    given = parser.parse_args()
    failed = False
    for backend in given.backend or ["eager", "onnxruntime", "openvino", "inductor"]:
        differing = differing_calls(compiled(torch.float32, backend=backend), torch.float32, given.threads, given.calls)
        print(f"{backend}: {given.threads} threads of {given.calls} calls, {differing} answers differ", flush=True)
        failed |= differing > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
