"""The command that prints and draws programs, `lissom show`: one subcommand for each view."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lissom import api
from lissom.artifacts.directory import is_artifact
from lissom.cli.compile import compile_model
from lissom.cli.options import Data, Model, Passes, Quality, SavedOrModel, finite, one_of
from lissom.cli.saved import AllowNative, TrustedKey, check_saved, load_saved
from lissom.compiler.parallel.plan import make_plan
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
from lissom.passes.sites import sites

_COMMONEST = "program"


class _Views(TyperGroup):
    """Runs the commonest view where no view is named: `lissom show MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # Two words are a view and a model, so that a mistyped view is refused by its name.
        named = args[:1] == ["--help"] or (len(args) > 1 and not any(word.startswith("-") for word in args[:2]))
        if args and args[0] not in self.commands and not named:
            args = [_COMMONEST, *args]
        return super().parse_args(ctx, args)


views = typer.Typer(
    cls=_Views,
    no_args_is_help=True,
    subcommand_metavar="[VIEW] MODEL ...",
    help="Print or draw a model's program after the passes. VIEW is one of the commands below, and `program` by default.",
)

Lowered = Annotated[str | None, typer.Option("--backend", help="Show the program lowered for this backend.")]
Batch = Annotated[int | None, typer.Option(help="The batch; the example's by default.")]
Tokens = Annotated[int | None, typer.Option("--sequence", help="The tokens; the example's by default.")]
Picture = Annotated[Path, typer.Argument(help="The SVG file to write.")]
Only = Annotated[str, typer.Option(help="Draw this module alone, for example encoder.layer.0.")]
_HEATS = tuple(name for name in HEATS if name != "time")
"""Layers are timed by `lissom compile --full` only."""
Heat = Annotated[
    str | None,
    typer.Option(callback=one_of(_HEATS), help=f"Color nodes by {', '.join(_HEATS)}; error and mass are measured first."),
]


@dataclass(frozen=True)
class _Compiled:
    """A model and the passes after which it is shown: the first options of every view."""

    model: Model
    passes: Passes = "exact"
    backend: Lowered = None
    data: Data = None

    def open(
        self, checks: str = "structural", *, measured: bool = False, html: Path | None = None
    ) -> api.CompiledModel | api.Optimized:
        """The model after the passes.

        Args:
            checks: tables show structure and sizes, which structural checks cover.
            measured: whether the errors of nodes are measured.
            html: as in `compile_model`.
        """
        # A program that is only shown may have layers without a kernel.
        quality = Quality(self.data)
        compiled, original = compile_model(
            self.model, self.passes, self.backend, None, checks, quality, simulate=True, html=html
        )
        if measured:
            compiled.report.errors(original)
        return compiled


@dataclass(frozen=True)
class _Opened(_Compiled):
    """The same, or a saved model, which is shown as it is."""

    model: SavedOrModel
    allow_native: AllowNative = False
    trusted_key: TrustedKey = None

    def open(
        self, checks: str = "structural", *, measured: bool = False, html: Path | None = None
    ) -> api.CompiledModel | api.Optimized:
        saved = is_artifact(self.model)
        check_saved(saved, self.trusted_key)
        if not saved:
            return super().open(checks, measured=measured, html=html)
        if self.passes != "exact" or self.backend is not None or self.data is not None:
            raise typer.BadParameter("--passes, --backend and --data do not go with a saved model")
        return load_saved(Path(self.model), None, self.allow_native, self.trusted_key)


def _view(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a subcommand, whose options are the fields of the function's first parameter and its other ones."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        first, *own = inspect.signature(function, eval_str=True).parameters.values()
        model, *common = inspect.signature(first.annotation, eval_str=True).parameters.values()

        def command(**options: Any) -> None:
            fields = {field.name: options.pop(field.name) for field in (model, *common)}
            function(first.annotation(**fields), **options)

        parameters = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in (model, *own, *common)]
        command.__signature__ = inspect.Signature(parameters)
        views.command(name, help=inspect.getdoc(function))(command)
        return function

    return register


@_view(_COMMONEST)
def show_program(given: _Opened) -> None:
    """Print the program as text."""
    sys.stdout.write(visible(given.open("numeric").program.text()))


@_view("diff")
def show_difference(
    given: _Opened,
    before: Annotated[int, typer.Argument(min=0, help="A step of the history; 0 is the capture.")],
    after: Annotated[int, typer.Argument(min=0, help="Another step.")],
    svg: Annotated[Path | None, typer.Option(help="Draw what changed to this file, in place of the text.")] = None,
    only: Annotated[str, typer.Option(help="With --svg: draw this module alone, for example encoder.layer.0.")] = "",
) -> None:
    """Print what changed between two steps."""
    if svg is None:
        if only:
            raise typer.BadParameter("--only goes with --svg")
        changed = given.open("numeric").report.history.diff(before, after)
        Terminal().print(coloured_diff(changed) if changed else "the two steps are the same program", soft_wrap=True)
        return
    check_writable(svg)
    write_whole(svg, given.open("numeric").report.to_svg(step=after, only=only, compare=before))


@_view("structure")
def show_structure(given: _Opened) -> None:
    """List layers, attentions and feed-forwards."""
    show(structure_tables(given.open().program))


@_view("axes")
def show_axes(given: _Opened) -> None:
    """List the axes that linear layers contract."""
    show(axes_table(given.open().program))


@_view("sites")
def show_sites(given: _Opened) -> None:
    """List the sites for which passes take amounts, and which."""
    program = given.open().program
    show(amounts_table(program, sites(program)))


@_view("cost")
def show_cost(given: _Opened, batch: Batch = None, sequence: Tokens = None) -> None:
    """List FLOPs, bytes and parameters of every site."""
    show(cost_table(given.open().program, _sizes(batch, sequence), load_machine()))


@_view("errors")
def show_errors(given: _Compiled) -> None:
    """List each node's error, and the attention mass that sparse attentions keep."""
    errors = given.open("numeric", measured=True).report.measured_errors
    assert errors is not None
    show(errors)


@_view("graph")
def draw_graph(given: _Opened, file: Picture, only: Only = "", heat: Heat = None) -> None:
    """Draw the program as an SVG picture."""
    check_writable(file)
    write_whole(file, given.open("numeric", measured=heat in MEASURED).report.to_svg(only=only, heat=heat))


@_view("page")
def write_page(
    given: _Opened, file: Annotated[Path, typer.Argument(help="The HTML file to write.")], heat: Heat = None
) -> None:
    """Write the passes and the program after each as one HTML page."""
    check_writable(file)
    given.open("numeric", measured=heat in MEASURED, html=file).report.to_html(file, heat=heat)


@_view("attention")
def draw_attention(
    given: _Opened,
    file: Picture,
    only: Only = "",
    sequence: Annotated[int, typer.Option(help="The tokens.")] = TOKENS,
) -> None:
    """Draw which blocks of keys each block of queries sees."""
    check_writable(file)
    write_whole(file, attention_svg(given.open().program, only, sequence))


@_view("sharding")
def show_sharding(
    given: _Opened,
    ranks: Annotated[int, typer.Argument(min=2, help="How many ranks share the model.")],
    sequence_parallel: Annotated[
        bool, typer.Option("--sequence-parallel", help="Shard the values between layers by token position.")
    ] = False,
    latency: Annotated[float, typer.Option(min=0.0, callback=finite, help="Microseconds that one message takes.")] = 10.0,
    bandwidth: Annotated[float, typer.Option(min=1e-6, callback=finite, help="GB/s of one rank's link, one way.")] = 10.0,
    batch: Batch = None,
    sequence: Tokens = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the plan to this file, in place of the table.")] = None,
) -> None:
    """Print or draw the plan of `shard` for several ranks."""
    if svg is not None:
        check_writable(svg)
    program = given.open().program
    plan, sizes = make_plan(program, ranks, sequence=sequence_parallel), _sizes(batch, sequence)
    if svg is not None:
        write_whole(svg, sharding_svg(program, plan, sizes))
    else:
        show(sharding_table(program, plan, sizes, Link(latency * 1e-6, bandwidth * 1e9)))


def _sizes(batch: int | None, sequence: int | None) -> dict[str, int]:
    return {name: size for name, size in (("batch", batch), ("sequence", sequence)) if size is not None}
