"""Propagation of sizes that an ONNX graph computes with tensors.

An ONNX graph computes its shapes with small tensors: Shape, Gather, Concat, Reshape. During tracing a tensor has no values, so
every such shape would be unknown. Here a tensor made from sizes or constants remembers its elements, plain or symbolic numbers;
so do tensors computed from such tensors; and reading one returns the numbers.
"""

# The rules take arrays of numbers.
# pyright: reportUnknownLambdaType=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Result = TypeVar("Result")

MOST = 64
"""The most elements of a tensor that is treated as sizes or constants rather than data."""

_NUMBERS = "lissom_numbers"


def remember(tensor: torch.Tensor, numbers: Iterable[object]) -> torch.Tensor:
    """The tensor, with its elements remembered: plain or symbolic numbers, in order."""
    elements = np.empty(tensor.numel(), dtype=object)
    elements[:] = list(numbers)
    setattr(tensor, _NUMBERS, elements.reshape(tuple(tensor.shape)))
    return tensor


def numbers_of(tensor: torch.Tensor) -> np.ndarray | None:
    """The remembered elements, as an object array of the tensor's shape; None for data."""
    return getattr(tensor, _NUMBERS, None)


def with_numbers(function: Callable[..., Result], name: str) -> Callable[..., Result]:
    """The function under a name of its own, with known elements propagated through every torch call in it."""

    def wrapped(*args: object, **kwargs: object) -> Result:
        with _PassOn():
            return function(*args, **kwargs)

    wrapped.__name__ = wrapped.__qualname__ = name
    return wrapped


class _PassOn(TorchFunctionMode):
    """Propagates known elements from the arguments of a call to its result, and returns them for reads of known tensors."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given: dict[str, object] = dict(kwargs or {})
        known = numbers_of(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        if known is not None and func in _READS:
            return _READS[func](known)
        if func in _TAKE_NUMBERS:
            args = _with_literal(func, args)
        result = func(*args, **given)
        if func in _RULES:
            _pass_on(_RULES[func], args, given, result)
        return result


def _pass_on(rule: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], result: object) -> None:
    """Compute the elements of the result, one tensor or several, if those of all arguments are known."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    plain = [numbers_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if any(new is None and old is not None for new, old in zip(plain, leaves, strict=True)):
        return
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if any(any(type(size) is not int for size in tensor.shape) or tensor.numel() > MOST for tensor in tensors):
        return
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, spec)
    elements = rule(*plain_args, **plain_kwargs)
    for tensor, value in zip(tensors, elements if isinstance(elements, list) else [elements], strict=True):
        flat = value.reshape(-1).tolist() if isinstance(value, np.ndarray) else [value]
        if len(flat) == tensor.numel():
            remember(tensor, flat)


def _with_literal(func: Callable[..., object], args: Sequence[object]) -> Sequence[object]:
    """The operands, with a constant of one element written as a number, as in a model's own code.

    Only if that changes neither the dtype nor the shape of the result: the other operand is data of the same dtype and of at
    least the same rank.
    """
    tensors = [operand for operand in args if isinstance(operand, torch.Tensor)]
    if len(tensors) < len(args):
        return args
    *condition, left, right = tensors
    if condition:
        literal = _literal(left, beside=right)
        return args if literal is None else (*condition, literal, right)
    if func in (torch.add, torch.mul) and _literal(left, beside=right) is not None:
        left, right = right, left
    literal = _literal(right, beside=left)
    return args if literal is None else (left, literal)


def _literal(tensor: torch.Tensor, beside: torch.Tensor) -> int | float | None:
    known = numbers_of(tensor)
    if known is None or known.size != 1 or numbers_of(beside) is not None:
        return None
    number = known.item()
    fits = tensor.dtype == beside.dtype and tensor.dim() <= beside.dim()
    return number if fits and type(number) in (int, float) else None


def _each(function: Callable[..., object], inputs: int) -> Callable[..., object]:
    """The function applied to every element, broadcast like the tensors."""
    return np.frompyfunc(function, inputs, 1)


def _quotient(left: object, right: object, rounding_mode: str | None = None) -> object:
    """The quotient; with any rounding mode it is rounded down, which is the same for sizes, because they are not negative."""
    return _each(operator.truediv if rounding_mode is None else operator.floordiv, 2)(left, right)


