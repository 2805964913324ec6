"""Make what the documentation shows: `python docs/generate.py`. With `--check`, say what is out of date.

Pages of passes come from the passes' docstrings and examples.py, docs/demo.txt from `lissom demo`. In README.md and docs/*.md,
blocks behind `<!-- output -->` and parts behind `<!-- generated: … -->` are filled in. Measured numbers are made anew when
generating and left out of account when checking. Naming documents limits the work to them.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from blocks import fill, mask, settled
from examples import EXAMPLES
from measure import machine, measure
from page import page, timings
from rich.console import Console

from lissom import demo
from lissom.api import compile
from lissom.frontends.huggingface import load
from lissom.inspect.tables import first_line
from lissom.passes import PASSES

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "docs" / "demo.txt"
VERSIONS = ROOT / "docs" / "versions.txt"
WIDTH = 100
"""Columns of docs/demo.txt."""
_MEASURED = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
_SIZES = re.compile(r"<!-- sizes -->\n.*?<!-- end -->", re.DOTALL)
_SECTION = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIRST_MEASURED_LINE = "embeddings differ"


@dataclass(frozen=True)
class Problem:
    """Why a document is out of date.

    excused: only outputs differ, and the document was made with other versions of torch or transformers, which show in them.
    """

    text: str
    excused: bool


def documents() -> list[Path]:
    """Every document with something generated in it, those that others quote first."""
    pages = [ROOT / "docs" / "passes" / f"{name}.md" for name in PASSES]
    return [DEMO, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *pages]


def fresh(path: Path, seconds: float | None = None) -> str:
    """The document as it should read now. seconds: how long to time each engine; None leaves out what is measured."""
    torch.compiler.reset()  # graphs are numbered, and a document shows its own
    if path == DEMO:
        return _demo(seconds)
    if path.parent.name == "passes":
        return fill(_page(path.stem, seconds), path.stem)
    sections = {"passes": _passes_table, "docs/demo.txt": _quoted_demo}
    text = _SECTION.sub(lambda found: f"{found[1]}{sections[found[2]]()}{found[3]}", path.read_text(encoding="utf-8"))
    return fill(text, path.stem)


def problem(path: Path) -> Problem | None:
    """What is out of date in a document. All its code is run; a failure there is raised."""
    name = path.relative_to(ROOT)
    made = fresh(path)
    if not path.exists():
        return Problem(f"{name} is missing; run `python docs/generate.py {name}`", excused=False)
    kept = path.read_text(encoding="utf-8")
    old, new = (_comparable(path, text).splitlines() for text in (kept, made))
    if old == new:
        return None
    excused = not made_with_these_versions() and _without_outputs(path, kept) == _without_outputs(path, made)
    lines = list(difflib.unified_diff(old, new, "as it is", "as it should be", n=1, lineterm=""))
    return Problem("\n".join([f"{name} is out of date; run `python docs/generate.py {name}`", *lines[:30]]), excused)


def stray_pages() -> list[Path]:
    """Pages of passes that do not exist."""
    return [path for path in sorted((ROOT / "docs" / "passes").glob("*.md")) if path.stem not in PASSES]


def versions() -> str:
    """The libraries whose versions show in programs, to the minor version."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "transformers"))


def made_with_these_versions() -> bool:
    """True when the documents were made with the libraries that are installed."""
    return VERSIONS.read_text(encoding="utf-8").strip() == versions()


def _comparable(path: Path, text: str) -> str:
    """The document without what is measured."""
    if path == DEMO:
        return mask(text.partition(_FIRST_MEASURED_LINE)[0])
    return settled(_MEASURED.sub(r"\1\2", text))


def _without_outputs(path: Path, text: str) -> str:
    """The document without what is measured and without what programs show."""
    return "" if path == DEMO else settled(_SIZES.sub("", _MEASURED.sub("", text)), outputs=False)


def _page(name: str, seconds: float | None) -> str:
    if name not in EXAMPLES:
        raise KeyError(f"docs/examples.py has no example for the pass {name}")
    gain = measure(EXAMPLES[name], name, seconds or 0.0)
    return page(PASSES[name], EXAMPLES[name], gain, "" if seconds is None else timings(gain, machine()))


def _demo(seconds: float | None) -> str:
    """What `lissom demo` prints into a pipe; up to its first measured line when nothing is to be timed."""
    if seconds is not None:
        command = [sys.executable, "-m", "lissom", "demo", "--seconds", str(seconds)]
        ran = subprocess.run(command, env={**os.environ, "COLUMNS": str(WIDTH)}, stdout=subprocess.PIPE, text=True, check=True)
        return _stripped(ran.stdout)
    checkpoint = load("minilm")
    compiled = compile(checkpoint.model, checkpoint.example_inputs)
    embeddings = demo.embed(compiled, checkpoint.encode(demo.SENTENCES))
    found = demo.Demonstration(compiled, 0.0, embeddings @ embeddings.T, {}, {})
    console = Console(width=WIDTH, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(compiled.report)
        console.print(demo.similarity_table(found))
    return _stripped(captured.get())


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def _quoted_demo() -> str:
    return f"```text\n{DEMO.read_text(encoding='utf-8').strip()}\n```\n"


def _passes_table() -> str:
    rows = [f"| [{name}](docs/passes/{name}.md) | {item.kind} | {first_line(item)} |\n" for name, item in PASSES.items()]
    return "".join(["| pass | kind | what it does |\n|---|---|---|\n", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate or check; the exit status is 1 when something is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, help="the documents to make, all by default")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when something is out of date")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each engine")
    options = parser.parse_args(arguments)
    chosen = [path.resolve() for path in options.documents] or documents()
    if options.check:
        return _check(chosen)
    VERSIONS.write_text(versions() + "\n", encoding="utf-8")
    for path in chosen:
        print(path.relative_to(ROOT), flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(fresh(path, options.seconds), encoding="utf-8")
    return 0


def _check(chosen: Sequence[Path]) -> int:
    found = [Problem(f"{path.relative_to(ROOT)} belongs to no pass; delete it", excused=False) for path in stray_pages()]
    found += [item for path in chosen if (item := problem(path)) is not None]
    for item in found:
        print(item.text, end="\n\n")
    if any(item.excused for item in found):
        print(f"made with {VERSIONS.read_text(encoding='utf-8').strip()}, here {versions()}: outputs may differ")
    wrong = [item for item in found if not item.excused]
    print(f"{len(chosen)} documents checked, {len(wrong)} out of date")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
