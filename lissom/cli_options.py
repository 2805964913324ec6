"""Options that several commands of the command line take."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from lissom.frontends.sources import NAMES

MOST_THREADS = 256
"""OpenMP ends the process where it cannot start the threads it is asked for."""


def finite(value: float) -> float:
    """An option that is no infinity and no NaN, which ranges let through."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def refuse_ways(value: int | None) -> None:
    """Answer the name an option once had with the one it has now."""
    if value is not None:
        raise typer.BadParameter("it is called --world-size now")


Model = Annotated[str, typer.Argument(help=NAMES)]
Passes = Annotated[str, typer.Option(help="Pipeline text, for example 'remove-no-ops,raise-attention', or a recipe's name.")]
Backend = Annotated[str, typer.Option(help="What runs the result.")]
Device = Annotated[str | None, typer.Option(help="Where the result runs, for example cuda:0; the CPU by default.")]
Seconds = Annotated[
    float,
    typer.Option(min=0.0, max=86_400.0, callback=finite, help="How long to time each engine at each shape."),
]
Ways = Annotated[int | None, typer.Option("--ways", hidden=True, callback=refuse_ways)]
Checks = Annotated[str, typer.Option(help="numeric, structural or off.")]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="Compute quantized layers without a kernel in floating point, on rounded values.")
]
