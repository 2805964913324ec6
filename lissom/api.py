"""The public face: compile a model, call what comes out, read what was done, save it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lissom.artifacts import rank_files
from lissom.artifacts.artifact import WriteMore, write_nothing
from lissom.backends.base import Backend, Executable, state_of
from lissom.backends.distributed.backend import Distributed, RankProgram
from lissom.backends.distributed.ranks import Ranks
from lissom.backends.eager.backend import Eager
from lissom.backends.fastest import build_fastest
from lissom.compiler.analysis.embedding_bounds import outside_table
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.pipeline.history import History, Size, Step
from lissom.compiler.pipeline.options import Checks, Metric, Progress, check_options, check_progress
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import format_pipeline
from lissom.driver.options import (
    Inputs,
    Settings,
    check_data,
    check_path,
    check_settings,
    read_data,
    resolve_passes,
    split_inputs,
)
from lissom.driver.payoff import Payoff
from lissom.driver.ranks import PartitionedModel, compile_for_ranks, with_world_size
from lissom.errors import InputError, LissomError, UnsupportedError, refuse_old_names
from lissom.frontends.device import check_device, device_of
from lissom.frontends.dynamic import Dynamic
from lissom.frontends.export import Capture, capture
from lissom.frontends.isolation import isolated
from lissom.frontends.untouched import ordinary
from lissom.inspect.progress import progress_bar
from lissom.inspect.tables import Report
from lissom.passes.parallel.partition import Partition
from lissom.passes.parallel.shard import Shard
from lissom.runtime.hosted_model import Facts, HostedModel, check_uncompiled


class CompiledModel(HostedModel):
    """An optimized model: takes the arguments the original took, returns the structure it returned.

    program: the optimized program. report: what every step did; prints as a table. backend: the name of what runs it.
    It is a module, and stands in for one of transformers in pipelines and in Sentence Transformers.

    Calls may come from several threads, unless the program has state. Their outputs carry no gradients, and other modules may
    be trained on them.
    """

    def __init__(
        self, program: Program, executable: Executable, report: Report, backend: Backend, facts: Facts | None = None
    ) -> None:
        super().__init__(program, facts)
        self.report = report
        self.backend = backend.name
        self._backend = backend
        self._executable = executable

    def forward(self, *args: object, **kwargs: object) -> object:
        """The model's answer.

        Raises: InputError when the arguments do not fit the signature, or lead out of a table of the model (a token id past
            the vocabulary, a position past the last), naming what was found and what is allowed.
        """
        signature = self.program.signature
        with self.refusals():
            tensors = signature.flatten(args, self.asked(kwargs))
        return signature.unflatten(self.run(tensors))

    def run(self, tensors: Sample) -> Sequence[object]:
        """The flat outputs for flat inputs, in the order of the program's placeholders; sizes and types are not checked.

        Raises: InputError for inputs that lead out of a table of the model.
        """
        try:
            found = self._executable(tensors)
        except (IndexError, RuntimeError) as error:
            sentence = outside_table(self.program, tensors)
            if sentence is None:
                raise
            raise InputError(sentence) from error
        if torch.is_inference_mode_enabled():
            return found
        return [ordinary(value) if isinstance(value, torch.Tensor) else value for value in found]

    def refusals(self) -> AbstractContextManager[None]:
        """A block that checks a call's arguments: when it raises, the other ranks do not wait for this one's call."""
        return self._executable.refusals() if isinstance(self._executable, RankProgram) else nullcontext()

    def state(self) -> dict[str, torch.Tensor]:
        """The state the model keeps from call to call, by the names of its buffers; empty when it keeps none.

        The tensors are the memory itself, until the next call: `zero_()` empties a cache, `copy_(tensor[rows])` reorders its
        rows. After a call that failed, what the state holds is undefined.
        """
        return state_of(self._executable)

    @property
    def ranks(self) -> Ranks | None:
        """Those this one runs with, where it is a rank's part of a model; None for any other."""
        return self._executable.ranks if isinstance(self._executable, RankProgram) else None

    def save(self, directory: str | Path) -> None:
        """Write the model to a directory that `load` reads, on other machines too, and without the original model's code.

        The directory is written whole or not at all; an artifact that is there already is replaced. State is saved as it
        was when the model was compiled, and the backend with the options it had. Ranks of a group save at the same point.

        Raises: ArtifactError when the directory holds something else, or cannot be written; UnsupportedError when the
            backend cannot save what it built.
        """
        self.save_with(directory, write_nothing)

    def save_with(self, directory: str | Path, write_more: WriteMore) -> None:
        """As `save`, with further files, which the artifact's hashes cover.

        write_more: is called with the folder to write them into.
        """
        facts = {} if self.facts is None else self.facts.to_json()
        history = self.report.history
        rank_files.save(check_path(directory), self.program, self._executable, history, self._backend, facts, write_more)

    def __repr__(self) -> str:
        return f"CompiledModel({self.program.name}{self.program.signature.describe()}, backend='{self.backend}')"


