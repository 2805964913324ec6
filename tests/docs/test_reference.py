"""The reference: every public name is in it, and its docstring gives shapes and errors, and an example that runs."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import lissom

ROOT = Path(__file__).resolve().parents[2]
ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n      members: \[(.*?)\]\n)?", re.MULTILINE)
NEVER_FAILS = {"lissom.dynamo_reports"}
# They take seconds: a search, a session of ONNX Runtime, a real encoder, and decoders beside that of `compile_generation`.
SLOW = {
    "lissom.integrations.transformers.pruned_tokenizer.pruned_tokenizer",
    "lissom.tuning.tuned.tune",
    "lissom.tuning.generation.tune_generation",
    "lissom.backends.onnxruntime.backend.OnnxRuntime",
    "lissom.backends.openvino.backend.OpenVino",
    "lissom.generation.compile.load_generation",
    "lissom.generation.compile_pool.load_pool",
    "lissom.generation.decoder.Decoder",
    "lissom.generation.model.GenerationModel",
    "lissom.generation.encoder_decoder.EncoderDecoderModel",
}


def entries() -> dict[str, list[str]]:
    """The names on the pages of the reference, each with those of its members that are shown."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "reference").glob("*.md")))
    return {name: [item for item in members.split(", ") if item] for name, members in ENTRY.findall(text)}


def lookup(name: str) -> object:
    module, _, leaf = name.rpartition(".")
    return getattr(importlib.import_module(module), leaf)


def documented() -> list[str]:
    """Every function, class and shown member, by its full name."""
    return [full for name, members in entries().items() for full in (name, *(f"{name}.{member}" for member in members))]


def member(full: str) -> object:
    """A function, class, method or property by its full name."""
    if full in entries():
        return lookup(full)
    owner, _, leaf = full.rpartition(".")
    found = inspect.getattr_static(lookup(owner), leaf)
    return found.fget if isinstance(found, property) else found


def examples() -> list:
    """Every docstring of the package with an example, by the full name of what it documents; reads the sources alone."""
    found = []
    for path in sorted((ROOT / "lissom").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if ">>> " in source:
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found += _examples(ast.parse(source), module, path)
    return found


def _examples(owner: ast.AST, name: str, path: Path) -> list:
    found = []
    for node in ast.iter_child_nodes(owner):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            full = f"{name}.{node.name}"
            text = ast.get_docstring(node) or ""
            if ">>> " in text:
                marks = [pytest.mark.slow] if full in SLOW else []
                found.append(pytest.param(text, full, path, node.lineno, id=full, marks=marks))
            found += _examples(node, full, path)
    return found


def test_every_public_name_is_in_the_reference():
    homes = {lookup(name) for name in entries()}
    names = set(lissom.__all__) - {"__version__"}
    assert {name for name in names if getattr(lissom, name) not in homes} == set()


@pytest.mark.parametrize("name", ["Optimized", "Tuned", "sites", "dynamo_reports", "compile_generation"])
def test_classes_that_public_names_lead_to_are_in_reference(name):
    """Those in the annotations of a result's fields, or of what a function returns."""
    found = getattr(lissom, name)
    found = found if inspect.isclass(found) else inspect.unwrap(found)
    fields = {name: text for name, text in found.__annotations__.items() if not name.startswith("_")}
    annotations = fields.values() if inspect.isclass(found) else [fields["return"]]
    listed = {entry.rpartition(".")[2] for entry in entries()} | {
        item.__name__ for item in getattr(found, "__parameters__", ())
    }
    listed.add("Inputs")  # the alias of what functions take as example_inputs
    assert {word for text in annotations for word in re.findall(r"\b[A-Z]\w+", text)} <= listed


@pytest.mark.parametrize("full", documented())
def test_a_public_name_has_a_docstring(full):
    assert inspect.getdoc(member(full))


@pytest.mark.parametrize("name", entries())
def test_a_public_name_has_an_example(name):
    found = lookup(name)
    # An error is shown by the example of its base class.
    owners = [item for item in found.__mro__ if item.__module__.startswith("lissom.")] if inspect.isclass(found) else [found]
    assert any(">>> " in (item.__doc__ or "") for item in owners)


@pytest.mark.parametrize("full", documented())
def test_a_docstring_says_which_errors_are_raised(full):
    found = inspect.unwrap(member(full))
    if inspect.isclass(found):
        return
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(tree(found)))
    public = full in entries() and full not in NEVER_FAILS
    assert "Raises:" in (found.__doc__ or "") or not (raises or public)


@pytest.mark.parametrize("full", documented())
def test_a_docstring_gives_the_shapes_of_tensors(full):
    found = inspect.unwrap(member(full))
    if inspect.isclass(found):
        return
    taken = [item for name, item in found.__annotations__.items() if name != "return"]
    assert re.search(r"\[\w+", found.__doc__ or "") or not any(str(item).startswith("torch.Tensor") for item in taken)


@functools.cache
def tree(function: object) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


@pytest.mark.parametrize(("text", "full", "path", "line"), examples())
def test_an_example_prints_what_it_says(text, full, path, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "onnx" in text.lower():
        pytest.importorskip("onnxruntime")
    found = doctest.DocTestParser().get_doctest(text, {}, full, str(path), line)
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(found, out=report.append)
    assert not report, "".join(report)
