"""The options of `compile`: passes, backend, inputs, calibration data; and their checks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from lissom.backends import find_backends
from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import Signature
from lissom.compiler.pipeline.options import Checks, Goal, Metric, Progress, check_goal, check_options, check_progress
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.driver.ranks import on_all_ranks, passes_for, with_world_size
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.dynamic import Dynamic
from lissom.passes import RECIPES, known_passes
from lissom.passes.parallel.partition import Partition
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead

Inputs = torch.Tensor | Sequence[object] | Mapping[str, object]
_FORMS = "a tuple is positional, a mapping is keywords, a tensor the only argument"


@dataclass(frozen=True, kw_only=True)
class PassSettings:
    """The options of a run of passes."""

    passes: str | Pass | Sequence[Pass] | None = None
    device: str | torch.device | None = None
    checks: Checks = "numeric"
    data: Iterable[Inputs] = ()
    metric: Metric | None = None
    max_drop: float | None = None
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class BuildSettings(PassSettings):
    """The options of a program that is also lowered and built for a backend."""

    backend: str | Backend = "eager"
    world_size: int | None = None
    goal: Goal | None = "latency"
    simulate: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizeSettings(PassSettings):
    """The keywords of `lissom.optimize`."""

    dynamic: Dynamic | bool = True


@dataclass(frozen=True, kw_only=True)
class Settings(OptimizeSettings, BuildSettings):
    """The keywords of `lissom.compile`."""


def check_choices(settings: PassSettings) -> None:
    """Refuse options that are wrong with any passes and any backend.

    Raises:
        UnsupportedError: for an option of a wrong type or value.
        InputError: for data that is not a list of batches.
    """
    check_options(settings.checks, settings.metric, settings.max_drop)
    check_progress(settings.progress)
    check_data(settings.data)
    if isinstance(settings, BuildSettings):
        check_goal(settings.goal)
        if not isinstance(settings.simulate, bool):
            raise UnsupportedError(f"simulate= is {settings.simulate!r}; give True or False")


def check_settings(settings: BuildSettings) -> tuple[list[Pass], Sequence[Backend]]:
    """The passes and the backends of the settings. The ranks of a process group check theirs together.

    Raises:
        PipelineTextError: as `resolve_passes`.
        UnsupportedError: for an option, a backend, or passes that do not fit it.
        InputError: as `check_choices`.
        RankError: when a rank ended or does not answer.
    """
    check_choices(settings)
    backends = find_backends(with_world_size(settings.backend, settings.world_size))
    chosen = backends[0]
    if isinstance(chosen, Distributed):
        passes, ranked = on_all_ranks(chosen, lambda: passes_for(chosen, resolve_passes(settings.passes)))
        return passes, [ranked]
    passes = resolve_passes(settings.passes)
    alone = next((backend.name for backend in backends if not backend.runs_ranks), None)
    if alone is not None and any(isinstance(pass_, Partition) for pass_ in passes):
        raise UnsupportedError(
            f"backend '{alone}' runs a program in one process, and `partition` makes one for several ranks; choose backend "
            f"'distributed', or take the program from lissom.optimize, and in each process run `program.of_rank(rank)`"
        )
    return passes, backends


def resolve_passes(passes: str | Pass | Iterable[Pass] | None) -> list[Pass]:
    """The passes to run: the recipe `exact`, then those asked for, if any. A text may name recipes among its passes.

    `eliminate-dead` is added after each pass that leaves dead units, and `exact` after the last of these.

    Raises:
        PipelineTextError: for a text without a meaning.
        UnsupportedError: for anything but text and passes.
    """
    table = known_passes()
    exact = parse_pipeline(RECIPES["exact"], table)
    if passes is None:
        wanted = exact
    elif isinstance(passes, str):
        wanted = parse_pipeline(passes, table, RECIPES)
    elif isinstance(passes, Pass):
        wanted = [passes]
    elif isinstance(passes, Iterable) and not isinstance(passes, Mapping):
        wanted = list(passes)
        wrong: list[object] = [given for given in wanted if not isinstance(given, Pass)]
        if wrong:
            raise UnsupportedError(
                f"passes= holds {_shown(wrong[0])}, which is not a pass; give pass objects, e.g. RemoveNoOps()"
            )
    else:
        raise UnsupportedError(f"passes= is {_shown(passes)}; give pipeline text, or pass objects, e.g. [RemoveNoOps()]")
    wanted = _with_cleanup(wanted, exact)
    return wanted if wanted[: len(exact)] == exact else [*exact, *wanted]


def _with_cleanup(wanted: list[Pass], exact: list[Pass]) -> list[Pass]:
    """The passes, with `eliminate-dead` after those that leave dead units; passes that already follow are not added again."""
    completed = list(wanted)
    leaving = [at for at, pass_ in enumerate(wanted) if pass_.leaves_dead]
    for at in reversed(leaving):
        cleanup = [EliminateDead(), *(exact if at == leaving[-1] else [])]
        rest = completed[at + 1 :]
        given = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(rest, cleanup, strict=False)))
        completed[at + 1 :] = [*rest[:given], *cleanup[given:], *rest[given:]]
    return completed


def _shown(value: object) -> str:
    return f"the class {value.__name__}" if inspect.isclass(value) else f"{value!r:.80}"


def split_inputs(inputs: Inputs, what: str = "example_inputs") -> tuple[tuple[object, ...], dict[str, object]]:
    """The inputs as positional and keyword arguments.

    Args:
        what: the name of the option, for the error.

    Raises:
        InputError: for anything but a tensor, a tuple or a mapping.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        odd = next((key for key in inputs if not isinstance(key, str)), None)
        if odd is not None:
            raise InputError(f"{what} has the key {odd!r}; keys are the names of the model's arguments, as text")
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise InputError(f"{what} is a {type(inputs).__name__}; {_FORMS}")


def check_data(data: Iterable[object]) -> None:
    """Refuse calibration data that is not a collection of batches. Raises InputError."""
    if isinstance(data, (str, bytes, Mapping, torch.Tensor)) or not isinstance(data, Iterable):
        raise InputError(f"data= is a {type(data).__name__}; give a list of batches, each like example_inputs")


LABELS = "labels"
"""The key of a batch for its labels, where the example inputs have no argument of that name."""


def read_data(data: Iterable[Inputs], signature: Signature) -> tuple[list[Sample], list[torch.Tensor | None]]:
    """The calibration batches as flat inputs, and the labels of each.

    Raises:
        InputError: for a batch that does not fit the model's arguments, with its index.
    """
    samples: list[Sample] = []
    labels: list[torch.Tensor | None] = []
    captured = {argument.name for argument in (*signature.positional, *signature.keyword)}
    for index, batch in enumerate(data):
        args, kwargs = split_inputs(batch, f"batch {index} of data=")
        label = None if LABELS in captured else kwargs.pop(LABELS, None)
        if label is not None and not isinstance(label, torch.Tensor):
            raise InputError(f"batch {index} of data= has labels of type {type(label).__name__}; give a tensor")
        labels.append(label)
        try:
            sample = signature.flatten(args, kwargs)
            signature.check_sizes(sample)
        except InputError as error:
            raise InputError(f"batch {index} of data= does not fit: {error}") from error
        samples.append(sample)
    if not samples and isinstance(data, Iterator):
        raise InputError("data= is an iterator that yields no batch; it may have been read before: give a list of batches")
    return samples, labels