@refuse_old_names
def compile(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    passes: str | Pass | Sequence[Pass] = "exact",
    backend: str | Backend = "eager",
    world_size: int | None = None,
    device: str | torch.device | None = None,
    dynamic: Dynamic | bool = True,
    checks: Checks = "numeric",
    data: Iterable[Inputs] = (),
    metric: Metric | None = None,
    max_drop: float | None = None,
    only_if_faster: bool = True,
    simulate: bool = False,
    progress: Progress | None = None,
) -> CompiledModel:
    """Optimize a model for inference.

    The model itself is left as it was, and its weights are shared until a pass changes one.

    example_inputs: a tuple is positional, a mapping is keywords, a tensor is the only argument.
    passes: pipeline text, pass objects, or a recipe's name, run in the order written. The recipe `exact` brings every model
        into canonical form and always comes first.
    backend: what runs the result, by name, or with options of its own, `lissom.OnnxRuntime(threads=2)`;
        `lissom.backends.BACKENDS` lists them. `fastest` builds and measures each on the example
        inputs, and keeps the one that answers soonest.
    world_size: with the backend `distributed` how many ranks share the model: `shard{world_size=N},partition` is put behind the
        passes, unless they hold `partition`. In a process group of that size every rank calls this, rank 0 does the work, and
        each gets its part.
    device: where the result runs; the model's own device by default.
    dynamic: True finds out by trying whether batch and sequence may vary, False fixes all sizes, a mapping names the
        dimensions that vary: `{"input_ids": {0: "batch"}}`.
    checks: after every pass, `numeric` compares outputs, `structural` checks form and types, `off` nothing.
    data: calibration inputs, each like example_inputs, for passes that need some.
    metric: scores a callable that takes the model's arguments, higher is better; max_drop: how much lossy passes may cost.
    only_if_faster: undo a lossy pass whose program, lowered for the backend, is neither faster nor smaller than without it; the
        history says so with the figures of both.
    simulate: let quantized layers that the backend has no kernel for be computed in floating point, on rounded values: the
        same numbers, and no faster than before. Without, they are refused.
    progress: called with what is done now, steps finished, steps in all; by default a bar on a terminal.

    Raises: a LissomError of the kind that fits: CaptureError, InputError, PipelineTextError, UnsupportedError,
        RequirementError, PassError, VerifyError, BudgetError, RankError.

    >>> import torch, lissom
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    >>> fast = lissom.compile(model, torch.randn(2, 5, 32))
    >>> fast(torch.randn(3, 7, 32)).shape
    torch.Size([3, 7, 32])
    """
    check_progress(progress)
    place = check_device(device)
    settings = Settings(passes, with_world_size(backend, world_size), checks, data, metric, max_drop, only_if_faster, simulate)
    take, target = _capturing(model, example_inputs, dynamic, place)
    with progress_bar("compile") as bar:
        return compile_captured(take, target, settings, progress or bar, Facts.of(model))


def _capturing(
    model: nn.Module, example_inputs: Inputs, dynamic: Dynamic | bool, place: torch.device | None
) -> tuple[Callable[[], Capture], torch.device]:
    """What captures the model, and the device its program will be on. Raises: CaptureError for a compiled model."""
    check_uncompiled(model)
    args, kwargs = split_inputs(example_inputs)
    take = partial(capture, model, args, kwargs, dynamic=dynamic, device=place)
    return take, place or device_of(model, (args, kwargs))


def compile_captured(
    take: Callable[[], Capture], device: torch.device, settings: Settings, progress: Progress, facts: Facts | None = None
) -> CompiledModel:
    """Compile what a frontend captures, for a program on `device`.

    take: captures the model. It is called once the settings are known to be good. facts: what the model says of itself.

    Raises: what `compile` raises.
    """
    shared, backends = check_settings(settings)
    with isolated(device):
        return _compile_captured(take, device, settings, shared, backends, progress, facts)


