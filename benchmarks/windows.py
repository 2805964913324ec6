"""The speedup from a model's own sliding windows: prefill of Gemma 3 270M, 15 of its 18 layers see 512 tokens.

    python benchmarks/windows.py --update

The same program three times, for each dtype: with PyTorch's dense attention and the model's masks, with our dense kernel and
these masks, and with a kernel that skips hidden keys; and the model itself. All run in one process, in turn; hidden states are
compared with the model's in float32. The LM head, which a prompt needs for one token, is left out.
Prints a Markdown table; `--update` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from quality import conditions, windows
from readme import put_table

import lissom
from lissom.backends.eager.backend import Eager
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.frontends.models.huggingface import load
from lissom.measure.timing import time_calls
from lissom.passes.lowering.fuse_attention import FuseAttention
from lissom.passes.lowering.fuse_merged_attention import FuseMergedAttention
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention

EXAMPLE = 512
"""Tokens of the example the model is compiled with; the sequence is dynamic."""


class Without(Eager):
    """The eager backend without some of its lowering passes."""

    name: ClassVar[str] = "without"

    def __init__(self, *left_out: type[Pass]) -> None:
        self.left_out = left_out

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        return [pass_ for pass_ in super().lowering(device) if not isinstance(pass_, self.left_out)]


PROGRAMS: Mapping[str, Eager] = {
    "Lissom, PyTorch's dense attention": Without(LowerSparseAttention, FuseAttention, FuseMergedAttention),
    "Lissom, dense kernel under the masks": Without(LowerSparseAttention),
    "Lissom": Eager(),
}
PASSES = {"float32": "exact", "bfloat16": "cast{dtype=bf16}"}


def measure(length: int, seconds: float, dtypes: Sequence[str]) -> list[str]:
    """The rows of the table, for a prompt of this many tokens."""
    checkpoint = load("gemma3-270m")
    model = checkpoint.model.model
    assert isinstance(model, torch.nn.Module)
    ids = torch.cat([window.flatten() for window in windows(checkpoint, "evaluation", length)])[None, :length]

    def inputs(tokens: int) -> dict[str, object]:
        return {"input_ids": ids[:, :tokens], "attention_mask": torch.ones(1, tokens, dtype=torch.int64), "use_cache": False}

    calls: dict[str, Callable[[], object]] = {"PyTorch eager, float32": partial(model, **inputs(length))}
    for dtype in dtypes:
        for name, backend in PROGRAMS.items():
            compiled = lissom.compile(model, inputs(EXAMPLE), passes=PASSES[dtype], backend=backend, goal=None)
            calls[f"{name}, {dtype}"] = partial(compiled, **inputs(length))
    with torch.inference_mode():
        wanted = calls["PyTorch eager, float32"]().last_hidden_state  # pyright: ignore
        errors = {name: _distance(call().last_hidden_state, wanted) for name, call in calls.items()}  # pyright: ignore
        timings = time_calls(calls, seconds, least=3)
    rows: list[str] = []
    for name, timing in timings.items():
        dense = timings.get(f"{next(iter(PROGRAMS))}, {name.rpartition(', ')[2]}")
        gain = f"{dense.median_ms / timing.median_ms:.2f}" if dense is not None else ""
        rows.append(f"| {name} | {timing} | {length / timing.median_ms * 1e3:.0f} | {gain} | {errors[name]:.0e} |")
    return rows


def _distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.float() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt; %(default)s by default")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds per program; %(default)s by default")
    parser.add_argument("--dtypes", nargs="+", choices=list(PASSES), default=list(PASSES), help="dtypes of the programs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "| program | ms | tokens/s | over PyTorch's dense attention, same dtype | largest error |",
        "|---|---:|---:|---:|---:|",
        *measure(options.tokens, options.seconds, options.dtypes),
    ]
    printed = "\n".join([*lines, "", f"{options.tokens:,} tokens, one sequence. {conditions()}.", ""])
    print(printed)
    if options.update:
        put_table("windows", printed)


if __name__ == "__main__":
    main()
