"""Costs: types, bytes and operations of a call, beside real tensors and `torch.utils.flop_counter`."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lissom.compiler.analysis.cost import moves_nothing, node_cost
from lissom.compiler.analysis.flops import is_counted
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import LOOKUPS
from tests.support.flop_counter import counted
from tools.suites.opinfo.calls import Call, OneCall, program_of, run


def check_cost(call: Call) -> str:
    """The fault of the cost of a call; empty if it is right."""
    one = program_of(call)
    assert one is not None
    values = run(one)
    for index, (value, result) in enumerate(zip(values, one.results, strict=True)):
        typed = nodes.tensor_type(result)
        if (typed.shape, typed.dtype) != (tuple(value.shape), value.dtype):
            return f"{call}: result {index} is typed {typed.dtype}{list(typed.shape)}, and is {value.dtype}{list(value.shape)}"
    cost = node_cost(one.call, fake.hint)
    shares = values[0].numel() > 0 and any(_same_memory(values[0], tensor) for tensor in call.tensors)
    if moves_nothing(one.call):
        if values[0].numel() and not _same_memory(values[0], call.tensors[0]):
            return f"{call} is counted as a view, and copies"
        return ""
    if shares and len(values) == 1 and cost.bytes:
        return f"{call} is counted as {cost.bytes} bytes moved, and is a view"
    if cost.written_bytes != (written := _bytes(values)):
        return f"{call} is counted as {cost.written_bytes} bytes written, of {written}"
    if not _reads_some(one) and cost.read_bytes != (read := _bytes(call.tensors)):
        return f"{call} is counted as {cost.read_bytes} bytes read, of {read}"
    return ""


def flops_of(call: Call) -> int:
    """The operations of a call by PyTorch's counter."""
    one = program_of(call)
    assert one is not None
    return counted(one.call, {node: one.program.weight(str(node.target)) for node in one.weights})[0]


def check_flops(call: Call) -> str:
    """The difference of the operations of a call from PyTorch's count, in words; empty if there is none."""
    one = program_of(call)
    assert one is not None
    wanted, counted = flops_of(call), node_cost(one.call, fake.hint).flops
    return f"{call} is counted as {counted} operations, and PyTorch counts {wanted}" if counted != wanted else ""


def has_formula(one: OneCall) -> bool:
    """True when the operator has a formula for its operations."""
    return is_counted(one.call)


def _reads_some(one: OneCall) -> bool:
    """True for operators that read only some elements of an argument, or only its sizes."""
    name = getattr(one.call.target, "__name__", "")
    return one.call.target in LOOKUPS or name.partition(".")[0].endswith("_like") or name.startswith("new_")


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors; an expanded dimension is stored once."""
    total = 0
    for tensor in tensors:
        count = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= size if stride else 1
        total += count * tensor.element_size()
    return total


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
