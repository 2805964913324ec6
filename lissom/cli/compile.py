"""The commands that run passes over a model: `lissom compile` and `lissom show`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from lissom import api
from lissom.artifacts.directory import check_target, is_artifact
from lissom.backends import find_backends
from lissom.backends.base import Backend as BackendObject
from lissom.cli.options import (
    Backend,
    Checks,
    Data,
    Device,
    Errors,
    GoalName,
    HeatName,
    Html,
    MaxDrop,
    MetricName,
    Model,
    Passes,
    Quality,
    Simulate,
    finite,
    goal_of,
)
from lissom.cli.saved import AllowNative, TrustedKey, check_saved, load_saved
from lissom.compiler.parallel.plan import make_plan
from lissom.compiler.pipeline.history import Interrupted
from lissom.compiler.pipeline.options import Goal, check_options
from lissom.driver.options import resolve_passes
from lissom.driver.ranks import with_world_size
from lissom.driver.torchrun import refuse_torchrun
from lissom.errors import LissomError
from lissom.frontends.capture.device import check_device
from lissom.frontends.models.sources import load
from lissom.inspect.report import Report, write_stopped
from lissom.inspect.roofline import cost_table
from lissom.inspect.sharding import Link, sharding_table
from lissom.inspect.sites import amounts_table, axes_table, structure_tables
from lissom.inspect.svg.attention import TOKENS, attention_svg
from lissom.inspect.svg.heat import HEATS, MEASURED
from lissom.inspect.svg.sharding import sharding_svg
from lissom.inspect.tables import coloured_diff, show
from lissom.inspect.terminal import Terminal
from lissom.io.fields import visible
from lissom.io.files import check_writable, write_whole
from lissom.measure.machine import load_machine
from lissom.passes.sites import sites as list_sites

console = Terminal()


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
    html: Html = None,
    errors: Errors = False,
    heat: HeatName = None,
    save: Annotated[Path | None, typer.Option("--save", "-o", help="Write what was compiled to this directory.")] = None,
    goal: GoalName = "latency",
) -> None:
    """Compile a model and print what every pass did."""
    refuse_torchrun("compile")
    _check_pages(heat, html, None, alone=True)
    if heat == "time" and not full:
        raise typer.BadParameter("--heat time needs --full, which times the layers")
    for path in filter(None, (history, text)):
        check_writable(path)
    if save is not None:
        check_target(save)
    chosen = with_world_size(backend, world_size)
    quality = Quality(data, metric, max_drop)
    measured = errors or heat in MEASURED
    compiled, original = _compile(
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


def run_show(
    model: Model,
    passes: Passes = "exact",
    backend: Annotated[str | None, typer.Option(help="Show the program lowered for this backend.")] = None,
    data: Data = None,
    diff: Annotated[
        str | None, typer.Option(help="Show what changed between two steps of the history, 10:11; 0 is the capture.")
    ] = None,
    structure: Annotated[bool, typer.Option("--structure", help="Show layers, attention and feed-forward sites.")] = False,
    axes: Annotated[bool, typer.Option("--axes", help="Show the axes that linear layers contract.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="Show the sites for which passes take amounts, and which.")] = False,
    cost: Annotated[bool, typer.Option("--cost", help="Show FLOPs, bytes and parameters of every site.")] = False,
    sharding: Annotated[int | None, typer.Option(help="Show the plan of `shard` for this many ranks.")] = None,
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="With --sharding: shard the values between layers by token position.")
    ] = False,
    latency: Annotated[
        float, typer.Option(min=0.0, callback=finite, help="With --sharding: microseconds one message takes.")
    ] = 10.0,
    bandwidth: Annotated[
        float, typer.Option(min=1e-6, callback=finite, help="With --sharding: GB/s of one rank's link, one way.")
    ] = 10.0,
    batch: Annotated[int | None, typer.Option(help="With --cost or --sharding: the batch; the example's by default.")] = None,
    sequence: Annotated[
        int | None,
        typer.Option(help="With --cost, --sharding or --attention: the tokens; the example's by default."),
    ] = None,
    html: Html = None,
    svg: Annotated[
        Path | None,
        typer.Option(help="Draw the program to this file, as SVG; with --diff what changed, with --sharding the plan."),
    ] = None,
    only: Annotated[str, typer.Option(help="With --svg: draw this module alone, encoder.layer.0.")] = "",
    attention: Annotated[
        bool, typer.Option("--attention", help="With --svg: draw which blocks of keys each block of queries sees.")
    ] = False,
    errors: Errors = False,
    heat: HeatName = None,
    allow_native: AllowNative = False,
    trusted_key: TrustedKey = None,
) -> None:
    """Print a model's program after the passes, the difference between two steps, its structure, or what every site costs."""
    sizes = {name: size for name, size in (("batch", batch), ("sequence", sequence)) if size is not None}
    views = (structure or axes or sites, cost, sharding is not None, diff is not None, attention, errors and svg is None)
    _check_views(views, sizes, heat, errors=errors and svg is not None, attention=attention)
    _check_sharding(sharding, sequence_parallel, only)
    if svg is None and (only or attention):
        raise typer.BadParameter("--only and --attention go with --svg")
    if svg is not None and (structure or axes or sites or cost):
        raise typer.BadParameter("--svg does not go with --structure, --axes, --sites or --cost")
    _check_pages(heat, html, svg, alone=diff is None and sharding is None and not attention)
    steps = _read_steps(diff) if diff is not None else None
    # Tables show structure and sizes, which structural checks cover; a printed program is checked numerically.
    checks = "structural" if structure or axes or sites or cost or attention or sharding is not None else "numeric"
    check_saved(is_artifact(model), trusted_key)
    if is_artifact(model):
        if passes != "exact" or backend is not None or data is not None or errors:
            raise typer.BadParameter("--passes, --backend, --data and --errors do not go with a saved model")
        compiled = load_saved(Path(model), None, allow_native, trusted_key)
    else:
        # A program that is only shown may have layers without a kernel.
        compiled, original = _compile(model, passes, backend, None, checks, Quality(data), simulate=True, html=html)
        if errors or heat in MEASURED:
            compiled.report.errors(original)
    program = compiled.program
    plan = None if sharding is None else make_plan(program, sharding, sequence=sequence_parallel)
    if html is not None:
        compiled.report.to_html(html, heat=heat)
    if svg is not None:
        if attention:
            picture = attention_svg(program, only, TOKENS if sequence is None else sequence)
        elif plan is not None:
            picture = sharding_svg(program, plan, sizes)
        else:
            before, after = steps or (None, None)
            picture = compiled.report.to_svg(step=after, only=only, compare=before, heat=heat)
        write_whole(svg, picture)
    elif structure or axes or sites:
        tables = [structure_tables] * structure + [axes_table] * axes
        show(*(table(program) for table in tables), *([amounts_table(program, list_sites(program))] if sites else []))
    elif plan is not None:
        show(sharding_table(program, plan, sizes, Link(latency * 1e-6, bandwidth * 1e9)))
    elif cost:
        show(cost_table(program, sizes, load_machine()))
    elif steps is not None:
        changed = compiled.report.history.diff(*steps)
        console.print(coloured_diff(changed) if changed else "the two steps are the same program", soft_wrap=True)
    elif errors and compiled.report.measured_errors is not None:
        show(compiled.report.measured_errors)
    elif html is None:
        sys.stdout.write(visible(program.text()))


