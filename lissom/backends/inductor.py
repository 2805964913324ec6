"""TorchInductor, ahead of time: the program compiled into one library, with frozen weights in the layout of its kernels.

The program is exported with the free dimensions of its signature, and AOTInductor compiles it into a `.pt2` package. A call
runs no Python between operators. Calls from several threads are serialized.
"""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import ClassVar

import torch
from torch import fx, nn

from lissom.backends.base import Backend, Executable, confirm
from lissom.backends.exported import (
    check_plain,
    check_steps,
    device_of,
    free_dimensions,
    kind_and_reason,
    leaves_of,
    read_json,
    traced_example,
    with_constants,
)
from lissom.backends.names import input_names, output_names
from lissom.compiler.ir.operators import RECURRENT_LAYERS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.errors import ArtifactError, UnsupportedError
from lissom.measure.machine import instruction_sets
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.lowering.lower_quantized_products.lower_quantized_products import LowerQuantizedProducts
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

PACKAGE, MADE_WITH = "model.pt2", "inductor.json"
"""This backend's files in an artifact."""


class Inductor(Backend):
    """Compiles the program with AOTInductor; needs a C++ compiler."""

    name: ClassVar[str] = "inductor"
    maps_files: ClassVar[bool] = True

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        return (FoldConstants(shared=True), FoldQuantizedWeights(), LowerQuantizedProducts(cpu=device.type == "cpu"))

    def missing(self) -> str | None:
        # Here, because it takes a second or two to import.
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            return (
                "backend 'inductor' needs a C++ compiler, and there is none where $CXX says, or g++; "
                "install g++ (Debian: apt-get install g++), or choose backend 'eager'"
            )
        return None

    def build(self, program: Program, example: Sample) -> Executable:
        """Compile the program into a `Package`.

        Raises:
            UnsupportedError: when the program keeps state, returns sizes, or cannot be compiled by TorchInductor.
            VerifyError: when the package gives other outputs than the program.
        """
        check_plain(self.name, program)
        check_steps(self.name, program, RECURRENT_LAYERS)
        folder = Path(mkdtemp(prefix="lissom-"))
        try:
            # Warnings about the compiler's internals; failures raise.
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                package = Package(program, _compile(program, example, folder))
        except BaseException as error:
            shutil.rmtree(folder)
            if not isinstance(error, Exception):
                raise
            raise UnsupportedError(
                f"TorchInductor cannot compile {program.name}: {kind_and_reason(error)}; choose backend 'eager'"
            ) from error
        confirm(self.name, package, program, example)
        return package

    def save_files(self, executable: Executable, folder: Path) -> None:
        """The package, and the versions it was compiled with."""
        assert isinstance(executable, Package)
        shutil.copyfile(executable.path, folder / PACKAGE)
        made_with = {"torch": torch.__version__, "instruction_sets": instruction_sets()}
        (folder / MADE_WITH).write_text(json.dumps(made_with), encoding="utf-8")

    def native_code(self, *, saved_options: bool) -> str | None:
        return f"the library in {PACKAGE}, which TorchInductor compiled"

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """Load the package; it needs the PyTorch version it was compiled with, and a processor with the same instructions."""
        version, needed = read_json(
            folder / MADE_WITH,
            "what the model was compiled with",
            lambda data: (str(data["torch"]), [str(name) for name in data["instruction_sets"]]),
        )
        if version != torch.__version__:
            raise ArtifactError(
                f"'{folder}' was compiled by PyTorch {version}, and this is {torch.__version__}; "
                f"install that version, or compile the model again"
            )
        lacking = [name for name in needed if name not in instruction_sets()]
        if lacking:
            raise ArtifactError(
                f"'{folder}' was compiled for a processor with {', '.join(lacking)}, which this one lacks; "
                f"compile the model again"
            )
        try:
            return Package(program, folder / PACKAGE, keep=True)
        # The loader raises RuntimeError only.
        except RuntimeError as error:
            raise ArtifactError(
                f"'{folder / PACKAGE}' cannot be opened: {kind_and_reason(error)}; compile the model again"
            ) from error


class Package:
    """A program compiled by TorchInductor.

    Attributes:
        path: the `.pt2` package, which holds code and weights; its folder is deleted with this object, unless `keep`.
    """

    def __init__(self, program: Program, path: Path, keep: bool = False) -> None:
        device = device_of(program)
        index = -1 if device.type == "cpu" else device.index
        self.path = path
        self._leaves = leaves_of(program)
        # The loader itself: its wrapper parses the pytree of inputs and outputs at every call.
        self._loader = torch._inductor.aoti_load_package(str(path), device_index=index).loader
        if not keep:
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        # The compiled code assumes the strides of the example.
        with torch.inference_mode():
            results = self._loader.boxed_run([tensor.contiguous() for tensor in inputs])
        return with_constants(self._leaves, results)


class _Module(nn.Module):
    """The program as a module that takes its flat inputs and returns the tensors among its outputs."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.weights = program.graph_module
        self.program = program

    def forward(self, *inputs: torch.Tensor) -> list[object]:
        outputs = self.program.run(inputs)
        return [value for leaf, value in zip(leaves_of(self.program), outputs, strict=True) if isinstance(leaf, fx.Node)]


def _compile(program: Program, example: Sample, folder: Path) -> Path:
    """Export the program and compile it; the package's path."""
    from torch._inductor.package.package import package_aoti

    traced = traced_example(program, example)
    shapes = {"inputs": tuple(free_dimensions(leaf) for leaf in program.signature.tensors)}
    exported = torch.export.export(_Module(program).eval(), traced, dynamic_shapes=shapes, strict=False)
    options: dict[str, object] = {
        # Packs weights at compile time into the layout of the kernels.
        "freezing": True,
        "aot_inductor.package": True,
        # Not in TorchInductor's cache, which would keep a copy of the weights forever.
        "aot_inductor.output_path": str(folder / "files"),
        "aot_inductor.metadata": {"inputs": " ".join(input_names(program)), "outputs": " ".join(output_names(program))},
    }
    files = torch._inductor.aot_compile(exported.module(), traced, options=options)
    path = folder / "model.pt2"
    assert isinstance(files, list)
    package_aoti(str(path), files)
    shutil.rmtree(folder / "files")
    return path
