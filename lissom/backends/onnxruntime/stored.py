"""Checks of an artifact's ONNX model, which is untrusted, before ONNX Runtime opens it and binds memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import torch

from lissom.backends.base import WEIGHTS_FILE
from lissom.backends.names import input_names, output_names, results_of, state_names
from lissom.backends.onnx.export import WEIGHTS
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.errors import ArtifactError
from lissom.frontends.onnx.file import external_place, is_external, parts_of, read_proto

_DOMAINS = ("", "ai.onnx", "com.microsoft")
"""The operator domains of models that Lissom writes."""
_TYPES = {"float32": "float", "float64": "double", "float8_e4m3fn": "float8e4m3fn", "float8_e5m2": "float8e5m2"}
"""The names of dtypes in ONNX Runtime, where they differ from PyTorch's."""


def check_stored(path: Path) -> None:
    """Refuse a model with operators of other domains, with functions, or with external data in other files than its weights.

    ONNX Runtime interprets some data locations as memory addresses.

    Raises:
        ArtifactError: if it has any of these, or cannot be read.
    """
    proto = read_proto(path)
    for tensor in parts_of(proto, onnx.TensorProto):
        if is_external(tensor) and external_place(tensor, path, path.absolute().parent)[0].name not in (WEIGHTS, WEIGHTS_FILE):
            raise ArtifactError(
                f"'{path}' keeps '{tensor.name}' in another file than {WEIGHTS} and {WEIGHTS_FILE}; compile the model again"
            )
    strange = next((node for node in parts_of(proto, onnx.NodeProto) if node.domain not in _DOMAINS), None)
    if strange is not None:
        name = f"{strange.domain}.{strange.op_type}"
        raise ArtifactError(f"'{path}' holds the operator {name}, which no artifact has; compile the model again")
    if proto.functions:
        name = proto.functions[0].name
        raise ArtifactError(f"'{path}' holds the function '{name}', and no artifact has any; compile the model again")


def check_interface(program: Program, path: Path, session: onnxruntime.InferenceSession) -> None:
    """Refuse a model whose inputs, outputs and states differ from the program's, which memory is bound by.

    Raises:
        ArtifactError: naming the first that differs.
    """
    past, present = state_names(program)
    states = [program.weight(name) for name in program.state]
    results = [nodes.tensor_type(result) for result in results_of(program)]
    wanted = [(leaf.type.dtype, leaf.type.shape) for leaf in program.signature.tensors]
    kept = [(state.dtype, None) for state in states]
    given = [(output.dtype, output.shape) for output in results]
    _check_values(path, "input", session.get_inputs(), [*input_names(program), *past], [*wanted, *kept])
    _check_values(path, "output", session.get_outputs(), [*output_names(program), *present], [*given, *kept])
    shapes = {argument.name: argument.shape for argument in (*session.get_inputs(), *session.get_outputs())}
    for before, after, state in zip(past, present, states, strict=True):
        fixed = all(isinstance(size, int) and size >= 0 for size in shapes[before])
        if not fixed or shapes[before] != shapes[after] or math.prod(shapes[before]) != state.numel():
            raise ArtifactError(
                f"'{path}' keeps '{before}' as {shapes[before]} and '{after}' as {shapes[after]}, and the program keeps "
                f"{list(state.shape)}; compile the model again"
            )


def _check_values(
    path: Path,
    kind: str,
    values: Sequence[onnxruntime.NodeArg],
    names: Sequence[str],
    wanted: Sequence[tuple[torch.dtype, Sequence[object] | None]],
) -> None:
    """Compare inputs or outputs with the names, dtypes and shapes of the program's; a shape of None is not compared."""
    if [value.name for value in values] != list(names):
        raise ArtifactError(
            f"'{path}' has the {kind}s {', '.join(value.name for value in values)}, and the program {', '.join(names)}; "
            f"compile the model again"
        )
    for value, (dtype, shape) in zip(values, wanted, strict=True):
        name = str(dtype).removeprefix("torch.")
        # ONNX Runtime may not know the rank of an output.
        same = shape is None or (kind == "output" and not value.shape) or _may_be_same(value.shape, shape)
        if value.type != f"tensor({_TYPES.get(name, name)})" or not same:
            raise ArtifactError(
                f"'{path}' has the {kind} '{value.name}' as {value.type} {value.shape}, and the program as {name}"
                f"{'' if shape is None else ' ' + str(list(shape))}; compile the model again"
            )


def _may_be_same(actual: Sequence[object], wanted: Sequence[object]) -> bool:
    """True for shapes of one rank whose fixed sizes are equal."""
    pairs = zip(actual, wanted, strict=False)
    fixed = [one == other for one, other in pairs if isinstance(one, int) and isinstance(other, int)]
    return len(actual) == len(wanted) and all(fixed)
