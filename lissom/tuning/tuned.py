"""`lissom.tune`: the best program under a bound, found by measuring."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Generic, TypeVar

import torch
from torch import nn

from lissom.compiler.analysis.structure.padding import padding_masks
from lissom.compiler.ir.fingerprint import fingerprint
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.options import Metric
from lissom.driver.compile import optimize_model
from lissom.driver.keywords import keywords_of
from lissom.driver.options import Inputs, Settings, read_data, split_inputs
from lissom.measure.machine import device_name
from lissom.runtime.compiled_model import CompiledModel
from lissom.tuning.build import Quality, Variant, Workshop, silent
from lissom.tuning.candidates import Aim, Candidate
from lissom.tuning.clock import Clock
from lissom.tuning.corrections import Factors
from lissom.tuning.costs import CostMeter, CostTable, worthwhile
from lissom.tuning.divergence import Divergence
from lissom.tuning.finalists import distil
from lissom.tuning.losses import LossMeter
from lissom.tuning.report import TuneReport
from lissom.tuning.request import Request, SearchSettings, check_request
from lissom.tuning.search import Search
from lissom.tuning.sites import PLAIN, Group, Option, groups_for, groups_of, linear_paths
from lissom.tuning.solve import require_scipy
from lissom.tuning.spelling import EXACT
from lissom.tuning.store import Store, number, text
from lissom.tuning.trials import Trials
from lissom.version import __version__

_MOST_COMPARED = 8
"""Batches of the loss table: every second one calibrates its passes, and outputs are compared on the others."""
_BATCHES = 8
"""The multiple of the example's rows that a call has with goal="throughput"."""
_COSTS, _LOSSES, _VERIFIED, _ALL = 0.25, 0.5, 0.7, 0.97
"""The fractions of the time after which the cost table, the loss table, the candidates and the distillation end."""
_VERIFIED_ALONE = 1.3
"""The factor on the first two without distillation."""
_MOST_NOTES = 3
_FITTED = 0.5
"""The part of the error on other batches below which that on the batches of calibration misleads."""
_PAYS = 0.97
"""The part of the cost that a program without padding, or in bfloat16, may have to be worth its conversions."""


Best = TypeVar("Best", covariant=True)


@dataclass(frozen=True)
class Tuned(Generic[Best]):
    """The result of a search.

    Attributes:
        best: the chosen program, compiled: a `CompiledModel`, or a `GenerationModel` from `tune_generation`.
        pipeline: its passes as text: `lissom.compile`, or `lissom.compile_generation` with the same max_length and batch, with
            this text, the same example inputs, `data=` the batches of `calibration`, `goal=None` and this backend gives the
            same program again.
        backend: its name.
        frontier: the candidates that no other matches in both cost and drop, the cheapest first.
        report: prints as a table of all candidates; `plot` draws them.
        calibration: the batches that passes calibrated on.

    Examples:
        >>> import torch, lissom
        >>> model, batches = torch.nn.Linear(16, 16).eval(), [torch.randn(2, 16) for _ in range(2)]
        >>> tuned = lissom.tune(model, batches[0], data=batches, goal="memory", minutes=0.05, distill=False)
        >>> isinstance(tuned.pipeline, str), tuned.backend
        (True, 'eager')
    """

    best: Best
    pipeline: str
    backend: str
    frontier: tuple[Candidate, ...]
    report: TuneReport
    calibration: tuple[Inputs, ...]

    def __repr__(self) -> str:
        return f"Tuned(pipeline={self.pipeline!r:.200}, backend='{self.backend}', {len(self.frontier)} on the frontier)"


@dataclass(frozen=True, kw_only=True)
class TuneSettings(SearchSettings):
    """The keywords of `lissom.tune`."""

    data: Iterable[Inputs]
    metric: Metric | None = None
    goal: str = "latency"