def _check_views(views: Sequence[bool], sizes: Mapping[str, int], heat: str | None, *, errors: bool, attention: bool) -> None:
    """Refuse two views at once, and options of another view.

    Args:
        views: structure, cost, sharding, diff, attention, and errors.
        errors: whether they are to be in a picture.
    """
    if sum(views) > 1:
        raise typer.BadParameter(
            "--structure, --axes and --sites, --cost, --sharding, --diff, --attention and --errors are views; give one of them"
        )
    if errors and heat not in MEASURED:
        raise typer.BadParameter(f"--errors goes with --svg as --heat {' or '.join(MEASURED)}")
    if heat == "time":
        raise typer.BadParameter("--heat time goes with `lissom compile --full`, which times the layers")
    _, cost, sharding, *_ = views
    if sizes and not cost and not sharding and (not attention or "batch" in sizes):
        raise typer.BadParameter(
            "--batch goes with --cost or --sharding, and --sequence with --cost, --sharding or --attention"
        )


def _check_sharding(ranks: int | None, sequence_parallel: bool, only: str) -> None:
    """Refuse a plan for too few ranks, its option without a plan, and a part of a picture of it."""
    if ranks is not None and ranks < 2:
        raise typer.BadParameter("--sharding takes 2 ranks or more")
    if sequence_parallel and ranks is None:
        raise typer.BadParameter("--sequence-parallel goes with --sharding")
    if only and ranks is not None:
        raise typer.BadParameter("--only does not go with --sharding")


def _check_pages(heat: str | None, html: Path | None, svg: Path | None, *, alone: bool) -> None:
    """Refuse a heat without a page or picture to color, and files that cannot be written.

    Args:
        alone: no other view is asked for.
    """
    if heat is not None and ((html is None and svg is None) or not alone):
        raise typer.BadParameter("--heat goes with --html or --svg, and not with --diff, --attention or --sharding")
    if heat is not None and heat not in HEATS:
        raise typer.BadParameter(f"--heat is one of {', '.join(HEATS)}, and not '{heat}'")
    for path in filter(None, (html, svg)):
        check_writable(path)


def _read_steps(text: str) -> tuple[int, int]:
    """The two step numbers in a text such as `10:11`."""
    before, colon, after = text.partition(":")
    if not colon or not before.isdecimal() or not after.isdecimal():
        raise typer.BadParameter(f"--diff takes two steps, for example 10:11, and not '{text}'")
    return int(before), int(after)


def _compile(
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
