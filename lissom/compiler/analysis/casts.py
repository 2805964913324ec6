"""Casts in a program: which calls only cast, and which casts are lossless."""

from __future__ import annotations

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import is_handed_out, memory_of, views_of
from lissom.compiler.ir.operators import MEMORY_VIEWS, READ_LAYOUT
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.view_calls import Cast

aten = torch.ops.aten

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HOLDS = {
    torch.float16: {torch.float32, torch.float64},
    torch.bfloat16: {torch.float32, torch.float64},
    torch.float32: {torch.float64},
    torch.bool: {*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64},
    # bfloat16 has 8 significant bits, float16 11, float32 24.
    torch.uint8: {*_FLOATS, torch.int16, torch.int32, torch.int64},
    torch.int8: {*_FLOATS, torch.int16, torch.int32, torch.int64},
    torch.int16: {torch.float32, torch.float64, torch.int32, torch.int64},
    torch.int32: {torch.float64, torch.int64},
}
"""For each dtype, the dtypes that can represent all its values."""
_READ_LAYOUT = (*READ_LAYOUT, *MEMORY_VIEWS)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True when `wide` can represent every value of `narrow`, so that a cast there and back is lossless."""
    return wide in _HOLDS.get(narrow, ())


def cast_from(node: object) -> fx.Node | None:
    """The tensor that a call casts to another dtype; None when it does more, such as move to a device, or is no cast."""
    cast = Cast.of(node)
    if cast is None:
        return None
    plain = set(cast.node.kwargs) <= {"dtype"} and not any(cast.node.args[2:])
    source, target = nodes.tensor_type(cast.x), nodes.tensor_type(node)
    return cast.x if plain and source.device == target.device and source.dtype != target.dtype else None


def dtype_of(node: object) -> torch.dtype:
    """The dtype of a node's tensor."""
    return nodes.tensor_type(node).dtype


def rests_on_copy(program: Program, cast: fx.Node, source: fx.Node) -> str | None:
    """The reason a cast cannot be replaced by its source, or a view of it, with the same values; None if it can."""
    memory = memory_of(source)
    if nodes.is_state_write(memory) or (memory.op == "get_attr" and str(memory.target) in program.state):
        return "it keeps the value of the state before a write"
    if memory.op in ("placeholder", "get_attr") and is_handed_out(program, cast):
        return "the caller would be given an input or a weight itself"
    if any(user.target in _READ_LAYOUT for view in views_of(cast) for user in view.users):
        return "an operator reads its memory layout"
    return None
