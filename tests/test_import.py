"""What `import lissom` imports, told in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lissom
from lissom import errors


def imported(code: str, *names: str) -> list[str]:
    """Those of the modules that a new process has imported after the code."""
    code = f"import sys\n{code}\nprint(*[name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()


def test_importing_the_package_imports_nothing_large():
    assert imported("import lissom", "torch", "sympy", "numpy", "rich", "lissom.api", "lissom.errors") == []


def test_compile_imports_nothing_that_builds_extensions():
    unwanted = (
        "setuptools",
        "torch.utils.cpp_extension",
        "torch.utils.benchmark",
        "onnx",
        "onnxruntime",
        "openvino",
        "transformers",
    )
    assert imported("import lissom\nlissom.compile", "lissom.api", *unwanted) == ["lissom.api"]


@pytest.mark.parametrize("name", lissom.__all__)
def test_every_public_name_is_there(name):
    assert getattr(lissom, name) is not None
    assert name in dir(lissom)


def test_rooms_are_reachable_with_what_is_in_them():
    assert imported("import lissom\nlissom.artifacts.operators.allow, lissom.backends.BACKENDS", "torch") == ["torch"]


@pytest.mark.parametrize("name", ["lissom.compiler.pipeline.history", "lissom.ops", "lissom.artifacts.manifest"])
def test_a_module_can_be_imported_first(name):
    """`from lissom import ops` in a module asks the package for the name."""
    assert imported(f"import {name}", name) == [name]


def test_the_family_of_errors_is_at_the_top():
    assert lissom.LissomError is errors.LissomError


def test_name_that_does_not_exist_is_attribute_error():
    with pytest.raises(AttributeError, match="module 'lissom' has no attribute 'compyle'"):
        _ = lissom.compyle
