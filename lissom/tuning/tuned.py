"""`lissom.tune`: the best program under a bound, found by measuring."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lissom.backends.base import Backend, sample_at
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.options import Metric
from lissom.driver.compile import optimize_model
from lissom.driver.options import Inputs, Settings, read_data, split_inputs
from lissom.errors import LissomError
from lissom.inspect.machine import device_name
from lissom.ops.native.instruction_sets import processor_features
from lissom.runtime.compiled_model import CompiledModel
from lissom.tuning.build import Quality, Variant, Workshop
from lissom.tuning.candidates import EXACT, Aim, Candidate
from lissom.tuning.clock import Clock
from lissom.tuning.costs import CostMeter, worthwhile
from lissom.tuning.divergence import Divergence
from lissom.tuning.losses import LossMeter
from lissom.tuning.report import TuneReport
from lissom.tuning.request import Request, check_request
from lissom.tuning.search import Search
from lissom.tuning.sites import PLAIN, groups_of, linear_paths
from lissom.tuning.store import Store, fingerprint, program_fingerprint
from lissom.version import __version__

_JUDGED = 4
"""Batches on which the loss table compares outputs; as many others calibrate its passes."""
_BATCHES = 8
"""How many times the example's rows a call has with goal="throughput"."""
_FAST_BF16 = ("avx512_bf16", "amx_bf16")
_COSTS, _LOSSES, _VERIFIED, _ALL = 0.25, 0.5, 0.7, 0.97
"""The fractions of the time after which the tables, the candidates and the distillation end."""


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    best: the chosen program, compiled. pipeline: its passes as text: `lissom.compile` with this text, the same example
        inputs, the same data, `goal=None` and this backend gives the same program again. backend: its name.
    frontier: the candidates that no other matches in both cost and drop, the cheapest first.
    report: prints as a table of all candidates; `plot` draws them.
    """

    best: CompiledModel
    pipeline: str
    backend: str
    frontier: tuple[Candidate, ...]
    report: TuneReport

    def __repr__(self) -> str:
        return f"Tuned(pipeline={self.pipeline!r:.200}, backend='{self.backend}', {len(self.frontier)} on the frontier)"


def tune(
    model: nn.Module | Program,
    example_inputs: Inputs,
    *,
    data: Iterable[Inputs],
    metric: Metric | None = None,
    max_drop: float = 0.01,
    goal: str = "latency",
    target: float | str | None = None,
    minutes: float = 20,
    backends: Sequence[str | Backend] = ("eager",),
    distill: bool = True,
    store: str | Path | None = None,
) -> Tuned:
    """Search the best program under a bound, and compile it.

    Each attention and feed-forward may lose heads or neurons or go as a whole, and its linear layers may be quantized or
    factored; bfloat16 is tried where the processor has it. See docs/tuning.md for the method.

    example_inputs: as in `compile`; times are measured on them.
    data: batches like example_inputs. Passes calibrate on them, and outputs are compared on them.
    metric: scores a callable that takes the model's arguments; higher is better. max_drop: the largest drop of the metric.
        Without a metric it bounds the relative output error, √(Σ‖y − y₀‖² / Σ‖y₀‖²) over real tokens.
    goal: what is to become small: `latency`, the time of a call on the example; `throughput`, the time of a call with eight
        times its rows; `memory`, the bytes of the weights.
    target: a speedup or size reduction such as 2.0, a time such as "5 ms", or a size such as "20 MB": the most accurate program
        that reaches it is sought, and max_drop bounds nothing.
    minutes: the time of the search; it ends within about the time of one candidate after that.
    backends: those that may run the result. distill: train the finalists on the data for a part of the time.
    store: a directory for what is found, written as it is found: a search that was stopped goes on from there, and another
        bound takes the same tables.

    Ctrl-C ends the search with the best program so far. The exact program is the first candidate, so there is always a result.

    Raises: LissomError, as `compile`; InputError if the metric fails, returns NaN, or two measurements of the exact program
        differ by more than max_drop.

    >>> import torch, lissom
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    >>> batches = [torch.randn(2, 5, 32) for _ in range(2)]
    >>> tuned = lissom.tune(model, batches[0], data=batches, max_drop=0.1, minutes=0.1, distill=False)
    >>> tuned.best(batches[0]).shape
    torch.Size([2, 5, 32])
    """
    request = check_request(
        data=data,
        metric=metric,
        max_drop=max_drop,
        goal=goal,
        target=target,
        minutes=minutes,
        backends=backends,
        distill=distill,
    )
    clock, kept = Clock(60 * request.minutes), Store(store)
    with clock.shown():
        clock.show("capture")
        program, _ = optimize_model(model, example_inputs, Settings(passes=EXACT, progress=lambda *_: None))
        search, notes = _prepared(program, example_inputs, request, kept, clock)
        try:
            _searched(search, request, notes)
        except KeyboardInterrupt:
            notes.append(f"interrupted after {clock.passed:.0f} s; this is the best program so far")
        return _result(search, request, notes)


def _prepared(
    program: Program, example: Inputs, request: Request, kept: Store, clock: Clock
) -> tuple[Search, list[str]]:
    """The search with the exact program measured, and notes for the report."""
    signature = program.signature
    args, kwargs = split_inputs(example)
    flat = signature.flatten(args, kwargs)
    batches, _ = read_data(request.data, signature)
    sample = _many_rows(program, flat) if request.goal == "throughput" else flat
    workshop = Workshop(program, example, sample, request.data, request.backends)
    clock.show("the exact program")
    first = Variant(next(iter(request.backends)))
    base = workshop.base(first)
    quality = Quality.of(base, Divergence(program, batches), request.metric, request.max_drop)
    milliseconds, size = workshop.milliseconds(base), workshop.size(base)
    exact = Candidate(EXACT, first.backend, milliseconds, milliseconds, milliseconds, size)
    aim = Aim(request.memory, request.max_drop, request.target_cost(exact.cost(request.memory)))
    on = fingerprint(program_fingerprint(program), __version__)
    place = fingerprint(device_name(_device(flat)), torch.get_num_threads(), torch.__version__, sample)
    scored = "" if request.metric is None else f"{_named(request.metric)} {quality.score!r}"
    key = fingerprint(on, place, batches, scored)
    search = Search(workshop, quality, aim, groups_of(program), linear_paths(program), kept, key, clock, [exact], {first: exact})
    search.best = (exact.pipeline + exact.backend, base)
    facts = {"model": program.name, "goal": request.goal, "max_drop": request.max_drop, "memory": request.memory}
    bound = {"target": aim.target, "metric": scored, "milliseconds": milliseconds, "bytes": size, "backend": first.backend}
    kept.add("run", key, "run", **facts, **bound)
    search.recall()
    notes = [f"{kept.skipped} unreadable lines of the store were passed over"] if kept.skipped else []
    if request.metric is None:
        notes.append("without a metric, drops are relative output errors on data=")
    if quality.noise:
        notes.append(f"two measurements of the exact program differ by {quality.noise:.2g}")
    return search, notes


def _searched(search: Search, request: Request, notes: list[str]) -> None:
    """Measure the tables of every variant, and search."""
    variants = _variants(search, request)
    search.clock.begin()
    part = 1.0 if request.distill else 1.3
    on = fingerprint(program_fingerprint(search.workshop.program), __version__)
    cost_key = fingerprint(on, device_name(_device(search.workshop.sample)), torch.get_num_threads(), torch.__version__)
    cost_key = fingerprint(cost_key, request.memory, search.workshop.sample)
    everything = list(dict.fromkeys(scheme for group in search.groups for scheme in group.schemes))
    costs, schemes = {}, [PLAIN]
    for turn, variant in enumerate(variants, 1):
        arguments = (search.workshop, search.groups, search.linears, variant, request.memory, search.store, cost_key, search.clock)
        costs[variant] = CostMeter(*arguments).measure(everything, _COSTS * part * turn / len(variants))
        schemes += [item for item in worthwhile(costs[variant], search.groups, everything) if item not in schemes]
    args = [split_inputs(batch) for batch in request.data]
    samples = [search.workshop.program.signature.flatten(*item) for item in args[: 2 * _JUDGED]]
    judged, calibrating = samples[: (len(samples) + 1) // 2], samples[(len(samples) + 1) // 2 :] or samples
    divergence = Divergence(search.workshop.program, judged)
    key = fingerprint(on, judged, calibrating)
    meter = LossMeter(
        search.workshop.program, search.groups, search.linears, calibrating, divergence, search.store, key, search.clock
    )
    losses = meter.measure(schemes, _LOSSES * part)
    for variant in variants:
        search.add_tables(variant, losses, costs[variant], schemes)
    if losses.measured < losses.wanted:
        notes.append(f"{losses.measured} of {losses.wanted} losses were measured; the others are interpolated")
    failed = [sentence for table in (losses, *costs.values()) for sentence in table.failed]
    notes += [f"left out: {sentence}"[:300] for sentence in failed[:3]]
    search.run(_VERIFIED * part if request.distill else _ALL, distill=request.distill, whole=_ALL)


def _variants(search: Search, request: Request) -> list[Variant]:
    """The backends, each in the program's own precision and in bfloat16 where that is fast; the cheapest first."""
    device = _device(search.workshop.sample)
    fast = device.type == "cuda" or any(name in processor_features() for name in _FAST_BF16)
    for backend in request.backends:
        for variant in (Variant(backend), *([Variant(backend, bf16=True)] if fast else [])):
            if variant in search.bases:
                continue
            found = search.measured(Candidate(variant.pipeline(""), backend, table_cost=None))
            if not found.failed:
                search.bases[variant] = found
    first = next(iter(search.bases.values()))
    for variant in list(search.bases):
        try:
            search.workshop.base(variant)
        except LissomError:
            del search.bases[variant]
    ordered = sorted(search.bases, key=lambda variant: search.bases[variant].cost(request.memory))
    # bfloat16 alone is over some bounds; it then leaves nothing for the other passes.
    kept = [item for item in ordered if search.bases[item] is first or search.aim.target or search.aim.meets(search.bases[item])]
    return kept


