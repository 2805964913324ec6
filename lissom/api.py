"""The public face: compile a model, call what comes out, read what was done, save it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lissom.artifacts import rank_files
from lissom.artifacts.artifact import WriteMore, write_nothing
from lissom.backends import find_backends
from lissom.backends.base import Backend, Executable, state_of
from lissom.backends.distributed import Distributed, RankProgram
from lissom.backends.eager import Eager
from lissom.backends.fastest import build_fastest
from lissom.backends.ranks import Ranks
from lissom.compiler.errors import InputError, LissomError, UnsupportedError
from lissom.compiler.history import History, Size, Step
from lissom.compiler.kinds import Pass
from lissom.compiler.lookups import outside_table
from lissom.compiler.pipeline import Checks, Metric, Pipeline, Progress, check_options
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample, check_samples
from lissom.compiler.spelling import format_pipeline, parse_pipeline
from lissom.frontends.device import check_device, device_of
from lissom.frontends.dynamic import Dynamic
from lissom.frontends.export import Capture, capture
from lissom.hosting import Facts, HostedModel, check_uncompiled
from lissom.inspect.progress import progress_bar
from lissom.inspect.tables import Report
from lissom.passes import RECIPES, known_passes
from lissom.passes.parallel.cut import Cut
from lissom.passes.parallel.shard import Shard
from lissom.payoff import Payoff
from lissom.scatter import CutModel, compile_for_ranks, passes_for, with_ways

Inputs = torch.Tensor | Sequence[object] | Mapping[str, object]


class CompiledModel(HostedModel):
    """An optimized model: takes the arguments the original took, returns the structure it returned.

    program: the optimized program. report: what every step did; prints as a table. backend: the name of what runs it.
    It is a module, and stands in for one of transformers in pipelines and in Sentence Transformers.

    Calls run under inference mode and may come from several threads, unless the program has state.
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
        return signature.unflatten(self.run(signature.flatten(args, self.asked(kwargs))))

    def run(self, tensors: Sample) -> Sequence[object]:
        """The flat outputs for flat inputs, in the order of the program's placeholders; sizes and types are not checked.

        Raises: InputError for inputs that lead out of a table of the model.
        """
        try:
            return self._executable(tensors)
        except (IndexError, RuntimeError) as error:
            sentence = outside_table(self.program, tensors)
            if sentence is None:
                raise
            raise InputError(sentence) from error

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
        rank_files.save(Path(directory), self.program, self._executable, history, self._backend, facts, write_more)

    def __repr__(self) -> str:
        return f"CompiledModel({self.program.name}{self.program.signature.describe()}, backend='{self.backend}')"


def compile(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    passes: str | Sequence[Pass] = "exact",
    backend: str | Backend = "eager",
    ways: int | None = None,
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
    ways: with the backend `distributed` how many ranks share the model: `shard{ways=N},cut` is put behind the passes, unless
        they hold `cut`. In a process group of that size every rank calls this, rank 0 does the work, and each gets its part.
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
    place = check_device(device)
    settings = Settings(passes, with_ways(backend, ways), checks, data, metric, max_drop, only_if_faster, simulate)
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


@dataclass(frozen=True)
class Settings:
    """How a captured model is compiled; the fields are the keywords of `compile`."""

    passes: str | Sequence[Pass] = "exact"
    backend: str | Backend = "eager"
    checks: Checks = "numeric"
    data: Iterable[Inputs] = ()
    metric: Metric | None = None
    max_drop: float | None = None
    only_if_faster: bool = True
    simulate: bool = False


def check_settings(settings: Settings) -> tuple[list[Pass], Sequence[Backend]]:
    """The passes and the backends the settings ask for.

    Raises: PipelineTextError, UnsupportedError.
    """
    check_options(settings.checks, settings.metric, settings.max_drop)
    passes, backends = resolve_passes(settings.passes), find_backends(settings.backend)
    alone = next((item.name for item in backends if not item.runs_ranks), None)
    if alone is not None and any(isinstance(item, Cut) for item in passes):
        raise UnsupportedError(
            f"backend '{alone}' runs a program in one process, and `cut` makes one for several ranks; choose backend "
            f"'distributed', or take the program from lissom.optimize, and in each process run `program.of_rank(rank)`"
        )
    if isinstance(backends[0], Distributed):
        passes, ranked = passes_for(backends[0], passes)
        return passes, [ranked]
    return passes, backends


def compile_captured(
    take: Callable[[], Capture], device: torch.device, settings: Settings, progress: Progress, facts: Facts | None = None
) -> CompiledModel:
    """Compile what a frontend captures, for a program on `device`.

    take: captures the model. It is called once the settings are known to be good. facts: what the model says of itself.

    Raises: what `compile` raises.
    """
    shared, backends = check_settings(settings)
    if isinstance(backends[0], Distributed):
        make = partial(_cut_model, take, settings, shared, device, progress)
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


def _cut_model(
    take: Callable[[], Capture], settings: Settings, passes: Sequence[Pass], device: torch.device, progress: Progress
) -> CutModel:
    """Capture the model and run the passes; what loses is judged before the program is shared."""
    at = next(index for index, item in enumerate(passes) if isinstance(item, (Shard, Cut)))
    job = _job(take, passes[:at], settings, progress, 1 + len(passes))
    eager = Eager()
    judge = Payoff([eager], {eager.name: eager.lowering(device)}, job.example)
    pipeline = replace(job.pipeline, judge=judge if settings.only_if_faster and not settings.simulate else None)
    (found,) = pipeline.run_each(job.program, {eager.name: passes[at:]}, job.history).values()
    if isinstance(found, LissomError):
        raise found
    return CutModel(*found, job.pipeline.samples)


@dataclass(frozen=True)
class Optimized:
    """What the passes made of a model, before any backend lowers it: the program to look at, and what every pass did."""

    program: Program
    report: Report


def optimize(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    passes: str | Sequence[Pass] = "exact",
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
    settings, shared = Settings(checks=checks, data=data, metric=metric, max_drop=max_drop), resolve_passes(passes)
    take, _ = _capturing(model, example_inputs, dynamic, check_device(device))
    with progress_bar("optimize") as bar:
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
        data=[program.signature.flatten(*split_inputs(batch)) for batch in settings.data],
        metric=settings.metric,
        max_drop=settings.max_drop,
        progress=lambda what, finished, _: show(what, finished + 1, count),
    )
    return _Job(pipeline, program, captured.example, history)


def resolve_passes(passes: str | Sequence[Pass]) -> list[Pass]:
    """The passes to run: the recipe `exact`, then those asked for. A text may name recipes among its passes.

    Raises: PipelineTextError, UnsupportedError.
    """
    table = known_passes()
    exact = parse_pipeline(RECIPES["exact"], table)
    if isinstance(passes, str):
        wanted = parse_pipeline(passes, table, RECIPES)
    else:
        wanted = list(passes)
        wrong: list[object] = [item for item in passes if not isinstance(item, Pass)]  # pyright: ignore[reportUnnecessaryIsInstance]
        if wrong:
            raise UnsupportedError(f"passes= holds {wrong[0]!r}, which is no pass; give pass objects, e.g. RemoveNoOps()")
    return wanted if wanted[: len(exact)] == exact else [*exact, *wanted]


def split_inputs(inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    """Positional and keyword arguments.

    Raises: InputError for anything but a tensor, a tuple or a mapping.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InputError(
        f"example_inputs is a {type(inputs).__name__}; a tuple is positional, a mapping is keywords, a tensor the only argument"
    )
