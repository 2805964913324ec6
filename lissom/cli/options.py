"""Options shared by several commands of the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lissom.cli.calibration_files import FORMATS, METRICS, make_metric, read_data
from lissom.compiler.pipeline.options import Goal, check_goal
from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.models.sources import NAMES, Source

MOST_THREADS = 256
"""A limit, because OpenMP ends the process if it cannot start the requested threads."""


def finite(value: float) -> float:
    """Refuse infinity and NaN, which typer's ranges allow."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def finite_or_none(value: float | None) -> float | None:
    """Like `finite`, for an optional value."""
    return None if value is None else finite(value)


def one_of(names: Sequence[str]) -> Callable[[str | None], str | None]:
    """A check that refuses other names than these."""

    def check(name: str | None) -> str | None:
        if name is not None and name not in names:
            raise typer.BadParameter(f"'{name}' is not one of {', '.join(names)}")
        return name

    return check


Model = Annotated[str, typer.Argument(help=NAMES)]
SavedOrModel = Annotated[str, typer.Argument(help=f"A directory that --save wrote. {NAMES}")]
Passes = Annotated[str, typer.Option(help="Pipeline text, for example 'remove-no-ops,raise-attention', or a recipe's name.")]
DecoderPasses = Annotated[
    str | None,
    typer.Option(
        help="Pipeline text, or a recipe's name; by default 'exact', and 'use-stored-weights' for a GGUF file or a quantized "
        "checkpoint."
    ),
]
Backend = Annotated[str, typer.Option(help="What runs the result.")]
Device = Annotated[str | None, typer.Option(help="Where the result runs, for example cuda:0; the CPU by default.")]
Seconds = Annotated[
    float,
    typer.Option(min=0.0, max=86_400.0, callback=finite, help="How long to time each engine at each shape."),
]
Checks = Annotated[str, typer.Option(help="numeric, structural or off.")]
GoalName = Annotated[
    str, typer.Option("--goal", help="Revert lossy passes by latency or memory, as measured here; none keeps every pass.")
]
Simulate = Annotated[
    bool, typer.Option("--simulate", help="Compute quantized layers without a kernel in floating point, on quantized values.")
]
Data = Annotated[Path | None, typer.Option(help=f"Calibration data: {FORMATS}.")]
MetricName = Annotated[
    str | None,
    typer.Option(
        help=f"Measures quality after every lossy pass, on --data or the example inputs: {', '.join(METRICS)}, "
        "or module:function, which scores a model."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(min=0.0, callback=finite_or_none, help="The most --metric may drop; a pass that costs more is refused."),
]


def goal_of(name: str) -> Goal | None:
    """The goal that an option names. Raises UnsupportedError for another name."""
    return check_goal(None if name == "none" else name)


@dataclass(frozen=True)
class Quality:
    """Calibration data and quality limits: the options `--data`, `--metric` and `--max-drop`."""

    data: Path | None = None
    metric: str | None = None
    max_drop: float | None = None

    def check(self) -> None:
        """Check the options before a model is read. Raises ArtifactError, UnsupportedError."""
        if self.data is not None and not self.data.exists():
            raise ArtifactError(f"'{self.data}' does not exist; --data takes {FORMATS}")
        if self.max_drop is not None and self.metric is None:
            raise UnsupportedError(f"--max-drop needs --metric: {', '.join(METRICS)}, or module:function")

    def batches(self, source: Source, device: torch.device | None) -> list[dict[str, object]]:
        """The calibration batches, on a device."""
        return read_data(self.data, source, device) if self.data is not None else []

    def arguments(self, source: Source, device: torch.device | None) -> dict[str, Any]:
        """The arguments `data`, `metric` and `max_drop` of `compile`."""
        batches = self.batches(source, device)
        metric = None if self.metric is None else make_metric(self.metric, source, batches, device)
        return {"data": batches, "metric": metric, "max_drop": self.max_drop}
