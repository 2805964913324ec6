"""A program as a package of AOTInductor, a `.pt2` file: PyTorch loads it in Python and in C++, where there is no Lissom."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import fx

from lissom.backends.exported import device_of, leaves_of, with_constants
from lissom.backends.inductor import Inductor, Package
from lissom.backends.names import input_names, output_names, results_of
from lissom.backends.simulated_layers import count_kernels, explain, refuse
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.types import format_type
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.equality import require_built
from lissom.errors import UnsupportedError
from lissom.export.fresh_process import run_fresh
from lissom.io.files import check_writable, copy_bytes, writing_whole
from lissom.ops.quantization import dequantize

_CALL = """
import sys
import torch
from safetensors.torch import load_file, save_file

package, given, found = sys.argv[1:]
inputs = load_file(given)
outputs = torch._inductor.aoti_load_package(package)(*(inputs[str(index)] for index in range(len(inputs))))
copies = [tensor.cpu().clone(memory_format=torch.contiguous_format) for tensor in outputs]
save_file({str(index): tensor for index, tensor in enumerate(copies)}, found)
if "lissom" in sys.modules:
    raise SystemExit("the package needs Lissom")
"""
"""What the fresh process runs."""


@dataclass(frozen=True)
class Pt2Package:
    """A package that was written.

    Attributes:
        inputs: names, dtypes and shapes of its inputs, in order.
        outputs: the same of its outputs.
        megabytes: the size of the file.
        relative_error: the largest of its outputs in a fresh process, to the program's.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]
    megabytes: float
    relative_error: float

    def __str__(self) -> str:
        return (
            f"({', '.join(self.inputs)}) -> ({', '.join(self.outputs)}), {self.megabytes:.1f} MB; loaded by PyTorch "
            f"{torch.__version__} in a fresh process, its outputs differ by {self.relative_error:.1e} (relative)"
        )


def write_pt2(program: Program, example: Sample, path: Path) -> Pt2Package:
    """Compile the program and write the file, completely or not at all, after a fresh process has called it.

    Args:
        program: not lowered.
        example: flat inputs, for tracing and the comparison.

    Raises:
        UnsupportedError: if there is no C++ compiler, or TorchInductor cannot compile the program.
        VerifyError: if the package gives other outputs than the program.
        ArtifactError: if the file cannot be written.
    """
    check_writable(path)
    backend = Inductor()
    if (missing := backend.missing()) is not None:
        raise UnsupportedError(missing)
    lowered, history = Pipeline(backend.lowering(device_of(program)), [example]).run(program)
    simulated = explain(backend.simulated(lowered), history.steps)
    refuse(backend.name, simulated, len(simulated) + count_kernels(lowered))
    _refuse_own_operators(lowered)
    package = backend.build(lowered, example)
    assert isinstance(package, Package)
    error = _error_elsewhere(package.path, lowered, example)
    with writing_whole(path) as file, package.path.open("rb") as made:
        size = package.path.stat().st_size
        copy_bytes(made, file, size)
    inputs, outputs = _signature(lowered)
    return Pt2Package(inputs, outputs, size / 1e6, error)


def _refuse_own_operators(program: Program) -> None:
    """Refuse operators that a process without Lissom lacks. Raises UnsupportedError."""
    own = next((node for node in program.nodes() if str(node.target).startswith("lissom.")), None)
    if own is not None:
        table = "; leave out embeddings=true" if own.target is dequantize else ""
        raise UnsupportedError(
            f"'{own.name}' of {program.name} calls {own.target}, an operator of Lissom, and a package runs without it{table}"
        )


def _signature(program: Program) -> tuple[list[str], list[str]]:
    """Inputs and outputs in words."""
    results = results_of(program)
    names = dict(zip(results, output_names(program), strict=True))
    sizes = program.signature.name_of
    given = zip(input_names(program), program.signature.tensors, strict=True)
    outputs = [leaf for leaf in leaves_of(program) if isinstance(leaf, fx.Node)]
    return (
        [f"{name}: {format_type(leaf.type, sizes)}" for name, leaf in given],
        [f"{names[leaf]}: {format_type(nodes.tensor_type(leaf), sizes)}" for leaf in outputs],
    )


def _error_elsewhere(package: Path, program: Program, example: Sample) -> float:
    """The largest relative error of the outputs of a process that loads the package without Lissom.

    Raises:
        UnsupportedError: if it does not load or run there.
        VerifyError: if the outputs differ.
    """
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as folder:
        given, found = Path(folder) / "inputs.safetensors", Path(folder) / "outputs.safetensors"
        copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in example]  # they may share memory
        save_file({str(index): tensor for index, tensor in enumerate(copies)}, given)
        command = [sys.executable, "-P", "-c", _CALL, str(package), str(given), str(found)]
        run_fresh("PyTorch", f"the package of {program.name}", command, folder=Path(folder))
        outputs = load_file(found)

    def call(_: Sample) -> list[object]:
        results = (outputs[str(index)].to(device_of(program), copy=True) for index in range(len(outputs)))
        return with_constants(leaves_of(program), results)

    return require_built("the package, loaded by PyTorch in a fresh process,", call, program, [example])
