"""Sizes that are computed with tensors, kept as numbers.

An ONNX graph works out its shapes with small tensors: Shape, Gather, Concat, Reshape. While a graph is traced, a tensor has no
values, so every such shape would be unknown. Here a tensor made from sizes or constants remembers its elements, plain or
symbolic numbers; what is computed from such tensors remembers its own; and reading one gives the numbers back.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Result = TypeVar("Result")

MOST = 64
"""Elements a tensor may have and still be taken for sizes or constants rather than data."""

_NUMBERS = "lissom_numbers"


def remember(tensor: torch.Tensor, numbers: Iterable[object]) -> torch.Tensor:
    """The tensor, which now knows its elements; they are given in order."""
    found = np.empty(tensor.numel(), dtype=object)
    found[:] = list(numbers)
    setattr(tensor, _NUMBERS, found.reshape(tuple(tensor.shape)))
    return tensor


def numbers_of(tensor: torch.Tensor) -> np.ndarray | None:
    """The elements the tensor knows, as an array of objects in its shape; None for data."""
    return getattr(tensor, _NUMBERS, None)


def with_numbers(function: Callable[..., Result], name: str) -> Callable[..., Result]:
    """The function under a name of its own, with known elements passed on by every torch call in it."""

    def wrapped(*args: object, **kwargs: object) -> Result:
        with _PassOn():
            return function(*args, **kwargs)

    wrapped.__name__ = wrapped.__qualname__ = name
    return wrapped


class _PassOn(TorchFunctionMode):
    """Passes elements on from the arguments of a call to its result, and answers reads of known tensors with them."""

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
        if func in _RULES and isinstance(result, torch.Tensor) and result.numel() <= MOST:
            _pass_on(_RULES[func], args, given, result)
        return result


def _pass_on(rule: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object], result: torch.Tensor) -> None:
    """Compute the elements of the result from those of the arguments, if all are known."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    plain = [numbers_of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    if any(new is None and old is not None for new, old in zip(plain, leaves, strict=True)):
        return
    plain_args, plain_kwargs = pytree.tree_unflatten(plain, spec)
    found = rule(*plain_args, **plain_kwargs)
    flat = found.reshape(-1).tolist() if isinstance(found, np.ndarray) else [found]
    if len(flat) == result.numel():
        remember(result, flat)


def _with_literal(func: Callable[..., object], args: Sequence[object]) -> Sequence[object]:
    """The operands, with a constant of one element written as a number, so that it reads as it would in a model's code.

    Only where that changes neither the dtype nor the shape of the result: beside data of its own dtype and of as high a rank.
    """
    if len(args) != 2 or not all(isinstance(item, torch.Tensor) for item in args):
        return args
    left, right = cast(Sequence[torch.Tensor], args)
    if func in (torch.add, torch.mul) and _literal(left, beside=right) is not None:
        left, right = right, left
    literal = _literal(right, beside=left)
    return args if literal is None else (left, literal)


def _literal(tensor: torch.Tensor, beside: torch.Tensor) -> int | float | None:
    known = numbers_of(tensor)
    if known is None or known.size != 1 or numbers_of(beside) is not None:
        return None
    found = known.item()
    fits = tensor.dtype == beside.dtype and tensor.dim() <= beside.dim()
    return found if fits and type(found) in (int, float) else None


def _each(function: Callable[..., object], inputs: int) -> Callable[..., object]:
    """The function applied to every element, broadcast like the tensors."""
    return np.frompyfunc(function, inputs, 1)


def _truncated_quotient(left: Any, right: Any, rounding_mode: str | None = None) -> object:  # noqa: ANN401
    """Division; sizes are not negative, so that rounding down is rounding to zero."""
    return _each(operator.truediv if rounding_mode is None else operator.floordiv, 2)(left, right)


def _cast(array: np.ndarray, dtype: object = None, *rest: object, **options: object) -> np.ndarray:
    """The elements as the dtype has them."""
    if not isinstance(dtype, torch.dtype):
        return array
    if dtype is torch.bool:
        return np.frompyfunc(bool, 1, 1)(array)
    return np.frompyfunc(_to_float if dtype.is_floating_point else _to_integer, 1, 1)(array)


def _to_float(value: Any) -> object:  # noqa: ANN401
    return torch.sym_float(value)


def _to_integer(value: Any) -> object:  # noqa: ANN401
    return int(value) if isinstance(value, (bool, float)) else math.trunc(value) if isinstance(value, torch.SymFloat) else value


