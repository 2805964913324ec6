"""Generate the outputs in the documentation: `python -m tools.docs.generate`. With `--check`, list the outdated documents.

Pages of passes come from the passes' docstrings and examples.py, docs/demo.txt from `lissom demo`. In README.md, docs/*.md
and docs/tutorials/*.md, blocks after `<!-- output -->` and parts after `<!-- generated: … -->` are filled in. Measured numbers
are measured again when generating and ignored when checking. Named documents limit the work to them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Group

from lissom.api import compile
from lissom.cli import demo
from lissom.frontends.models.huggingface import load
from lissom.inspect.catalogue import first_line, grouped
from lissom.inspect.tables import plain
from lissom.passes import PASSES, RECIPES
from tools.docs.blocks import fill, mask, settled
from tools.docs.examples import EXAMPLES
from tools.docs.measure import machine, measure, run_example
from tools.docs.page import change_picture, left_by_times, page, timings

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "docs" / "demo.txt"
VERSIONS = ROOT / "docs" / "versions.txt"
INDEX = ROOT / "docs" / "passes" / "index.md"
WIDTH = 80
"""Columns of docs/demo.txt."""
_MEASURED = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
_SIZES = re.compile(r"<!-- sizes -->\n.*?<!-- end -->", re.DOTALL)
_SECTION = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_FIRST_MEASURED_LINE = "embeddings differ"
_MEASURED_SPEED = re.compile(r"[0-9.]+( to [0-9.]+)? × faster,\s")


@dataclass(frozen=True)
class Problem:
    """The reason why a document is outdated.

    excused: only outputs differ, and the document was made with other versions of torch or transformers, which affect them.
    """

    text: str
    excused: bool


def documents() -> list[Path]:
    """Every document with a generated part, those quoted by others first."""
    pages = [ROOT / "docs" / "passes" / f"{name}.md" for name in PASSES]
    guides = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    return [DEMO, ROOT / "README.md", *guides, INDEX, *pages]


def is_slow(path: Path) -> bool:
    """True for a document that says so in its first line; its code takes more than a few seconds."""
    return path.exists() and path.read_text(encoding="utf-8").startswith("<!-- slow -->\n")


def fresh(path: Path, seconds: float | None = None) -> str:
    """The document as it should read now. seconds: time per engine; None leaves out measurements."""
    torch.compiler.reset()  # Dynamo numbers graphs, and each document starts at 0
    if path == DEMO:
        return _demo(seconds)
    if path.parent.name == "passes" and path != INDEX:
        return fill(_page(path.stem, seconds), path.stem)
    sections = {"passes": _passes_tables, "recipes": _recipes, "docs/demo.txt": _quoted_demo, "rooms": _rooms}
    text = _SECTION.sub(lambda match: f"{match[1]}{sections[match[2]]()}{match[3]}", path.read_text(encoding="utf-8"))
    if seconds is not None:
        text = _MEASURED.sub(lambda match: f"{match[1]}{_hot_layers()}{match[2]}", text)
    return fill(text, path.stem)


def picture_of(page: Path) -> Path:
    """Where the picture of a pass's page is."""
    return page.parent / "pictures" / f"{page.stem}.svg"


def has_picture(path: Path) -> bool:
    """True for the page of a pass."""
    return path.parent.name == "passes" and path != INDEX


def problem(path: Path) -> Problem | None:
    """The problem of an outdated document. All its code is run; an error in it is raised."""
    name = path.relative_to(ROOT)
    made = fresh(path)
    if not path.exists():
        return Problem(f"{name} is missing; run `python -m tools.docs.generate {name}`", excused=False)
    kept = path.read_text(encoding="utf-8")
    old, new = (_comparable(path, text).splitlines() for text in (kept, made))
    if has_picture(path) and not left_by_times(path.stem):
        drawn = picture_of(path).read_text(encoding="utf-8") if picture_of(path).exists() else ""
        old, new = [*old, *drawn.splitlines()], [*new, *(change_picture(path.stem) or "").splitlines()]
    if old == new:
        return None
    excused = not made_with_these_versions() and _without_outputs(path, kept) == _without_outputs(path, made)
    lines = list(difflib.unified_diff(old, new, "as it is", "as it should be", n=1, lineterm=""))
    return Problem("\n".join([f"{name} is out of date; run `python -m tools.docs.generate {name}`", *lines[:30]]), excused)


def stray_pages() -> list[Path]:
    """Pages and pictures of passes that do not exist."""
    paths = [*sorted(INDEX.parent.glob("*.md")), *sorted((INDEX.parent / "pictures").glob("*.svg"))]
    return [path for path in paths if path.stem not in PASSES and path != INDEX]


def versions() -> str:
    """The versions, to the minor version, of the libraries that affect printed programs."""
    return ", ".join(f"{name} {'.'.join(version(name).split('.')[:2])}" for name in ("torch", "transformers"))


def made_with_these_versions() -> bool:
    """True if the documents were made with the installed libraries."""
    return VERSIONS.read_text(encoding="utf-8").strip() == versions()


def _comparable(path: Path, text: str) -> str:
    """The document without measured parts."""
    if path == DEMO:
        settled_text = _MEASURED_SPEED.sub("", text.partition(_FIRST_MEASURED_LINE)[0])
        # Without its speed the first line may wrap elsewhere.
        title, rule, rest = settled_text.partition("\n\n")
        return mask(" ".join(title.split()) + rule + rest)
    return settled(_MEASURED.sub(r"\1\2", text))


