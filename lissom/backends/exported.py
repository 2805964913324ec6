"""Helpers of backends that export the program to another compiler: outputs, tracing example, refusals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import Dim

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import TensorArgument
from lissom.errors import ArtifactError, UnsupportedError
from lissom.io.fields import parse_json

Parsed = TypeVar("Parsed")


def leaves_of(program: Program) -> list[object]:
    """The flat outputs of the program: nodes and constants."""
    (leaves,) = program.output.args
    assert isinstance(leaves, (list, tuple))
    return list(leaves)


def with_constants(leaves: Sequence[object], tensors: Iterable[torch.Tensor]) -> list[object]:
    """The flat outputs of a program.

    Args:
        leaves: of `leaves_of`.
        tensors: the values of its nodes, in order.
    """
    values = iter(tensors)
    return [next(values) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]


def device_of(program: Program) -> torch.device:
    """The device of the program's inputs; the CPU when it has none."""
    tensors = program.signature.tensors
    return tensors[0].type.device if tensors else torch.device("cpu")


def check_plain(backend: str, program: Program) -> None:
    """Refuse a program that keeps state or returns sizes. Raises UnsupportedError."""
    if program.state:
        raise UnsupportedError(
            f"backend '{backend}' keeps no state, and {program.name} writes to '{program.state[0]}'; choose backend 'eager'"
        )
    check_tensors(backend, program)


def check_tensors(backend: str, program: Program) -> None:
    """Refuse a program that returns sizes. Raises UnsupportedError."""
    for leaf in leaves_of(program):
        if isinstance(leaf, fx.Node) and not nodes.is_tensor(leaf):
            raise UnsupportedError(
                f"backend '{backend}' returns tensors, and {program.name} returns the size '{leaf.name}'; "
                f"choose backend 'eager'"
            )


def check_steps(backend: str, program: Program, unrolled: Collection[object]) -> None:
    """Refuse recurrent layers that the backend unrolls where the number of steps varies.

    Args:
        unrolled: the operators of these layers.

    Raises:
        UnsupportedError: when there is one.
    """
    for node in program.nodes(*unrolled):
        steps = nodes.tensor_type(nodes.operand(node)).shape[1 if nodes.argument(node, "batch_first") else 0]
        if not isinstance(steps, int):
            raise UnsupportedError(
                f"backend '{backend}' computes {place(program, node)} step by step, and the number of steps, "
                f"{program.signature.name_of(steps)}, varies; compile with dynamic=False, or choose backend 'eager'"
            )


def traced_example(program: Program, example: Sample) -> tuple[torch.Tensor, ...]:
    """The example for tracing: contiguous, with free sizes of 1 doubled, since tracing specializes a size of 1."""
    signature = program.signature
    sizes = {symbol: max(2, size) for symbol, size in signature.sizes_of(example).items()}
    return tuple(tensor.contiguous() for tensor in signature.resize(example, sizes))


def free_dimensions(leaf: TensorArgument) -> dict[int, object]:
    """The free dimensions of one input; the exporter finds anew which of them are equal."""
    return {index: Dim.AUTO for index, size in enumerate(leaf.type.shape) if not isinstance(size, int)}


def root_of(error: BaseException) -> BaseException:
    """The error at the end of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def kind_and_reason(error: BaseException) -> str:
    """The class of an error, and the first non-empty line of its message."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"


def read_json(path: Path, what: str, read: Callable[[Any], Parsed]) -> Parsed:
    """The result of `read` on a JSON file of a backend.

    Args:
        what: the content of the file, for the error.

    Raises:
        ArtifactError: when the file or one of its fields cannot be read.
    """
    try:
        return read(parse_json(path.read_bytes(), path))
    except (ArtifactError, OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"'{path}' does not say {what} ({kind_and_reason(error)}); compile the model again") from error
