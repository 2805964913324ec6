"""The commands that measure: `lissom bench | machine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from lissom.artifacts.directory import is_artifact
from lissom.cli.bench.comparison import compare
from lissom.cli.bench.engines import ENGINES, find_engines
from lissom.cli.bench.profile import profile_model, profile_table
from lissom.cli.bench.report import comparison_table, markdown_table
from lissom.cli.bench.saved import saved_table
from lissom.cli.bench.worker import Record
from lissom.cli.bench.workload import DEFAULT_SHAPES, parse_shapes
from lissom.cli.calibration_files import read_texts
from lissom.cli.options import MOST_THREADS, Model, Seconds
from lissom.cli.saved import AllowNative, TrustedKey, check_saved
from lissom.driver.options import resolve_passes
from lissom.inspect.progress import progress_bar
from lissom.inspect.roofline import machine_table
from lissom.inspect.tables import show
from lissom.io.fields import visible
from lissom.io.files import check_writable, write_whole
from lissom.measure.machine import Machine, cache_path, load_machine, measure_machine, save_machine
from lissom.ops.native import describe_kernels
from lissom.ops.native.build import build_all


def run_bench(
    model: Model,
    engines: Annotated[str | None, typer.Option(help=f"Some of {', '.join(ENGINES)}; all by default.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help=f"Rows x tokens, or x ragged for whole texts padded; {DEFAULT_SHAPES} by default.")
    ] = None,
    seconds: Seconds = 2.0,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="For each engine; as many as PyTorch uses by default.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="A file of texts, one a line, to fill rows and calibrate with.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the compiled program's time goes instead.")] = False,
    passes: Annotated[str | None, typer.Option(help="With --profile: pipeline text or a recipe's name.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file too, as Markdown.")] = None,
    allow_native: AllowNative = False,
    trusted_key: TrustedKey = None,
) -> None:
    """Time a model on Lissom and on the other engines installed here, each in a process of its own."""
    if profile and (engines or markdown):
        raise typer.BadParameter("--engines and --markdown do not go with --profile")
    if passes and not profile:
        raise typer.BadParameter("--passes goes with --profile")
    if markdown is not None:
        check_writable(markdown)
    check_saved(is_artifact(model), trusted_key)
    if is_artifact(model) and (engines or texts or profile or markdown):
        raise typer.BadParameter("--engines, --texts, --profile and --markdown need the model, and do not go with a saved one")
    chosen = find_engines(engines) if engines else tuple(ENGINES.values())
    parsed = parse_shapes(shapes) if shapes else None
    lines = read_texts(texts) if texts else None
    if threads:
        torch.set_num_threads(threads)
    if is_artifact(model):
        shown = parsed or parse_shapes(DEFAULT_SHAPES)
        show(saved_table(Path(model), shown, seconds, allow_native=allow_native, trusted_keys=trusted_key or None))
        return
    if profile:
        resolve_passes(passes or "exact")
        machine = load_machine() or _measure_machine()[0]
        for part in profile_model(
            model, passes=passes or "exact", shapes=parsed, texts=lines, machine=machine, seconds=seconds
        ):
            show(profile_table(part))
        return
    threads = torch.get_num_threads()
    records: list[Record] = []
    interrupted = False
    try:
        with progress_bar("bench") as progress:
            compared = compare(model, chosen, shapes=parsed, texts=lines, threads=threads, seconds=seconds, progress=progress)
            for record in compared:
                records.append(record)
    except KeyboardInterrupt:
        interrupted = True
    show(comparison_table(f"{model}{', interrupted; finished so far' if interrupted else ''}", records, threads))
    if markdown is not None:
        write_whole(markdown, markdown_table(records, threads))
    if interrupted:
        raise typer.Exit(130)


def run_machine(
    again: Annotated[bool, typer.Option("--again", help="Measure anew, even if measured before.")] = False,
    build_kernels: Annotated[
        bool, typer.Option("--build-kernels", help="Build the C++ kernels for all processors into the cache, and nothing else.")
    ] = False,
) -> None:
    """Print what this machine can do at most: matrix products and memory bandwidth, measured once and kept."""
    if build_kernels:
        for name, failed in build_all().items():
            print(visible(f"{name}: {failed or 'built'}"))
        return
    machine = None if again else load_machine()
    if machine is not None:
        show(machine_table(machine))
        print(f"read from {cache_path()}\nkernels: {visible(describe_kernels())}")
        return
    machine, path = _measure_machine()
    show(machine_table(machine))
    print(f"kept in {path}\nkernels: {visible(describe_kernels())}")


def _measure_machine() -> tuple[Machine, Path]:
    with progress_bar("machine") as progress:
        machine = measure_machine(progress=progress)
    return machine, save_machine(machine)