def _without_outputs(path: Path, text: str) -> str:
    """The document without measured parts and without outputs that depend on library versions."""
    return "" if path == DEMO else settled(_SIZES.sub("", _MEASURED.sub("", text)), outputs=False)


def _page(name: str, seconds: float | None) -> str:
    if name not in EXAMPLES:
        raise KeyError(f"tools/docs/examples.py has no example for the pass {name}")
    measured = "" if seconds is None else timings(measure(EXAMPLES[name], name, seconds), machine())
    return page(PASSES[name], EXAMPLES[name], run_example(name), measured)


def _demo(seconds: float | None) -> str:
    """The output of `lissom demo` into a pipe; up to its first measured line if nothing is timed."""
    if seconds is not None:
        command = [sys.executable, "-m", "lissom", "demo", "--seconds", str(seconds)]
        ran = subprocess.run(command, env={**os.environ, "COLUMNS": str(WIDTH)}, stdout=subprocess.PIPE, text=True, check=True)
        return ran.stdout
    checkpoint = load("minilm")
    compiled = compile(checkpoint.model, checkpoint.example_inputs)
    embeddings = demo.embed(compiled, checkpoint.encode(demo.SENTENCES))
    demonstration = demo.Demonstration(compiled, 0.0, embeddings @ embeddings.T, {}, {})
    return plain(Group(demonstration.report, demo.similarity_table(demonstration)), WIDTH)


def _hot_layers() -> str:
    """The hot layers of MiniLM, with the machine they were timed on."""
    checkpoint = load("minilm")
    compiled = compile(checkpoint.model, checkpoint.example_inputs)
    layer_times = compiled.report.kernels(**checkpoint.encode([*demo.SENTENCES] * 8))
    return f"{machine()}\n\n```text\n{plain(layer_times).strip()}\n```\n"


def _quoted_demo() -> str:
    return f"```text\n{DEMO.read_text(encoding='utf-8').strip()}\n```\n"


def _passes_tables() -> str:
    """A table per group of passes, with links relative to this page."""
    parts: list[str] = []
    for title, members in grouped(PASSES).items():
        rows = [
            f"| [{name}]({name}.md) | {'exact' if cls.kind in ('rewrite', 'annotation') else 'lossy'} | {first_line(cls)} |"
            for name, cls in members.items()
        ]
        parts.append("\n".join([f"## {title}", "", "| pass | | what it does |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _rooms() -> str:
    """The packages of Lissom, each with the first sentence of its docstring."""
    rows: list[str] = []
    for path in sorted((ROOT / "lissom").rglob("__init__.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        room = path.parent.relative_to(ROOT).as_posix()
        rows.append(f"| `{room}` | {' '.join(about.split(chr(10) * 2)[0].split())} |")
    return "\n".join(["", "| room | what is in it |", "|---|---|", *rows, ""])


def _recipes() -> str:
    rows = [f"| `{name}` | {text.replace(',', ', ')} | {_measured(name)} |\n" for name, text in RECIPES.items()]
    return "".join(["| recipe | passes | all-MiniLM-L6-v2: faster, bytes saved, quality kept |\n|---|---|---|\n", *rows])


def _measured(recipe: str) -> str:
    """The row of a recipe in the trade-offs of MiniLM; empty where it has none."""
    rows = json.loads((ROOT / "benchmarks" / "tradeoffs.json").read_text(encoding="utf-8"))
    row = next((row for row in rows if row["model"] == "minilm" and row["technique"] == f"recipe {recipe}"), None)
    return "" if row is None else f"{row['faster']:.2f} ×, {row['saved']:.0%}, {row['kept']:.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Generate or check; the exit status is 1 if a document is outdated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, help="the documents to make, all by default")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 when something is out of date")
    parser.add_argument("--keep-measured", action="store_true", help="leave measured numbers as they stand")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each engine")
    options = parser.parse_args(arguments)
    chosen = [path.resolve() for path in options.documents] or documents()
    if options.check:
        return _check(chosen)
    VERSIONS.write_text(versions() + "\n", encoding="utf-8")
    for path in chosen:
        print(path.relative_to(ROOT), flush=True)
        path.parent.mkdir(exist_ok=True)
        text = _kept_measured(path) if options.keep_measured else fresh(path, options.seconds)
        path.write_text(text, encoding="utf-8")
        if has_picture(path):
            _draw(path)
    return 0


def _draw(page: Path) -> None:
    """Write the picture of a pass's page; a pass that leaves the graph as it is has none."""
    picture, path = change_picture(page.stem), picture_of(page)
    if picture is None:
        if not left_by_times(page.stem):
            path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(picture, encoding="utf-8")


def _kept_measured(path: Path) -> str:
    """The regenerated document with its present measured parts."""
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    made = fresh(path)
    if path == DEMO:
        return made + kept[kept.find(_FIRST_MEASURED_LINE) :] if _FIRST_MEASURED_LINE in kept else made
    parts = iter([match.group() for match in _MEASURED.finditer(kept)])
    return _MEASURED.sub(lambda match: next(parts, match.group()), made)


def _check(chosen: Sequence[Path]) -> int:
    faults = [Problem(f"{path.relative_to(ROOT)} belongs to no pass; delete it", excused=False) for path in stray_pages()]
    faults += [fault for path in chosen if (fault := problem(path)) is not None]
    for fault in faults:
        print(fault.text, end="\n\n")
    if any(fault.excused for fault in faults):
        print(f"made with {VERSIONS.read_text(encoding='utf-8').strip()}, here {versions()}: outputs may differ")
    wrong = [fault for fault in faults if not fault.excused]
    print(f"{len(chosen)} documents checked, {len(wrong)} out of date")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
