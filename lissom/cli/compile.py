"""The command that runs passes over a model: `lissom compile`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from lissom import api
from lissom.artifacts.directory import check_target
from lissom.backends import find_backends
from lissom.backends.base import Backend as BackendObject
from lissom.cli.options import (
    Backend,
    Checks,
    Data,
    Device,
    GoalName,
    MaxDrop,
    MetricName,
    Model,
    Passes,
    Quality,
    Simulate,
    goal_of,
    one_of,
)
from lissom.compiler.pipeline.history import Interrupted
from lissom.compiler.pipeline.options import Goal, check_options
from lissom.driver.options import resolve_passes
from lissom.driver.ranks import with_world_size
from lissom.driver.room import from_disk
from lissom.driver.torchrun import refuse_torchrun
from lissom.errors import LissomError
from lissom.frontends.capture.device import check_device
from lissom.frontends.models.sources import load
from lissom.inspect.report import Report, write_stopped
from lissom.inspect.svg.heat import HEATS, MEASURED
from lissom.inspect.tables import show
from lissom.inspect.terminal import Terminal
from lissom.io.files import check_writable, write_whole


def run_compile(
    model: Model,
    passes: Passes = "exact",
    backend: Backend = "eager",
    device: Device = None,
    world_size: Annotated[int | None, typer.Option(help="With --backend distributed: how many ranks share the model.")] = None,
    checks: Checks = "numeric",
    data: Data = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
    simulate: Simulate = False,
    full: Annotated[bool, typer.Option("--full", help="List every step, and the kernels of the hot layers.")] = False,
    history: Annotated[Path | None, typer.Option(help="Write the history to this file, as JSON.")] = None,
    text: Annotated[Path | None, typer.Option(help="Write the optimized program to this file, as text.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the passes and the programs after them to this file, as one HTML page.")
    ] = None,
    errors: Annotated[
        bool,
        typer.Option("--errors", help="Measure each node's error, and the attention mass that sparse attentions keep."),
    ] = False,
    heat: Annotated[
        str | None,
        typer.Option(
            callback=one_of(HEATS),
            help=f"With --html: color nodes by {', '.join(HEATS)}; error and mass are measured as by --errors, time by --full.",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write what was compiled to this directory.")] = None,
    goal: GoalName = "latency",
) -> None:
    """Compile a model and print what every pass did."""
    refuse_torchrun("compile")
    if heat is not None and html is None:
        raise typer.BadParameter("--heat goes with --html")
    if heat == "time" and not full:
        raise typer.BadParameter("--heat time needs --full, which times the layers")
    for path in filter(None, (history, text, html)):
        check_writable(path)
    if save is not None:
        check_target(save)
    chosen = with_world_size(backend, world_size)
    quality = Quality(data, metric, max_drop)
    measured = errors or heat in MEASURED
    compiled, original = compile_model(
        model, passes, chosen, device, checks, quality, goal=goal_of(goal), simulate=simulate, html=html
    )
    if save is not None:
        assert isinstance(compiled, api.CompiledModel)
        compiled.save(save)
    show(compiled.report.full() if full else compiled.report)
    if measured:
        show(compiled.report.errors(original))
    if history is not None:
        write_whole(history, json.dumps(compiled.report.history.to_json(), indent=1) + "\n")
    if text is not None:
        write_whole(text, compiled.program.text())
    if html is not None:
        compiled.report.to_html(html, heat=heat)


def compile_model(
    model: str,
    passes: str,
    backend: str | BackendObject | None,
    device: str | None,
    checks: str,
    quality: Quality,
    *,
    goal: Goal | None = None,
    simulate: bool = False,
    html: Path | None = None,
) -> tuple[api.CompiledModel | api.Optimized, nn.Module]:
    """The model compiled for a backend, without a backend only optimized by the passes; and the model itself.

    Args:
        html: where the finished steps are written when an error ends the passes.
    """
    # Options are checked before a large model is read.
    known_checks = check_options(checks)
    pipeline = resolve_passes(passes)
    if backend is not None:
        find_backends(backend)
    place = check_device(device)
    quality.check()
    source = load(model)
    options = {"backend": backend, "goal": goal, "simulate": simulate}
    run = api.optimize if backend is None else partial(api.compile, **options)
    try:
        with from_disk(source.model, pipeline):
            compiled = run(
                source.model,
                source.example_inputs,
                passes=pipeline,
                device=device,
                checks=known_checks,
                **quality.arguments(source, place),
            )
    except Interrupted as error:
        write_stopped(html, model, error.history, "it was interrupted")
        show(Report("interrupted; finished so far", error.history))
        raise typer.Exit(130) from None
    except LissomError as error:
        write_stopped(html, model, error.history, str(error))
        raise
    for note in source.notes:
        Terminal(stderr=True).print(note, highlight=False, soft_wrap=True, markup=False)
    return compiled, source.model
