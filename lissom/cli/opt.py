"""The command that runs passes on the text of a program: `lissom opt`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lissom.artifacts.program_text import parse_program
from lissom.cli.bench.saved import make_inputs
from lissom.cli.options import Checks
from lissom.compiler.ir.fake import symbol_facts
from lissom.compiler.pipeline.options import check_options
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.driver.options import resolve_passes
from lissom.errors import ArtifactError
from lissom.inspect.tables import coloured_diff
from lissom.inspect.terminal import Terminal
from lissom.io.fields import visible
from lissom.io.files import check_writable, read_plain, write_whole

_MOST_BYTES = 64 << 20


def run_opt(
    file: Annotated[Path, typer.Argument(help="The text of a program, as `lissom show` prints it.")],
    passes: Annotated[str, typer.Option(help="Pipeline text, or a recipe's name; these passes alone are run.")] = "",
    size: Annotated[
        list[str] | None,
        typer.Option(help="A size at the example, batch=2; may be given several times. Others are small numbers."),
    ] = None,
    checks: Checks = "numeric",
    diff: Annotated[bool, typer.Option("--diff", help="Print what the passes changed, in place of the program.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the program to this file.")] = None,
) -> None:
    """Run passes on the text of a program, and print the program after them. Weights get random values."""
    known_checks = check_options(checks)
    chosen = resolve_passes(passes) if passes else []
    if output is not None:
        check_writable(output)
    given = read_plain(file, _MOST_BYTES)
    if len(given) > _MOST_BYTES:
        raise ArtifactError(f"'{file}' has more than {_MOST_BYTES >> 20} MiB; that is not the text of a program")
    try:
        text = given.decode()
    except UnicodeDecodeError:
        raise ArtifactError(f"'{file}' is no text; give one as `lissom show` prints it") from None
    program = parse_program(text, _sizes(size or []))
    hints = {symbol: fact.hint or 1 for symbol, fact in symbol_facts(program.fake_mode, program.signature.dimensions).items()}
    inputs = make_inputs(program, hints)
    optimized, history = Pipeline(chosen, [inputs], known_checks, data=[inputs]).run(program)
    if diff:
        changed = history.diff(0, len(history.steps) - 1)
        Terminal().print(coloured_diff(changed) if changed else "the passes changed nothing", soft_wrap=True)
    elif output is None:
        sys.stdout.write(visible(optimized.text()))
    if output is not None:
        write_whole(output, optimized.text())


def _sizes(given: list[str]) -> dict[str, int]:
    """Sizes by name. Raises typer.BadParameter."""
    sizes: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not equals or not number.isdecimal() or int(number) < 1:
            raise typer.BadParameter(f"--size takes a name and a number, such as batch=2, and not '{text}'")
        sizes[name] = int(number)
    return sizes
