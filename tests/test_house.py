"""Tests of the repository itself: sizes of files, names that must agree, and what no file may hold."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lissom
import lissom.passes
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.passes import PASSES

ROOT = Path(lissom.__file__).parent.parent
PACKAGE = ROOT / "lissom"
LONGEST = 400
# Put together here, so that this file does not hold what it looks for.
ELSEWHERE = re.compile(r"(?<![\w.~:/*<-])/(work|opt|root|home|Users|mnt|scratch)/\w")
BINARY = {".png", ".jpg", ".safetensors", ".onnx", ".pt", ".gz", ".ico", ".woff2"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pass_classes() -> dict[type[Pass], str]:
    """Every pass defined in a module of lissom.passes, with the module's name."""
    found = {}
    for module in pkgutil.walk_packages(lissom.passes.__path__, "lissom.passes."):
        for _, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(item, Pass) and item.__module__ == module.name and not inspect.isabstract(item):
                found[item] = module.name
    return found


def parsed(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    """The modules in these folders, by their paths."""
    for path in sources(*folders):
        yield relative(path), ast.parse(path.read_text(encoding="utf-8"))


def test_files_are_short_enough_to_read():
    files = sources("lissom", "tests", "tools")
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}


def test_functions_are_short_enough_to_read():
    long = list[str]()
    for path, module in parsed("lissom"):
        for item in ast.walk(module):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
                # The body alone: options and their descriptions are a table.
                body = item.body[1:] if ast.get_docstring(item) else item.body
                if body and body[-1].end_lineno - body[0].lineno >= 50:
                    long.append(f"{path}: {item.name}")
    assert long == []


def test_modules_say_what_they_are():
    modules = parsed("lissom", "benchmarks", "examples", "tools")
    assert [path for path, module in modules if not ast.get_docstring(module)] == []


def test_what_is_imported_from_the_package_is_there():
    missing = list[str]()
    for path, parts in parsed("benchmarks", "examples", "tools"):
        for node in ast.walk(parts):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lissom":
                module = importlib.import_module(node.module)
                names = [item.name for item in node.names if not hasattr(module, item.name)]
                missing += [f"{path}: {node.module}.{name}" for name in names if not _is_module(module, name)]
    assert missing == []


def test_what_a_node_carries_is_read_in_one_place():
    """A loaded program makes the values in `node.meta` on first access. Graphs of other libraries hold plain ones."""
    others = {"lissom/integrations/transformers/exporters.py", "lissom/backends/onnx/export.py"}
    readers = {path for path, tree in parsed("lissom") for node in ast.walk(tree) if getattr(node, "attr", "") == "meta"}
    assert {path for path in readers - others if not path.startswith("lissom/frontends/")} == {"lissom/compiler/ir/node.py"}


def _is_module(package: object, name: str) -> bool:
    return importlib.util.find_spec(f"{package.__name__}.{name}") is not None


def test_there_are_passes():
    assert len(pass_classes()) >= len(PASSES) > 0


@pytest.mark.parametrize("item", pass_classes(), ids=lambda item: item.__name__)
def test_a_pass_is_in_the_table_under_its_name(item):
    assert PASSES[item.name()] is item


@pytest.mark.parametrize(("item", "module"), pass_classes().items(), ids=lambda item: getattr(item, "__name__", "module"))
def test_a_pass_and_its_file_have_one_name(item, module):
    assert module.rpartition(".")[2] == item.name().replace("-", "_")


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_a_page(name):
    page = ROOT / "docs" / "passes" / f"{name}.md"
    assert page.is_file()
    headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert [name in heading for heading in headings[:1]] == [True]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_a_golden_and_tests(name):
    snake = name.replace("-", "_")
    folder = Path(inspect.getfile(PASSES[name])).parent.relative_to(PACKAGE)
    assert (ROOT / "tests" / "golden" / f"{snake}.txt").is_file()
    assert (ROOT / "tests" / folder / f"test_{snake}.py").is_file()


def test_no_golden_and_no_page_is_left_over():
    goldens = {path.stem.replace("_", "-") for path in (ROOT / "tests" / "golden").glob("*.txt")}
    pages = {path.stem for path in (ROOT / "docs" / "passes").glob("*.md")}
    assert goldens == pages - {"index"} == set(PASSES)


def kept_files() -> list[Path]:
    """The text files a checkout holds, without what tools leave in it."""
    passed_over = {".git", "__pycache__", ".venv", "build", "dist", "site", "lissom.egg-info", "shared", ".ci"}
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        caches = any(part.endswith("_cache") or part == ".hypothesis" for part in parts)
        if path.is_file() and not caches and passed_over.isdisjoint(parts) and path.suffix not in BINARY:
            found.append(path)
    return found


def test_no_file_names_a_place_on_one_machine():
    named = []
    for path in kept_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if ELSEWHERE.search(line):
                named.append(f"{relative(path)}:{number}: {line.strip()}")
    assert named == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see /" + "work/main", True),
        ('path = "/' + 'opt/tools"', True),
        ("a rate of tokens/work/day", False),
        ("https://example.org/opt/page", False),
    ],
)
def test_a_place_on_one_machine_is_recognised(line, found):
    assert bool(ELSEWHERE.search(line)) is found
