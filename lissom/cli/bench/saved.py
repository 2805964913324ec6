"""Timing of a saved artifact alone: other engines would need the original model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import sympy
import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch.utils import _pytree as pytree

from lissom.artifacts.signature import TrustedKeys
from lissom.cli.bench.worker import peak_bytes
from lissom.cli.bench.workload import Shape
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import evaluate
from lissom.compiler.ir.types import TensorType
from lissom.compiler.verify.divergence import compare
from lissom.errors import UnsupportedError
from lissom.inspect.tables import plain_table
from lissom.measure.timing import time_calls
from lissom.runtime.compiled_model import load

_LEGEND = (
    "ms of a call: median (middle half of the runs). error: relative, to the program run operator by operator. Inputs are ones "
    "where they are whole numbers, which every vocabulary has, and normal numbers elsewhere."
)


def saved_table(
    directory: Path,
    shapes: Sequence[Shape],
    seconds: float,
    *,
    allow_native: bool = False,
    trusted_keys: TrustedKeys | None = None,
) -> RenderableType:
    """Load an artifact and time it at each shape; without dynamic batch and sequence, at its smallest sizes.

    Raises:
        ArtifactError: as `lissom.load`.
        InputError: for a shape it does not take.
        UnsupportedError: for a ragged one.
    """
    started = time.perf_counter()
    compiled = load(directory, allow_native=allow_native, trusted_keys=trusted_keys)
    loaded_seconds = time.perf_counter() - started
    program = compiled.program
    table = plain_table(f"{directory}: {program.name} on {compiled.backend}, loaded in {loaded_seconds:.2f} s", "")
    for heading in ("sizes", "ms", "first ms", "error"):
        table.add_column(heading, justify="right")
    for sizes in dict.fromkeys(tuple(_sizes(program, shape).items()) for shape in shapes):
        inputs = make_inputs(program, dict(sizes))
        program.signature.check_sizes(inputs)
        args, kwargs = program.signature.arguments(inputs)
        call = partial(compiled, *args, **kwargs)
        started = time.perf_counter()
        answer = call()
        first_ms = (time.perf_counter() - started) * 1e3
        named = ", ".join(f"{program.signature.dimensions[symbol].name} {size}" for symbol, size in sizes) or "fixed"
        error = "state" if program.state else f"{_error(program, answer, inputs):.1e}"
        table.add_row(named, str(time_calls({"saved": call}, seconds)["saved"]), f"{first_ms:.1f}", error)
    peak = f"{torch.get_num_threads()} threads; this process held {peak_bytes() / 1e6:.0f} MB at most"
    return Group(table, Text(_LEGEND), Text(peak))


def _sizes(program: Program, shape: Shape) -> dict[sympy.Symbol, int]:
    """The size of each dimension: batch and sequence from the shape, others the smallest allowed from 2 on."""
    if shape.tokens is None:
        raise UnsupportedError(f"an artifact has no tokenizer to fill the shape {shape} with text; write rows x tokens, 8x128")
    wanted = {"batch": shape.batch, "sequence": shape.tokens}
    dimensions = program.signature.dimensions
    return {symbol: wanted.get(dimension.name, max(2, dimension.minimum)) for symbol, dimension in dimensions.items()}


def make_inputs(program: Program, sizes: Mapping[sympy.Symbol, int]) -> Sample:
    """Flat inputs for a program at these sizes."""
    return [_make(leaf.type, sizes) for leaf in program.signature.tensors]


def _make(tensor_type: TensorType, sizes: Mapping[sympy.Symbol, int]) -> torch.Tensor:
    shape = [evaluate(size, sizes) for size in tensor_type.shape]
    if not tensor_type.dtype.is_floating_point:
        return torch.ones(shape, dtype=tensor_type.dtype, device=tensor_type.device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(tensor_type.device, tensor_type.dtype)


def _error(program: Program, outputs: object, inputs: Sample) -> float:
    """The relative error of the outputs, against the program run operator by operator."""
    with torch.inference_mode():
        wanted = program.run(inputs)
    return compare([wanted], [pytree.tree_leaves(outputs)]).relative_error
