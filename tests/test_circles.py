"""No modules and no rooms of the package import each other in a circle, imports for types and by name included."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lissom

PACKAGE = Path(lissom.__file__).parent
Graph = Mapping[str, set[str]]


def sources() -> dict[str, str]:
    """The text of every module by its name."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        named[name] = path.read_text(encoding="utf-8")
    return named


def imports(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports: in functions and for types too, and by their name in a string."""
    graph = {}
    for module, text in texts.items():
        graph[module] = {name for node in ast.walk(ast.parse(text)) for name in _imported(node, texts)} - {module}
    return graph


def _imported(node: ast.AST, modules: Mapping[str, str]) -> list[str]:
    match node:
        case ast.Import():
            names = [alias.name for alias in node.names]
        case ast.ImportFrom(module=str() as package):
            full = {alias.name: f"{package}.{alias.name}" for alias in node.names}
            names = [name if name in modules else package for name in full.values()]
        case ast.Constant(value=str() as name) if "." in name:
            names = [name]
        case _:
            names = []
    return [name for name in names if name in modules]


def rooms(graph: Graph, package: str) -> dict[str, set[str]]:
    """The modules and packages directly in a package, each with those of them that it imports from."""
    merged = defaultdict(set)
    for module, imported in graph.items():
        for name in imported:
            first, second = _child(module, package), _child(name, package)
            if first and second and first != second:
                merged[first].add(second)
    return merged


def _child(module: str, package: str) -> str:
    """The child of a package that a module belongs to; the package for itself; empty for a module of another one."""
    if module == package:
        return package
    inside = module.removeprefix(f"{package}.")
    return "" if inside == module else f"{package}.{inside.partition('.')[0]}"


def circle(graph: Graph) -> list[str]:
    """A circle of the graph, its first member repeated at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


GRAPH = imports(sources())


def test_no_modules_import_each_other_in_a_circle():
    assert circle(GRAPH) == []


@pytest.mark.parametrize("package", sorted({name.rpartition(".")[0] for name in GRAPH} - {""}))
def test_no_rooms_import_each_other_in_a_circle(package):
    assert circle(rooms(GRAPH, package)) == []


@pytest.mark.parametrize(
    "text",
    [
        "import p.a.one",
        "from p.a import one",
        "from p.a.one import name",
        "def late():\n    from p.a import one",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a.one import Kind",
        "from importlib import import_module\nimport_module('p.a.one').register()",
    ],
)
def test_a_circle_of_modules_is_found(text):
    texts = {"p": "", "p.a": "", "p.a.one": "from p.b import two", "p.b": "", "p.b.two": text}
    assert set(circle(imports(texts))) == {"p.a.one", "p.b.two"}


def test_circle_of_rooms_is_found_without_module_circle():
    texts = {"p.a.one": "from p.b import two", "p.b.two": "", "p.b.three": "from p.a import four", "p.a.four": ""}
    graph = imports(texts)
    assert circle(graph) == []
    assert set(circle(rooms(graph, "p"))) == {"p.a", "p.b"}
