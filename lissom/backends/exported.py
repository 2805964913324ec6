"""What backends share that hand the whole program to another compiler: its results, its example, what they all refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx
from torch.export import Dim

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, resize
from lissom.compiler.ir.signature import TensorArgument
from lissom.errors import UnsupportedError


def leaves_of(program: Program) -> list[object]:
    """What the program returns, leaf by leaf: nodes, and values that are always the same."""
    return list(cast(Sequence[object], program.output.args[0]))


def device_of(program: Program) -> torch.device:
    """Where the program's inputs are; the CPU when it has none."""
    tensors = program.signature.tensors
    return tensors[0].type.device if tensors else torch.device("cpu")


def check_plain(backend: str, program: Program) -> None:
    """Refuse a program that keeps state or returns sizes. Raises: UnsupportedError."""
    if program.state:
        raise UnsupportedError(
            f"backend '{backend}' keeps no state, and {program.name} writes to '{program.state[0]}'; choose backend 'eager'"
        )
    check_tensors(backend, program)


def check_tensors(backend: str, program: Program) -> None:
    """Refuse a program that returns sizes. Raises: UnsupportedError."""
    for leaf in leaves_of(program):
        if isinstance(leaf, fx.Node) and not nodes.is_tensor(leaf):
            raise UnsupportedError(
                f"backend '{backend}' returns tensors, and {program.name} returns the size '{leaf.name}'; "
                f"choose backend 'eager'"
            )


def traced_example(program: Program, example: Sample) -> tuple[torch.Tensor, ...]:
    """The example to trace with: contiguous, and of 2 where a size that varies is 1, since 1 cannot be traced as such."""
    signature = program.signature
    sizes = {symbol: max(2, size) for symbol, size in signature.sizes_of(example).items()}
    return tuple(tensor.contiguous() for tensor in resize(signature, example, sizes))


def free_dimensions(leaf: TensorArgument) -> dict[int, object]:
    """The dimensions of one input that vary; which of them are equal is found anew."""
    return {index: Dim.AUTO for index, size in enumerate(leaf.type.shape) if not isinstance(size, int)}


def kind_and_reason(error: BaseException) -> str:
    """An error's class, and the first line it says something in."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"