def _tensor(data: object, **options: object) -> np.ndarray:
    """The elements of nested lists of numbers."""
    leaves, _ = pytree.tree_flatten(list(data) if isinstance(data, torch.Size) else data)
    found = np.empty(len(leaves), dtype=object)
    found[:] = leaves
    return found


def _item(array: np.ndarray, index: Any) -> object:  # noqa: ANN401
    parts = index if isinstance(index, tuple) else (index,)
    return array[tuple(part.astype(int) if isinstance(part, np.ndarray) else part for part in parts)]


def _select(array: np.ndarray, dim: int, index: int) -> object:
    return np.take(array, index, axis=dim)


def _squeeze(array: np.ndarray, dim: int | tuple[int, ...] | None = None) -> np.ndarray:
    dims = (dim,) if isinstance(dim, int) else dim
    return np.squeeze(array, None if dims is None else tuple(index for index in dims if array.shape[index] == 1))


def _unsqueeze(array: np.ndarray, dim: int) -> np.ndarray:
    return np.expand_dims(array, dim)


def _reshape(array: np.ndarray, *shape: Any, **options: object) -> np.ndarray:  # noqa: ANN401
    """The order of elements is all that counts here; `_pass_on` gives them the result's shape."""
    return array


def _concatenate(arrays: Sequence[np.ndarray], dim: int = 0) -> np.ndarray:
    return np.concatenate(arrays, dim)


def _full(size: Sequence[object], fill_value: object, **options: object) -> np.ndarray:
    shape = [int(item) for item in size]  # pyright: ignore[reportArgumentType]
    return np.full(shape, fill_value, dtype=object)


def _product(array: np.ndarray, *dims: object, **options: object) -> object:
    if dims or options.get("dim") is not None:
        axis = dims[0] if dims else options["dim"]
        return np.multiply.reduce(array, axis=axis)  # pyright: ignore[reportArgumentType]
    return np.multiply.reduce(array, axis=None)


def _where(condition: Any, left: Any, right: Any) -> object:  # noqa: ANN401
    return _each(lambda chosen, one, other: one if chosen else other, 3)(condition, left, right)


_READS: Mapping[Callable[..., object], Callable[[np.ndarray], object]] = {
    torch.Tensor.tolist: lambda known: known.tolist(),
    torch.Tensor.item: lambda known: known.item(),
    torch.Tensor.__int__: lambda known: int(known.item()),
    torch.Tensor.__index__: lambda known: operator.index(known.item()),
    torch.Tensor.__bool__: lambda known: bool(known.item()),
    torch.Tensor.__float__: lambda known: float(known.item()),
}

_TAKE_NUMBERS = {
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.pow,
    torch.eq,
    torch.ne,
    torch.lt,
    torch.le,
    torch.gt,
    torch.ge,
}

_RULES: Mapping[Callable[..., object], Callable[..., object]] = {
    torch.tensor: _tensor,
    torch.full: _full,
    torch.cat: _concatenate,
    torch.stack: lambda arrays, dim=0: np.stack(arrays, dim),
    torch.Tensor.select: _select,
    torch.where: _where,
    torch.prod: _product,
    torch.div: _truncated_quotient,
    torch.Tensor.__getitem__: _item,
    **dict.fromkeys((torch.Tensor.to, torch.Tensor.type), _cast),
    torch.Tensor.long: lambda array: _cast(array, torch.int64),
    **dict.fromkeys((torch.squeeze, torch.Tensor.squeeze), _squeeze),
    **dict.fromkeys((torch.unsqueeze, torch.Tensor.unsqueeze), _unsqueeze),
    **dict.fromkeys((torch.reshape, torch.Tensor.reshape, torch.Tensor.view, torch.Tensor.flatten, torch.flatten), _reshape),
    **{
        function: _each(rule, 2)
        for function, rule in {
            torch.add: operator.add,
            torch.sub: operator.sub,
            torch.mul: operator.mul,
            torch.remainder: operator.mod,
            torch.minimum: torch.sym_min,
            torch.maximum: torch.sym_max,
            torch.eq: operator.eq,
            torch.ne: operator.ne,
            torch.lt: operator.lt,
            torch.le: operator.le,
            torch.gt: operator.gt,
            torch.ge: operator.ge,
            torch.logical_and: lambda left, right: bool(left) and bool(right),
            torch.logical_or: lambda left, right: bool(left) or bool(right),
        }.items()
    },
    **{
        function: _each(rule, 1)
        for function, rule in {
            torch.neg: operator.neg,
            torch.floor: math.floor,
            torch.ceil: math.ceil,
            torch.logical_not: operator.not_,
        }.items()
    },
}