@keywords_of(TuneSettings)
def tune(model: nn.Module | Program, example_inputs: Inputs, settings: TuneSettings) -> Tuned[CompiledModel]:
    """Search the best program under a bound, and compile it.

    Each attention and feed-forward may lose heads or neurons or go as a whole, and its linear layers may be quantized or
    factored; embedding tables and LM heads may be quantized, and attentions see fewer keys. bfloat16 is tried where the
    processor has it, and padding is left out where that is faster. See docs/tuning.md for the method.

    Ctrl-C ends the search with the best program so far. The exact program is the first candidate, so there is always a result.

    Args:
        example_inputs: as in `compile`; times are measured on them.
        data: batches like example_inputs. Passes calibrate on them, and outputs are compared on them.
        metric: scores a callable that takes the model's arguments; higher is better.
        max_drop: the largest drop of the metric. Without a metric it bounds the relative output error, √(Σ‖y − y₀‖² / Σ‖y₀‖²)
            over real tokens.
        goal: what is to become small: `latency`, the time of a call on the example; `throughput`, the time of a call with eight
            times its rows; `memory`, the bytes of the weights.
        target: a speedup or size reduction such as 2.0, a time such as "5 ms", or a size such as "20 MB": the most accurate
            program that reaches it is sought, and max_drop bounds nothing.
        minutes: the time of the search; it ends within about the time of one candidate after that.
        backends: those that may run the result.
        distill: train the finalists on the data for a part of the time.
        store: a directory for what is found, written as it is found: a search that was stopped goes on from there, and another
            bound takes the same tables.
        for_server: `vllm` searches what `Optimized.save_compressed` writes for it: a scheme for each attention and each
            feed-forward, symmetric, in the model's own precision. Times are those of the backends here, and not of the server.

    Raises:
        LissomError: as `compile`.
        InputError: if the metric fails, returns NaN, or two measurements of the exact program differ by more than max_drop.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> batches = [torch.randn(2, 5, 32) for _ in range(2)]
        >>> tuned = lissom.tune(model, batches[0], data=batches, max_drop=0.1, minutes=0.1, distill=False)
        >>> tuned.best(batches[0]).shape
        torch.Size([2, 5, 32])
    """
    request = check_request(settings.data, settings.metric, settings.goal, settings)
    with searching(request) as clock:
        program, *_ = optimize_model(model, example_inputs, Settings(passes=EXACT, progress=silent))
        return search(program, example_inputs, request, settings.store, clock)


@contextmanager
def searching(request: Request) -> Generator[Clock]:
    """The clock of a search, shown while it runs. Raises UnsupportedError without scipy."""
    require_scipy()
    clock = Clock(60 * request.minutes)
    with clock.shown():
        clock.show("capture")
        yield clock


def search(program: Program, example: Inputs, request: Request, store: str | Path | None, clock: Clock) -> Tuned[CompiledModel]:
    """The result for a program in canonical form.

    Args:
        example: inputs of the program, on which times are measured.
    """
    notes, groups = list[str](), groups_of(program)
    if request.for_server is not None:
        groups = groups_for(request.for_server, groups)
    trials = _trials(program, example, request, Store(store), clock)
    try:
        _search(trials, groups, request, notes)
    except KeyboardInterrupt:
        notes.append(f"interrupted after {clock.passed:.0f} s; this is the best program so far")
    return _result(trials, groups, request, notes)


def _trials(program: Program, example: Inputs, request: Request, kept: Store, clock: Clock) -> Trials:
    """The exact program measured, and the candidates of earlier calls."""
    args, kwargs = split_inputs(example)
    flat = program.signature.flatten(args, kwargs)
    batches, _ = read_data(request.data, program.signature)
    sample = _many_rows(program, flat) if request.goal == "throughput" else flat
    workshop = Workshop(program, example, sample, request.data, request.backends)
    clock.show("the exact program")
    first = Variant(next(iter(request.backends)))
    base = workshop.base(first)
    # With a metric, the outputs are compared for what the tables are built on alone.
    compared = batches if request.metric is None else batches[:_MOST_COMPARED]
    quality = Quality.of(base, Divergence(program, compared), request.metric, request.max_drop)
    metric = "" if request.metric is None else _identity(request.metric, quality)
    served = () if request.for_server is None else (request.for_server,)
    key = fingerprint(_place(workshop), batches, metric, request.memory, *served)
    milliseconds, size = _earlier_time(kept, key, first.backend) or workshop.milliseconds(base), workshop.size(base)
    exact = Candidate(EXACT, first.backend, milliseconds, milliseconds, milliseconds, size)
    aim = Aim(request.memory, request.max_drop, request.target_cost(exact.cost(request.memory)))
    kept.add(
        "run",
        key,
        request.goal,
        model=program.name,
        backend=first.backend,
        memory=request.memory,
        max_drop=request.max_drop,
        target=aim.target,
        metric=metric,
        milliseconds=milliseconds,
        bytes=size,
    )
    trials = Trials(workshop, quality, aim, kept, key, clock, [exact], request.distill)
    trials.recall()
    return trials


