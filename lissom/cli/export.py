"""The command that writes a model for another runtime: `lissom export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lissom import api
from lissom.cli.options import Checks, Data, MaxDrop, MetricName, Model, Passes, Quality
from lissom.compiler.pipeline.options import check_options
from lissom.driver.options import resolve_passes
from lissom.driver.torchrun import refuse_torchrun
from lissom.export.gguf.writer import check_dtype
from lissom.frontends.capture.device import check_device
from lissom.frontends.models.sources import load
from lissom.inspect.terminal import Terminal
from lissom.io.files import check_writable

console = Terminal()


def run_export(
    model: Model,
    file: Annotated[Path, typer.Argument(help="The file to write; its name ends in .gguf.")],
    passes: Passes = "exact",
    dtype: Annotated[
        str | None, typer.Option(help="Of matrices in floating point: f32, f16 or bf16; the program's own by default.")
    ] = None,
    checks: Checks = "numeric",
    data: Data = None,
    metric: MetricName = None,
    max_drop: MaxDrop = None,
) -> None:
    """Write a decoder after the passes as a GGUF file, which llama.cpp runs."""
    refuse_torchrun("export")
    if file.suffix != ".gguf":
        raise typer.BadParameter(f"lissom export writes GGUF files, named something.gguf, and not '{file.name}'")
    check_writable(file)
    chosen = check_dtype(dtype)
    pipeline, quality = resolve_passes(passes), Quality(data, metric, max_drop)
    quality.check()
    source = load(model)
    optimized = api.optimize(
        source.model,
        source.example_inputs,
        passes=pipeline,
        checks=check_options(checks),
        **quality.arguments(source, check_device(None)),
    )
    written = optimized.export_gguf(file, dtype=chosen)
    for note in source.notes:
        Terminal(stderr=True).print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{file}: {written}", highlight=False, soft_wrap=True, markup=False)
