"""An optimized model without a KV cache as OpenVINO's IR, in a folder with the names that Optimum Intel gives its files."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lissom.artifacts.directory import check_new, write_directory
from lissom.artifacts.facts import Facts
from lissom.artifacts.model_files import Saveable, write_model_files
from lissom.backends.openvino.backend import OpenVino
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError

IR = "openvino_model.xml"
"""The IR; its weights are in `openvino_model.bin`."""


@dataclass(frozen=True)
class OpenVinoFolder:
    """The written folder.

    Attributes:
        megabytes: of the IR.
        relative_error: of the outputs, as OpenVINO computes them from the files, to the program's.
        notes: sentences on quantized layers, and on options to open the IR with.
    """

    megabytes: float
    relative_error: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        version = importlib.import_module("openvino").__version__
        return (
            f"{self.megabytes:.1f} MB; opened by OpenVINO {version.partition('-')[0]}, "
            f"outputs within {self.relative_error:.1e} relative; {'; '.join(self.notes)}"
        )


def write_openvino(
    program: Program,
    example: Sample,
    directory: Path,
    facts: Facts | None,
    tokenizer: Saveable | None = None,
    processor: Saveable | None = None,
) -> OpenVinoFolder:
    """Write the folder, completely or not at all, after OpenVINO opened it.

    Args:
        program: not lowered.
        example: flat inputs, for tracing and for the comparison.
        facts: of the model, where it is one of transformers.

    Raises:
        UnsupportedError: if OpenVINO is not installed, or the program keeps state or holds what ONNX or OpenVINO cannot say.
        VerifyError: if OpenVINO gives other outputs.
        ArtifactError: if the directory holds something, or cannot be written.
    """
    check_new(directory)
    check_installed()
    backend = OpenVino()
    if program.state:
        raise UnsupportedError(
            f"the folder has no place for state, and {program.name} keeps '{program.state[0]}'; compile it with "
            f"backend='openvino' and call save()"
        )
    lowered, _ = Pipeline(backend.lowering(torch.device("cpu")), [example]).run(program)
    written: list[OpenVinoFolder] = []

    def write(folder: Path) -> None:
        network, error = backend.write(lowered, example, folder / IR)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        hint: Any = network.compiled.get_property("INFERENCE_PRECISION_HINT")
        written.append(OpenVinoFolder(size, error, (*network.notes, precision_note(hint.get_type_name()))))
        if facts is not None:
            write_model_files(folder, facts, tokenizer, processor)

    write_directory(directory, write)
    return written[0]


def check_installed() -> None:
    """Raise UnsupportedError if a package is missing."""
    missing = OpenVino().missing()
    if missing is not None:
        raise UnsupportedError(missing.replace("backend 'openvino'", "OpenVINO's IR").partition(", or choose")[0])


def precision_note(precision: str) -> str:
    """A sentence on the precision that outputs were compared with."""
    return (
        f"compared with INFERENCE_PRECISION_HINT={precision}: by default OpenVINO computes in bfloat16 on processors that have "
        f"it, and other programs have to set it"
    )