def _earlier_time(kept: Store, key: str, backend: str) -> float | None:
    """The time of the exact program in an earlier call, to which the times of its candidates are relative."""
    runs = (run for run in kept.all("run", key) if text(run, "backend") == backend)
    return next((milliseconds for run in runs if (milliseconds := number(run, "milliseconds", 0.0))), None)


def _place(workshop: Workshop) -> str:
    """A hash of all that times depend on: the program, the versions, the machine, and the inputs."""
    machine = device_name(_device(workshop.sample)), torch.get_num_threads(), torch.__version__
    return fingerprint(workshop.fingerprint, __version__, *machine, workshop.sample)


def _search(trials: Trials, groups: Sequence[Group], request: Request, notes: list[str]) -> None:
    """Measure the tables of every variant, verify candidates, and distill finalists."""
    program, clock = trials.workshop.program, trials.clock
    clock.begin()
    bases, linears = _variants(trials, request), linear_paths(program)
    stretch = 1.0 if request.distill else _VERIFIED_ALONE
    every = list(dict.fromkeys(scheme for group in groups for scheme in group.schemes))
    costs: dict[Variant, CostTable] = {}
    schemes = {PLAIN}
    key = fingerprint(_place(trials.workshop), request.memory)
    for turn, variant in enumerate(bases, 1):
        meter = CostMeter(trials.workshop, groups, linears, variant, request.memory, trials.store, key, clock)
        costs[variant] = meter.measure(every, _COSTS * stretch * turn / len(bases))
        schemes |= worthwhile(costs[variant], groups, every)
    samples = list(trials.quality.divergence.batches[:_MOST_COMPARED])
    judged, calibrating = samples[::2], samples[1::2] or samples
    key = fingerprint(trials.workshop.fingerprint, __version__, judged, calibrating)
    divergence = Divergence(program, judged)
    meter = LossMeter(program, groups, linears, calibrating, divergence, trials.store, key, clock)
    saving = partial(_saving, costs, groups)
    used = [scheme for scheme in every if scheme in schemes]
    losses = meter.measure(used, saving, _LOSSES * stretch)
    search = Search(trials, groups, linears, bases)
    if request.metric is None:
        in_sample = meter.in_sample(losses, trials.quality.divergence, trials.quality.divergence.batches)
        notes += _too_little(in_sample)
        # The largest, since a factor that is too small leads to programs far over the bound.
        search.usual = Factors(min(max((own / other for own, other in in_sample.values()), default=1.0), 1.0) or 1.0)
    for variant in bases:
        search.add_table(variant, losses, costs[variant], used)
    if losses.measured < losses.wanted:
        notes.append(f"{losses.measured} of {losses.wanted} losses were measured; the others are interpolated")
    failed = [sentence for table in (losses, *costs.values()) for sentence in table.failed]
    notes += [f"left out: {sentence:.200}" for sentence in failed[:_MOST_NOTES]]
    search.run(_VERIFIED if request.distill else _ALL)
    if request.distill:
        distil(search, _ALL)


def _saving(costs: Mapping[Variant, CostTable], groups: Sequence[Group], index: int, option: Option) -> float:
    """The most that an option of a group saves in any variant; 0 where no cost is known."""
    of_variants = (table.cost(groups[index], option) for table in costs.values())
    return max((-cost for cost in of_variants if math.isfinite(cost)), default=0.0)


def _variants(trials: Trials, request: Request) -> dict[Variant, Candidate]:
    """The backends, each in the program's own precision and in bfloat16 where that is cheaper, measured; the cheapest first.

    Padding is left out where that is faster on the example inputs. A checkpoint for a server says neither.
    """
    padded = not request.memory and request.for_server is None and _has_padding(trials.workshop.program, trials.workshop.sample)
    measured = {Variant(trials.exact.backend): trials.exact}
    for backend in request.backends:
        plain: Candidate | None = None
        for variant in (Variant(backend), *([] if request.for_server else [Variant(backend, bf16=True)])):
            base = measured.get(variant) or _base(trials, variant)
            if base is None or (plain is not None and base.cost(request.memory) >= _PAYS * plain.cost(request.memory)):
                continue
            plain = plain or base
            packed = replace(variant, packed=True)
            without = _base(trials, packed) if padded else None
            if without is not None and without.milliseconds < _PAYS * base.milliseconds:
                measured.pop(variant, None)
                variant, base = packed, without
            measured[variant] = base
    ordered = sorted(measured, key=lambda variant: measured[variant].cost(request.memory))
    return {variant: measured[variant] for variant in ordered}


