"""Sparse attention on a CPU: time and memory against the length, and the length from which the sparse kernel is fastest.

    python benchmarks/sparse_attention.py
    python benchmarks/sparse_attention.py --update

One batch of 12 heads in float32, an eighth of all pairs visible: a window around each query, or random blocks of 64 tokens. The
engines run in turn in one process, so that ratios hold on a busy machine; each engine that computes the pattern is compared
with PyTorch's. Memory is measured in separate processes. `--update` puts tables and a figure into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from apart import run_apart
from figures import save, subplots
from memory import reset_peak, used_memory
from quality import conditions
from readme import put_table
from torch.nn.functional import scaled_dot_product_attention

from lissom.measure.timing import Timing, time_calls
from lissom.ops import block_sparse_attention, flex_block_sparse_attention, fused_attention
from lissom.ops.native import load_kernels
from lissom.ops.pattern import LAYOUT, Condition, Pattern

FIGURE = Path(__file__).parent / "sparse_attention.svg"
KINDS = ("window", "random blocks")
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (32, 64)
HEADS, BLOCK, KEPT = 12, 64, 8
ROUNDS = 3
"""The least number of runs of every engine."""
ALLOWED = 1e-4
"""Tolerance of the relative error between engines, which sum in float32 in different orders."""

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """The inputs of all engines: q, k, v of [1, 12, tokens, head_dim] as slices of a merged projection."""

    kind: str
    tokens: int
    head_dim: int

    @cached_property
    def projections(self) -> Sequence[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        merged = torch.randn(1, self.tokens, 3 * HEADS * self.head_dim, generator=generator)
        return [part.unflatten(-1, (HEADS, self.head_dim)).transpose(1, 2) for part in merged.chunk(3, -1)]

    @cached_property
    def pattern(self) -> Pattern:
        reach = self.tokens // (2 * KEPT)
        return Pattern(((Condition(-1, 1, -reach, reach) if self.kind == "window" else LAYOUT,),), BLOCK)

    @cached_property
    def layout(self) -> torch.Tensor | None:
        """An eighth of the blocks of each row, and at least one, so short lengths keep more."""
        if self.kind == "window":
            return None
        count, generator = self.tokens // BLOCK, torch.Generator().manual_seed(1)
        order = torch.rand(count, count, generator=generator).argsort(-1)
        return (order < max(1, count // KEPT))[None]

    def mask(self) -> torch.Tensor:
        return self.pattern.mask(self.tokens, self.tokens, self.layout)[None]


def _dense(case: Case) -> Call:
    q, k, v = case.projections
    return lambda: scaled_dot_product_attention(q, k, v)


def _masked(case: Case) -> Call:
    (q, k, v), mask = case.projections, case.mask()
    return lambda: scaled_dot_product_attention(q, k, v, mask)


def _fused(case: Case) -> Call:
    q, k, v = case.projections
    return lambda: fused_attention(q, k, v, scale=case.head_dim**-0.5)


def _fused_masked(case: Case) -> Call:
    (q, k, v), mask = case.projections, case.mask()
    return lambda: fused_attention(q, k, v, mask, scale=case.head_dim**-0.5)


def _flex(case: Case) -> Call:
    return lambda: flex_block_sparse_attention(*case.projections, None, case.layout, **_options(case))


def _block_sparse(case: Case) -> Call:
    return lambda: block_sparse_attention(*case.projections, None, case.layout, **_options(case))


def _options(case: Case) -> dict[str, object]:
    return {"pattern": case.pattern.encode(), "block": case.pattern.block, "scale": case.head_dim**-0.5}


OURS = "Lissom block-sparse"
MASKED = "PyTorch, boolean mask"
ENGINES: Mapping[str, Callable[[Case], Call]] = {
    "PyTorch, dense": _dense,
    MASKED: _masked,
    "Lissom, dense": _fused,
    "Lissom, boolean mask": _fused_masked,
    "FlexAttention, compiled": _flex,
    OURS: _block_sparse,
}
DENSE = ("PyTorch, dense", "Lissom, dense")
"""Engines that compute dense attention, without the pattern."""


Times = dict[tuple[str, Case], Timing]
Peaks = dict[tuple[str, Case], float]


def measure(case: Case, engines: Sequence[str], seconds: float) -> dict[str, Timing]:
    """Run every engine in turn, until each has had `seconds` on average and at least three runs."""
    calls = {name: ENGINES[name](case) for name in engines}
    _compare(case, {name: call() for name, call in calls.items()})
    return time_calls(calls, seconds, least=ROUNDS)


def _compare(case: Case, outputs: Mapping[str, torch.Tensor]) -> None:
    if MASKED not in outputs:
        return
    wanted = outputs[MASKED]
    for name, result in outputs.items():
        error = float((result - wanted).norm() / wanted.norm())
        if name not in DENSE and error > ALLOWED:
            raise SystemExit(f"{name} differs from {MASKED} by {error:.1e} at {case}; allowed are {ALLOWED:g}")


def peaks(engine: str, kind: str, head_dim: int, lengths: Sequence[int]) -> dict[int, float]:
    """The peak memory of an engine at each length in MB, with its mask and without q, k and v, in a process of its own."""
    measured = run_apart(__file__, ["--peaks", engine, kind, str(head_dim), "--lengths", *map(str, lengths)])
    return {int(length): peak for length, peak in cast("dict[str, float]", measured).items()}


def _print_peaks(engine: str, kind: str, head_dim: int, lengths: Sequence[int]) -> None:
    """Print the peaks; a first call loads the engine, which is not counted."""
    ENGINES[engine](Case(kind, 64, head_dim))()
    peak_mb: dict[int, float] = {}
    for tokens in sorted(lengths):
        case = Case(kind, tokens, head_dim)
        held = [projection.sum() for projection in case.projections]  # touches them, so that they are resident before
        reset_peak()
        before = used_memory("VmRSS")
        result = ENGINES[engine](case)()
        peak_mb[tokens] = max(0, used_memory("VmHWM") - before) / 1e6
        del held, result, case
    print(json.dumps(peak_mb))


def crossing(times: Times, other: str, kind: str, head_dim: int, lengths: Sequence[int]) -> str:
    """The shortest length from which on ours is faster than the other engine at every length measured."""
    first = None
    for tokens in sorted(lengths, reverse=True):
        case = Case(kind, tokens, head_dim)
        if times[OURS, case].median_ms >= times[other, case].median_ms:
            break
        first = tokens
    return "never" if first is None else f"from {first:,}"


def table(title: str, cells: Callable[[str, int], str], engines: Sequence[str], lengths: Sequence[int], last: str = "") -> str:
    """One row per engine, one column per length, and a last column `last`, given at length 0."""
    columns = [*(f"{tokens:,}" for tokens in lengths), *([last] if last else [])]
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in engines:
        row = [cells(name, tokens) for tokens in (*lengths, *([0] if last else []))]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def report(times: Times, memory: Peaks, engines: Sequence[str], lengths: Sequence[int], dims: Sequence[int]) -> str:
    """All tables as Markdown."""
    parts: list[str] = []
    for head_dim in dims:
        for kind in KINDS:

            def cell(name: str, tokens: int, kind: str = kind, head_dim: int = head_dim) -> str:
                if tokens:
                    return str(times[name, Case(kind, tokens, head_dim)])
                return "" if name == OURS or OURS not in engines else crossing(times, name, kind, head_dim, lengths)

            parts.append(table(f"{kind}, heads of {head_dim}, ms", cell, engines, lengths, "block-sparse is faster"))
            if memory:
                title = f"{kind}, heads of {head_dim}, MB"
                parts.append(table(title, lambda n, t, k=kind, d=head_dim: f"{memory[n, Case(k, t, d)]:.0f}", engines, lengths))
    about = (
        "ms of a call: median (middle half of the runs), the engines in turn in one process. MB: what the engine's own process "
        "takes at most beyond its inputs; FlexAttention's is mostly its compiler's. An eighth of the pairs is seen, of random "
        f"blocks one a row at least: half at 128 tokens, a quarter at 256. {HEADS} heads, float32"
    )
    return "\n".join([*parts, f"{about}. {conditions()}."]) + "\n"


def draw(times: Times, memory: Peaks, engines: Sequence[str], lengths: Sequence[int], dims: Sequence[int]) -> None:
    """Milliseconds, and memory if measured, against the length."""
    rows = [(name, kind, values) for name, values in (("ms", times), ("MB", memory)) if values for kind in KINDS]
    figure, axes = subplots(len(dims), len(rows), figsize=(4.2 * len(rows), 3.6 * len(dims)), squeeze=False)
    for line, head_dim in zip(axes, dims, strict=True):
        for axis, (unit, kind, values) in zip(line, rows, strict=True):
            for name in engines:
                measurements = [values[name, Case(kind, tokens, head_dim)] for tokens in lengths]
                heights = [
                    measured.median_ms if isinstance(measured, Timing) else max(measured, 1) for measured in measurements
                ]
                axis.plot(lengths, heights, marker="o", markersize=3, label=name, linewidth=2.5 if name == OURS else 1.2)
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{kind}, heads of {head_dim}: {unit}")
            axis.set_xticks(list(lengths), [f"{tokens:,}" for tokens in lengths], rotation=45, fontsize=7)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    save(figure, FIGURE)


def main() -> None:
    """Measure, print, and with `--update` put it into the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES), help="which to measure")
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens, powers of two from 128 on")
    parser.add_argument("--head-dims", nargs="*", type=int, default=list(HEAD_DIMS), help="%(default)s by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per engine and length; %(default)s by default")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--update", action="store_true", help="put the tables and the figure into benchmarks/README.md")
    parser.add_argument("--peaks", nargs=3, metavar=("ENGINE", "KIND", "HEAD_DIM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    missing = load_kernels()
    if missing:
        raise SystemExit(missing)
    if options.peaks:
        engine, kind, head_dim = options.peaks
        return _print_peaks(engine, kind, int(head_dim), options.lengths)
    engines, lengths, dims = options.engines, sorted(options.lengths), options.head_dims
    times: Times = {}
    memory: Peaks = {}
    for case in [Case(kind, tokens, dim) for dim in dims for kind in KINDS for tokens in lengths]:
        timings = measure(case, engines, options.seconds)
        times |= {(name, case): timing for name, timing in timings.items()}
        print(case, {name: str(timing) for name, timing in timings.items()}, file=sys.stderr, flush=True)
    if not options.no_memory:
        for name, kind, dim in [(name, kind, dim) for dim in dims for kind in KINDS for name in engines]:
            peak_mb = peaks(name, kind, dim, lengths)
            memory |= {(name, Case(kind, tokens, dim)): peak for tokens, peak in peak_mb.items()}
            print(name, kind, dim, peak_mb, file=sys.stderr, flush=True)
    printed = report(times, memory, engines, lengths, dims)
    print(printed)
    if options.update:
        draw(times, memory, engines, lengths, dims)
        put_table("sparse_attention", printed + f"\n![milliseconds and megabytes against the length]({FIGURE.name})\n")
    return None


if __name__ == "__main__":
    main()
