"""The steps of a compile: capture the model, run the passes, build the executable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from lissom.artifacts.facts import Facts
from lissom.artifacts.pruned_tokenizer import renumbered_facts
from lissom.backends.base import Backend
from lissom.backends.builds import Builds
from lissom.backends.distributed.backend import Distributed
from lissom.backends.eager.backend import Eager
from lissom.backends.fastest import build_fastest
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples, few_rows, larger
from lissom.compiler.memory import free_dropped_programs, give_back_memory, heap_set_aside
from lissom.compiler.pipeline.history import History, Size, Step
from lissom.compiler.pipeline.options import NUMERIC, Progress
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import format_pipeline
from lissom.compiler.transforms.new_ids import with_final_ids
from lissom.compiler.verify.divergence import runs
from lissom.driver.keywords import TextModel
from lissom.driver.options import (
    BuildSettings,
    Inputs,
    OptimizeSettings,
    PassSettings,
    Settings,
    check_choices,
    check_settings,
    read_data,
    resolve_passes,
    split_inputs,
)
from lissom.driver.payoff import Payoff
from lissom.driver.ranks import Unlowered, compile_for_ranks
from lissom.driver.room import from_disk, with_default_passes
from lissom.errors import InputError, LissomError, UnsupportedError
from lissom.frontends.capture.device import check_device, device_of
from lissom.frontends.capture.export import Capture, capture
from lissom.frontends.capture.isolation import isolated
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.frontends.models.sources import load
from lissom.inspect.progress import progress_bar
from lissom.inspect.report import Report
from lissom.passes.parallel.partition import Partition
from lissom.passes.parallel.shard import Shard
from lissom.runtime.compiled_model import CompiledModel
from lissom.runtime.error_meter import with_meter
from lissom.runtime.hosted_model import check_uncompiled
from lissom.runtime.layer_timer import ProgramTimer


@singledispatch
def compile_by_class(
    model: nn.Module | Program, example_inputs: Inputs | None, settings: Settings
) -> CompiledModel | TextModel:
    """The model compiled by the function that an integration registered for its class, or by `compile_model`."""
    if example_inputs is None:
        raise InputError("example_inputs= is missing; give a tuple of arguments, a mapping of keywords, or the only tensor")
    return compile_model(model, example_inputs, settings)


@compile_by_class.register(str)
@compile_by_class.register(Path)
def _(name: str | Path, example_inputs: Inputs | None, settings: Settings) -> CompiledModel | TextModel:
    source = load(str(name), with_inputs=example_inputs is None)
    settings = with_default_passes(settings, source.model)
    with from_disk(source.model, settings.passes):
        return compile_model(source.model, source.example_inputs if example_inputs is None else example_inputs, settings)


def compile_model(model: nn.Module | Program, example_inputs: Inputs, settings: Settings) -> CompiledModel:
    """The model compiled as the settings say. Raises what `lissom.compile` raises."""
    given, model = model, with_merged_adapters(model) if isinstance(model, nn.Module) else model
    take, device = _capturing(model, example_inputs, settings)
    compiled = compile_captured(take, device, settings, _facts_of(model))
    if compiled.ranks is None:
        compiled.report = with_errors(compiled.report, compiled.program, given, example_inputs, settings)
    return compiled


def with_errors(
    report: Report, program: Program, model: nn.Module | Program, inputs: Inputs, settings: OptimizeSettings
) -> Report:
    """The report of a compile, with what measures the errors of the program's nodes."""
    device = check_device(settings.device)
    return with_meter(report, program, model, split_inputs(inputs), dynamic=settings.dynamic, device=device)


def optimize_model(
    model: nn.Module | Program, example_inputs: Inputs, settings: OptimizeSettings
) -> tuple[Program, History, Sample]:
    """The model's program after the passes, not lowered, and the flat example. Raises what `lissom.compile` raises."""
    check_choices(settings)
    model = with_merged_adapters(model) if isinstance(model, nn.Module) else model
    passes = resolve_passes(settings.passes)
    take, device = _capturing(model, example_inputs, settings)
    with _shown(settings, "optimize") as progress, isolated(device):
        job = _job(take, passes, settings, progress, 1 + len(passes), _facts_of(model))
        program, history = job.pipeline.run(job.captured.program, job.history)
        program, example = with_final_ids(program, job.captured.example, check=settings.checks in NUMERIC)
        return program, history, example