def _has_padding(program: Program, sample: Sample) -> bool:
    """True if a padding mask of these inputs hides tokens."""
    places = (program.placeholders.index(mask) for mask in program.fact(padding_masks))
    return any(bool((sample[at] == 0).any()) for at in places)


def _base(trials: Trials, variant: Variant) -> Candidate | None:
    """The variant without further passes; None if it fails, or is over the bound, which leaves nothing for the passes."""
    base = trials.measure(Candidate(variant.pipeline, variant.backend))
    return base if not base.failed and (trials.aim.target is not None or trials.aim.meets(base)) else None


def _result(trials: Trials, groups: Sequence[Group], request: Request, notes: list[str]) -> Tuned[CompiledModel]:
    chosen, compiled = trials.chosen()
    name, scored = trials.workshop.program.name, request.metric is not None
    report = TuneReport(name, trials.aim, tuple(trials.candidates), chosen, scored, groups=tuple(groups))
    why = [report.why_exact()] if chosen is trials.exact else []
    report = replace(report, notes=(*notes, *why, *_remarks(trials, request)))
    return Tuned(compiled, chosen.pipeline, chosen.backend, tuple(report.frontier), report, tuple(request.data))


def _too_little(in_sample: Mapping[str, tuple[float, float]]) -> Iterator[str]:
    """A sentence where the data are so few that passes fit them much better than other data."""
    kind, (own, other) = min(in_sample.items(), key=lambda entry: entry[1][0] / entry[1][1], default=("", (1.0, 1.0)))
    if own < _FITTED**2 * other:
        yield (
            f"data= is small: {kind} with fewer units has the error {own**0.5:.2g} on the batches that its pass calibrates "
            f"on, and {other**0.5:.2g} on others; give more batches, and a metric with data of its own"
        )


def _remarks(trials: Trials, request: Request) -> Iterator[str]:
    """Sentences on the data, the metric and the store."""
    if len(request.data) == 1:
        yield "data= holds one batch, so passes calibrate on the batch that is judged: give two or more"
    if request.metric is None:
        yield "without a metric, drops are relative output errors on data="
    if request.for_server is not None:
        yield f"the passes are those of checkpoints for {request.for_server}; times are Lissom's here, and not the server's"
    if trials.quality.noise:
        yield f"two measurements of the exact program's metric differ by {trials.quality.noise:.2g}; drops are as uncertain"
    if trials.store.foreign:
        yield (
            "nothing in the store fits this call: it holds measurements of another model, other weights, data or inputs, "
            "another machine or version"
        )
    if trials.store.skipped:
        yield f"{trials.store.skipped} unreadable lines of the store were passed over"


def _many_rows(program: Program, flat: Sample) -> Sample:
    """The example with eight times its rows; the example itself where the rows are fixed."""
    signature = program.signature
    batch = next((leaf.type.shape[0] for leaf in signature.tensors if leaf.type.rank), None)
    sizes = signature.sizes_of(flat)
    symbol = next((size for size in sizes if size == batch), None)
    if symbol is None:
        return flat
    return signature.sample_at(flat, {symbol: signature.dimensions[symbol].at_most(_BATCHES * sizes[symbol])}) or flat


def _device(sample: Sample) -> torch.device:
    return sample[0].device if sample else torch.device("cpu")


def _identity(metric: Metric, quality: Quality) -> str:
    """The key of a metric in a store: the name, the code of a function, and the exact program's score unless it varies."""
    # The caller's own function, of a decoder's metric and of a partial one.
    own: object = getattr(metric, "metric", metric)
    own = getattr(own, "func", own)
    code = getattr(own, "__code__", None)
    score = "" if quality.noise else repr(quality.score)
    name = getattr(own, "__qualname__", type(own).__qualname__)
    return f"{name} {fingerprint(*(_code_parts(code) if isinstance(code, CodeType) else ()))} {score}"


def _code_parts(code: CodeType) -> list[object]:
    """The instructions, names and plain constants of a function and of those inside of it."""
    parts: list[object] = [code.co_code.hex(), *code.co_names]
    for constant in code.co_consts:
        parts += (
            _code_parts(constant)
            if isinstance(constant, CodeType)
            else [constant]
            if isinstance(constant, (str, int, float))
            else []
        )
    return parts
