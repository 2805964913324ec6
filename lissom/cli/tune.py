"""The command that searches: `lissom tune`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lissom.artifacts.directory import check_target
from lissom.cli.options import Data, MetricName, Quality
from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.models.sources import NAMES, load
from lissom.inspect.pictures import check_picture
from lissom.inspect.tables import show
from lissom.inspect.terminal import Terminal
from lissom.io.files import check_writable
from lissom.tuning.generation import DECODER_GOALS, PERPLEXITY, tune_generation
from lissom.tuning.report import TuneReport
from lissom.tuning.stored import stored_reports
from lissom.tuning.tuned import Tuned, tune


def run_tune(
    model: Annotated[str | None, typer.Argument(help=NAMES)] = None,
    data: Data = None,
    metric: MetricName = None,
    max_drop: Annotated[
        str, typer.Option(help="The most --metric may drop, or without --metric the relative output error: 0.01 or 1%.")
    ] = "1%",
    goal: Annotated[
        str,
        typer.Option(help="What is to become small: latency, throughput or memory; decode or prefill, with a KV cache."),
    ] = "latency",
    max_length: Annotated[int, typer.Option(help="With --goal decode or prefill: the tokens of the KV cache.")] = 256,
    target: Annotated[
        str | None,
        typer.Option(help="Seek the most accurate program that reaches it: a factor, 2.0, a time, '5 ms', a size, '20 MB'."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="The time of the search.")] = 20.0,
    backends: Annotated[
        str, typer.Option(help="What may run the result: one or more backends, separated by commas.")
    ] = "eager",
    distill: Annotated[bool, typer.Option(help="Train the finalists on the data.")] = True,
    store: Annotated[
        Path | None, typer.Option(help="Keep what is found in this directory; the same call goes on from there.")
    ] = None,
    for_server: Annotated[
        str | None, typer.Option(help="vllm: search what `lissom export --format compressed-tensors` writes.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write the chosen program to this directory.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the candidates to this file, for example frontier.svg.")] = None,
    show_store: Annotated[Path | None, typer.Option("--show", help="Show the searches of a store, and search nothing.")] = None,
) -> None:
    """Search the fastest or smallest program under a bound on the loss."""
    if plot is not None:
        check_writable(plot)
        check_picture(plot)
    if show_store is not None:
        if model is not None:
            raise typer.BadParameter("--show takes a store, and no model")
        _show_reports(stored_reports(show_store), plot)
        return
    if model is None:
        raise typer.BadParameter("give a model, or --show with a store")
    if data is None:
        raise typer.BadParameter("tune needs --data: passes calibrate on it, and outputs are compared on it")
    if save is not None:
        check_target(save)
    decodes = goal in DECODER_GOALS[:2]
    if decodes and metric not in (None, PERPLEXITY):
        raise UnsupportedError(f"--metric is '{metric}'; --goal {goal} takes {PERPLEXITY}, or none for it")
    quality = Quality(data, None if decodes else metric)
    quality.check()
    options: dict[str, Any] = {
        "max_drop": _fraction(max_drop),
        "goal": goal,
        "target": _target(target),
        "minutes": minutes,
        "backends": tuple(name.strip() for name in backends.split(",")),
        "distill": distill,
        "store": store,
        "for_server": for_server,
    }
    source = load(model)
    given = quality.arguments(source, None)
    tuned: Tuned[Any]
    if decodes:
        tuned = tune_generation(source.model, max_length=max_length, data=given["data"], **options)
    else:
        tuned = tune(source.model, source.example_inputs, data=given["data"], metric=given["metric"], **options)
    for note in source.notes:
        Terminal(stderr=True).print(note, highlight=False, soft_wrap=True, markup=False)
    if save is not None:
        tuned.best.save(save)
    _show_reports([tuned.report], plot)


def _show_reports(reports: list[TuneReport], plot: Path | None) -> None:
    if not reports:
        raise ArtifactError("the store holds no search; `lissom tune MODEL --store DIR` writes one")
    show(*reports)
    if plot is not None:
        reports[-1].plot("pareto", plot)


def _fraction(text: str) -> float:
    """The number of `0.01` or `1%`."""
    percent = text.endswith("%")
    try:
        fraction = float(text.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        fraction = math.nan
    if not 0 <= fraction < math.inf:
        raise UnsupportedError(f"--max-drop is '{text}'; give a number, 0 or more, or a percentage such as 1%")
    return fraction


def _target(text: str | None) -> float | str | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
