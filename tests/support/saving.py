"""What the tests of artifacts share: models compiled without passes, saved once a session, and processes that load them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

import lissom
from lissom.backends.eager.backend import Eager
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History, Size, Step
from lissom.frontends.capture.export import Capture, capture
from lissom.inspect.report import Report
from lissom.runtime.compiled_model import CompiledModel
from tests.support.models import capture_of


def plainly_compiled(found: Capture) -> CompiledModel:
    """A capture on the backend eager, without passes, as `lissom.compile` would give it."""
    program = found.program.copy()
    history = History("", "off")
    history.record(Step(0, "capture", "capture", 0.5, 0.0, Size.of(program), notes=("a note",)), program.text())
    return CompiledModel(program, Eager().build(program, found.example), Report(f"{program.name} on eager", history), Eager())


def compiled(name: str) -> CompiledModel:
    """One of tests.support.models.CASES."""
    return plainly_compiled(capture_of(name))


def compiled_module(model: nn.Module, *inputs: object) -> CompiledModel:
    return plainly_compiled(capture(model.eval(), inputs))


def reloaded(model: CompiledModel, directory: Path) -> CompiledModel:
    model.save(directory)
    return lissom.load(directory)


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def write_expectation(model: CompiledModel, example: Sample, path: Path) -> None:
    """The inputs of a call with the tensors it gives, for another process to compare with."""
    args, kwargs = model.program.signature.arguments(example)
    results = tensors_of(model(*args, **kwargs))
    tensors = {f"input {index}": tensor.contiguous() for index, tensor in enumerate(example)}
    tensors |= {f"output {index}": tensor.contiguous() for index, tensor in enumerate(results)}
    save_file(tensors, path)


# Argument: directories that hold `artifact`, `expected.safetensors` and `text`.
CHECK = """
import sys
from pathlib import Path
blocked = "--without-transformers" in sys.argv
if blocked:
    sys.modules["transformers"] = None
import torch
import lissom
from safetensors.torch import load_file
from torch.utils import _pytree as pytree

for folder in map(Path, sys.argv[1:]):
    if not folder.is_dir():
        continue
    model = lissom.load(folder / "artifact")
    expected = load_file(folder / "expected.safetensors")
    # What is mapped from a file may lie where kernels round differently.
    inputs = [expected[f"input {i}"].clone() for i in range(sum(name.startswith("input") for name in expected))]
    args, kwargs = model.program.signature.arguments(inputs)
    answer = model(*args, **kwargs)
    found = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
    wanted = [expected[f"output {i}"] for i in range(sum(name.startswith("output") for name in expected))]
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), folder.name
    assert model.program.text() == (folder / "text").read_text(), folder.name
    print(folder.name, type(answer).__module__, type(answer).__name__)
"""


def in_a_fresh_process(script: str, *arguments: object) -> str:
    """What the script prints; its errors fail the test."""
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