def _shown(settings: PassSettings, title: str) -> AbstractContextManager[Progress]:
    """The caller's progress callback, or a bar with this title."""
    return progress_bar(title) if settings.progress is None else nullcontext(settings.progress)


def _facts_of(model: nn.Module | Program) -> Facts | None:
    """The metadata of a model, or that which a program keeps of its model."""
    if isinstance(model, Program):
        return model.about if isinstance(model.about, Facts) else None
    return Facts.of(model)


def _capturing(
    model: nn.Module | Program, example_inputs: Inputs, settings: OptimizeSettings
) -> tuple[Callable[[], Capture], torch.device]:
    """A function that captures the model, and the device of its program. Raises CaptureError for a compiled model."""
    if isinstance(model, Program):
        return _given_program(model, example_inputs, settings)
    check_uncompiled(model)
    place = check_device(settings.device)
    args, kwargs = split_inputs(example_inputs)
    take = partial(capture, model, args, kwargs, dynamic=settings.dynamic, device=place)
    return take, place or device_of(model, (args, kwargs))


def _given_program(
    program: Program, example_inputs: Inputs, settings: PassSettings
) -> tuple[Callable[[], Capture], torch.device]:
    """A function that returns a capture of a copy of the program, and the device of the program."""
    place = check_device(settings.device)
    device = next((tensor.device for tensor in program.weights().values()), torch.device("cpu"))
    if place is not None and place != device:
        raise UnsupportedError(f"device= is {place}, and the program is on {device}; optimize the model on that device")
    args, kwargs = split_inputs(example_inputs)
    example = program.signature.flatten(args, kwargs)
    return lambda: Capture(program.copy(), example, (), 0.0), device


def with_facts(take: Callable[[], Capture], model: nn.Module) -> Callable[[], Capture]:
    """A function that captures, and lets passes read the model's configuration."""

    def taken() -> Capture:
        captured = take()
        captured.program.about = Facts.of(model)
        return captured

    return taken


def compile_captured(
    take: Callable[[], Capture],
    device: torch.device,
    settings: BuildSettings,
    facts: Facts | None = None,
    *,
    title: str = "compile",
) -> CompiledModel:
    """Compile the capture of a frontend for `device`.

    Args:
        take: captures the model; it is called after the settings are checked.
        facts: the model's configuration and metadata.
        title: of the progress bar.

    Raises:
        LissomError: as `lissom.compile`.
    """
    passes, backends = check_settings(settings)
    with _shown(settings, title) as progress, isolated(device), heap_set_aside():
        if isinstance(backends[0], Distributed):
            compiled = _compile_for_ranks(take, device, settings, passes, backends[0], progress, facts)
        else:
            compiled = _compile_for_process(take, device, settings, passes, backends, progress, facts)
        free_dropped_programs(compiled.program.parameter_bytes)
    give_back_memory()
    return compiled


def _compile_for_process(
    take: Callable[[], Capture],
    device: torch.device,
    settings: BuildSettings,
    passes: Sequence[Pass],
    backends: Sequence[Backend],
    progress: Progress,
    facts: Facts | None,
) -> CompiledModel:
    """Run the passes once, then lower and build the program for each backend, and keep the fastest."""
    missing = {backend.name: UnsupportedError(why) for backend in backends if (why := backend.missing()) is not None}
    lowerings = {backend.name: backend.lowering(device) for backend in backends if backend.name not in missing}
    # The capture, the passes, and for each backend its own passes and the build.
    count = 1 + len(passes) + sum(len(lowering) + 1 for lowering in lowerings.values())
    job, builds = _job(take, passes, settings, progress, count, facts), Builds()
    judge = _judge(job, settings, [backend for backend in backends if backend.name in lowerings], lowerings, builds)
    lowered = replace(job.pipeline, judge=judge).run_each(job.captured.program, lowerings, job.history)
    final, example = _with_final_ids(lowered, job.captured.example, settings)
    built = build_fastest(
        backends,
        missing | final,
        example,
        lambda what, left: progress(what, count - left, count),
        builds,
        simulate=settings.simulate,
    )
    timer = ProgramTimer(built.program, built.executable, built.backend, built.history, example)
    report = Report(f"{built.program.name} on {built.backend.name}", built.history, timer=timer)
    return CompiledModel(built.program, built.executable, report, built.backend, renumbered_facts(facts, built.program))