def _result(search: Search, request: Request, notes: list[str]) -> Tuned:
    chosen = search.aim.choose(search.candidates)
    if chosen.exact and (missed := search.aim.nearest_miss(search.candidates)) is not None:
        what = "drop" if request.target is None else "cost"
        notes.append(f"no candidate met the bound, so the exact program is kept; the nearest has {search.aim.miss(missed):.2f} x the {what} allowed: {missed.pipeline}")
    if search.best is not None and search.best[0] == chosen.pipeline + chosen.backend:
        compiled = search.best[1]
    else:
        compiled = search.workshop.build(chosen.pipeline, chosen.backend)
    frontier = search.aim.frontier(search.candidates)
    report = TuneReport(
        search.workshop.program.name, search.aim, tuple(search.candidates), chosen, request.metric is not None, tuple(notes),
        tuple(search.groups),
    )
    return Tuned(compiled, chosen.pipeline, chosen.backend, tuple(frontier), report)


def _many_rows(program: Program, flat: Sample) -> Sample:
    """The example with eight times its rows; the example itself where the rows are fixed."""
    signature = program.signature
    batch = next((leaf.type.shape[0] for leaf in signature.tensors if leaf.type.rank), None)
    sizes = signature.sizes_of(flat)
    symbol = next((found for found in sizes if found == batch), None)
    if symbol is None:
        return flat
    return sample_at(program, flat, {symbol: signature.dimensions[symbol].at_most(_BATCHES * sizes[symbol])}) or flat


def _device(sample: Sample) -> torch.device:
    return sample[0].device if sample else torch.device("cpu")


def _named(metric: Metric) -> str:
    return str(getattr(metric, "__qualname__", type(metric).__qualname__))