def _compile_captured(
    take: Callable[[], Capture],
    device: torch.device,
    settings: Settings,
    shared: list[Pass],
    backends: Sequence[Backend],
    progress: Progress,
    facts: Facts | None,
) -> CompiledModel:
    """What `compile_captured` gives, with the passes and the backends of the settings."""
    if isinstance(backends[0], Distributed):
        make = partial(_partition_model, take, settings, shared, device, progress)
        part = compile_for_ranks(make, backends[0], device, checks=settings.checks, simulate=settings.simulate)
        report = Report(f"{part.program.name} on {backends[0].name}", part.history)
        return CompiledModel(part.program, part.executable, report, backends[0], facts)
    missing = {item.name: UnsupportedError(why) for item in backends if (why := item.missing()) is not None}
    lowerings = {item.name: item.lowering(device) for item in backends if item.name not in missing}
    # The capture, the passes, and for each backend its own passes and the build.
    count = 1 + len(shared) + sum(len(lowering) + 1 for lowering in lowerings.values())
    job = _job(take, shared, settings, progress, count)
    # What is simulated is slower by nature, and wanted all the same.
    rivals = [item for item in backends if item.name in lowerings and settings.only_if_faster and not settings.simulate]
    judge = Payoff(rivals, lowerings, job.example) if rivals else None
    lowered = replace(job.pipeline, judge=judge).run_each(job.program, lowerings, job.history)
    built = build_fastest(
        backends,
        missing | lowered,
        job.example,
        lambda what, left: progress(what, count - left, count),
        simulate=settings.simulate,
    )
    report = Report(f"{built.program.name} on {built.backend.name}", built.history)
    return CompiledModel(built.program, built.executable, report, built.backend, facts)


def _partition_model(
    take: Callable[[], Capture], settings: Settings, passes: Sequence[Pass], device: torch.device, progress: Progress
) -> PartitionedModel:
    """Capture the model and run the passes; what loses is judged before the program is shared."""
    at = next(index for index, item in enumerate(passes) if isinstance(item, (Shard, Partition)))
    job = _job(take, passes[:at], settings, progress, 1 + len(passes))
    eager = Eager()
    judge = Payoff([eager], {eager.name: eager.lowering(device)}, job.example)
    pipeline = replace(job.pipeline, judge=judge if settings.only_if_faster and not settings.simulate else None)
    (found,) = pipeline.run_each(job.program, {eager.name: passes[at:]}, job.history).values()
    if isinstance(found, LissomError):
        raise found
    return PartitionedModel(*found, job.pipeline.samples)


@dataclass(frozen=True)
class Optimized:
    """What the passes made of a model, before any backend lowers it: the program to look at, and what every pass did."""

    program: Program
    report: Report


def optimize(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    passes: str | Pass | Sequence[Pass] = "exact",
    device: str | torch.device | None = None,
    dynamic: Dynamic | bool = True,
    checks: Checks = "numeric",
    data: Iterable[Inputs] = (),
    metric: Metric | None = None,
    max_drop: float | None = None,
    progress: Progress | None = None,
) -> Optimized:
    """Run the passes alone: what `compile` does before it lowers the program for a backend. Options and errors are the same.

    >>> import torch, lissom
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
    >>> print(lissom.optimize(model, torch.randn(2, 4)).program)
    program Sequential(input: f32[batch, 4]) {
      weight @0.bias: f32[4]
      weight @0.weight: f32[4, 4]
      %linear: f32[batch, 4] = aten.linear(%input, @0.weight, @0.bias)  # 0
      return [%linear]
    }
    <BLANKLINE>
    """
    # Without a backend, unlike `check_settings`: a program for several ranks is none of one process.
    check_options(checks, metric, max_drop)
    check_progress(progress)
    check_data(data)
    settings, shared = Settings(checks=checks, data=data, metric=metric, max_drop=max_drop), resolve_passes(passes)
    take, target = _capturing(model, example_inputs, dynamic, check_device(device))
    with progress_bar("optimize") as bar, isolated(target):
        job = _job(take, shared, settings, progress or bar, 1 + len(shared))
        program, history = job.pipeline.run(job.program, job.history)
    return Optimized(program, Report(program.name, history))


@dataclass(frozen=True)
class _Job:
    """A captured model and the passes to run on it."""

    pipeline: Pipeline
    program: Program
    example: Sample
    history: History


def _job(take: Callable[[], Capture], passes: Sequence[Pass], settings: Settings, show: Progress, count: int) -> _Job:
    """Capture the model; count: the steps of the whole work, for the progress shown."""
    show("capture", 0, count)
    captured = take()
    program = captured.program
    history = History(format_pipeline(passes), settings.checks)
    history.record(Step(0, "capture", "capture", captured.seconds, 0.0, Size.of(program), notes=captured.notes), program.text())
    pipeline = Pipeline(
        passes,
        samples=captured.samples or check_samples(program.signature, captured.example),
        checks=settings.checks,
        data=read_data(settings.data, program.signature),
        metric=settings.metric,
        max_drop=settings.max_drop,
        progress=lambda what, finished, _: show(what, finished + 1, count),
    )
    return _Job(pipeline, program, captured.example, history)