def _with_final_ids(
    lowered: Mapping[str, tuple[Program, History] | LissomError], example: Sample, settings: PassSettings
) -> tuple[dict[str, tuple[Program, History] | LissomError], Sample]:
    """The programs and the example with the ids that callers use, see `with_final_ids`."""
    results: dict[str, tuple[Program, History] | LissomError] = {}
    final = example
    for name, outcome in lowered.items():
        if isinstance(outcome, LissomError):
            results[name] = outcome
        else:
            program, final = with_final_ids(outcome[0], example, check=settings.checks in NUMERIC)
            results[name] = program, outcome[1]
    return results, final


def _compile_for_ranks(
    take: Callable[[], Capture],
    device: torch.device,
    settings: BuildSettings,
    passes: Sequence[Pass],
    backend: Distributed,
    progress: Progress,
    facts: Facts | None,
) -> CompiledModel:
    """This rank's shard of the model, or the whole model without a process group."""
    make = partial(_partition_model, take, settings, passes, device, progress, facts)
    part = compile_for_ranks(make, backend, device, checks=settings.checks, simulate=settings.simulate)
    timer = ProgramTimer(part.program, part.executable, backend, part.history)
    report = Report(f"{part.program.name} on {backend.name}", part.history, timer=timer)
    return CompiledModel(part.program, part.executable, report, backend, facts)


def _partition_model(
    take: Callable[[], Capture],
    settings: BuildSettings,
    passes: Sequence[Pass],
    device: torch.device,
    progress: Progress,
    facts: Facts | None,
) -> Unlowered:
    """Capture the model and run the passes; lossy passes are timed before the program is sharded."""
    at = next(index for index, pass_ in enumerate(passes) if isinstance(pass_, (Shard, Partition)))
    job = _job(take, passes[:at], settings, progress, 1 + len(passes), facts)
    eager = Eager()
    pipeline = replace(job.pipeline, judge=_judge(job, settings, [eager], {eager.name: eager.lowering(device)}, Builds()))
    (outcome,) = pipeline.run_each(job.captured.program, {eager.name: passes[at:]}, job.history).values()
    if isinstance(outcome, LissomError):
        raise outcome
    with_final_ids(outcome[0], job.captured.example, check=False)  # refuses what ranks do not take
    return *outcome, job.pipeline.samples


_UNTIMED = 1 << 31
"""The bytes of weights from which no program without a lossy pass is built beside the one with it."""
_WHY_UNTIMED = "what lossy passes gain is not timed, as the model is large, and none is reverted"


@dataclass(frozen=True)
class _Job:
    """A captured model and the passes to run on it."""

    pipeline: Pipeline
    captured: Capture
    history: History


def _job(
    take: Callable[[], Capture],
    passes: Sequence[Pass],
    settings: PassSettings,
    show: Progress,
    count: int,
    facts: Facts | None,
) -> _Job:
    """Capture the model.

    Args:
        count: the steps of the whole work, for the progress bar.
        facts: the model's configuration and metadata, for passes that read them; None leaves what the capture knows.
    """
    show("capture", 0, count)
    captured = take()
    program = captured.program
    program.about = program.about if facts is None else facts
    history = History(format_pipeline(passes), settings.checks)
    notes = (*captured.notes, *([_WHY_UNTIMED] if program.parameter_bytes >= _UNTIMED else []))
    size = Size.of(program)
    history.record(Step(0, "capture", "capture", captured.seconds, 0.0, size, notes=notes), program.text())
    data, labels = read_data(settings.data, program.signature)
    pipeline = Pipeline(
        passes,
        samples=captured.samples or check_samples(program.signature, few_rows(program.signature, captured.example, size.flops)),
        checks=settings.checks,
        data=data,
        labels=labels,
        metric=settings.metric,
        max_drop=settings.max_drop,
        progress=lambda what, finished, _: show(what, finished + 1, count),
    )
    return _Job(pipeline, captured, history)


def _judge(
    job: _Job, settings: BuildSettings, backends: Sequence[Backend], lowerings: Mapping[str, Sequence[Pass]], builds: Builds
) -> Payoff | None:
    """Times lossy passes on the example and on larger inputs; None where all are to be kept, or a model does not fit twice.

    Simulated layers are never faster, and the caller asked for them.
    """
    captured = job.captured
    if settings.goal is None or settings.simulate or not backends or captured.program.parameter_bytes >= _UNTIMED:
        return None
    timed = list(captured.timed)
    if not timed:
        given = larger(captured.program.signature, captured.example, job.history.steps[0].size.flops)
        timed += islice((sample for sample in given if runs(captured.program, sample)), 1)
    return Payoff(backends, lowerings, [captured.example, *timed], settings.goal, builds)