def _cast(array: np.ndarray, dtype: object = None, *rest: object, **options: object) -> object:
    """The elements converted to the dtype."""
    if not isinstance(dtype, torch.dtype):
        return array
    if dtype is torch.bool:
        return _each(bool, 1)(array)
    return _each(torch.sym_float if dtype.is_floating_point else _to_integer, 1)(array)


def _to_integer(value: Any) -> object:
    if isinstance(value, torch.SymFloat):
        return math.trunc(value)
    return int(value) if isinstance(value, (bool, float)) else value


def _tensor(data: object, **options: object) -> np.ndarray:
    """The elements of nested lists of numbers."""
    leaves = pytree.tree_leaves(list(data) if isinstance(data, torch.Size) else data)
    elements = np.empty(len(leaves), dtype=object)
    elements[:] = leaves
    return elements


def _item(array: np.ndarray, index: Any) -> object:
    parts = index if isinstance(index, tuple) else (index,)
    return array[tuple(part.astype(int) if isinstance(part, np.ndarray) else part for part in parts)]


_READS: Mapping[Callable[..., object], Callable[[np.ndarray], object]] = {
    torch.Tensor.tolist: lambda known: known.tolist(),
    torch.Tensor.item: lambda known: known.item(),
    torch.Tensor.__int__: lambda known: int(known.item()),
    torch.Tensor.__index__: lambda known: operator.index(known.item()),
    torch.Tensor.__bool__: lambda known: bool(known.item()),
    torch.Tensor.__float__: lambda known: float(known.item()),
}

_COMPARISONS: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.eq: operator.eq,
    torch.ne: operator.ne,
    torch.lt: operator.lt,
    torch.le: operator.le,
    torch.gt: operator.gt,
    torch.ge: operator.ge,
}

_TAKE_NUMBERS = {torch.where, torch.add, torch.sub, torch.mul, torch.div, torch.pow, *_COMPARISONS}

_OF_TWO: Mapping[Callable[..., object], Callable[..., object]] = {
    **_COMPARISONS,
    torch.add: operator.add,
    torch.sub: operator.sub,
    torch.mul: operator.mul,
    torch.remainder: operator.mod,
    torch.minimum: torch.sym_min,
    torch.maximum: torch.sym_max,
    torch.logical_and: lambda left, right: bool(left) and bool(right),
    torch.logical_or: lambda left, right: bool(left) or bool(right),
}

_OF_ONE: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.neg: operator.neg,
    torch.floor: math.floor,
    torch.ceil: math.ceil,
    torch.logical_not: operator.not_,
}

_CHANGE_SHAPE = (
    *(torch.squeeze, torch.Tensor.squeeze, torch.unsqueeze, torch.Tensor.unsqueeze, torch.flatten, torch.Tensor.flatten),
    *(torch.reshape, torch.Tensor.reshape, torch.Tensor.view),
)

_RULES: Mapping[Callable[..., object], Callable[..., object]] = {
    **{function: _each(rule, 1) for function, rule in _OF_ONE.items()},
    **{function: _each(rule, 2) for function, rule in _OF_TWO.items()},
    # The elements in order; `_pass_on` gives them the result's shape.
    **dict.fromkeys(_CHANGE_SHAPE, lambda array, *rest, **options: array),
    torch.where: _each(lambda condition, left, right: left if condition else right, 3),
    torch.div: _quotient,
    torch.tensor: _tensor,
    torch.full: lambda size, fill_value, **options: np.full([int(number) for number in size], fill_value, dtype=object),
    torch.cat: lambda arrays, dim=0: np.concatenate(arrays, dim),
    torch.stack: lambda arrays, dim=0: np.stack(arrays, dim),
    torch.prod: lambda array, dim=None, **options: np.multiply.reduce(array, axis=dim),
    torch.Tensor.__getitem__: _item,
    torch.Tensor.select: lambda array, dim, index: np.take(array, index, axis=dim),
    torch.Tensor.unbind: lambda array, dim=0: [np.take(array, index, axis=dim) for index in range(array.shape[dim])],
    torch.Tensor.to: _cast,
    torch.Tensor.long: lambda array: _cast(array, torch.int64),
}
