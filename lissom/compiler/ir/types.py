"""The types of values, with dtype, sizes and device, and their text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch

Size = int | sympy.Expr
NameOf = Callable[[sympy.Expr], str]

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.float8_e8m0fnu: "f8e8m0",
}


def short_dtype(dtype: torch.dtype) -> str:
    """The dtype as programs print it: `f32`, `bf16`, `i64`, `bool`."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype, sizes (integers or expressions of the program's symbols) and device."""

    dtype: torch.dtype
    shape: tuple[Size, ...]
    device: torch.device

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class ScalarType:
    """A number computed from sizes while the program runs."""

    kind: type
    value: Size | float | bool


ValueType = TensorType | ScalarType | None | tuple["ValueType", ...]


def size_of(value: int | torch.SymInt) -> Size:
    """The size as an integer, or as an expression when it is symbolic."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_number else expression
    return int(value)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes, which may be numbers or expressions."""
    return math.prod(sizes)  # pyright: ignore[reportCallIssue, reportArgumentType]


def quotient(size: Size, divisor: Size) -> Size | None:
    """size / divisor when that is an integer for all values of the symbols, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    ratio = sympy.cancel(sympy.sympify(size) / sympy.sympify(divisor))
    if sympy.denom(ratio) != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio


def fixed(size: object) -> int:
    """A size that is the same in every call, as a number. Raises TypeError where it varies."""
    if not isinstance(size, int):
        raise TypeError(f"the size {size} varies from call to call")
    return size


def are_fixed(sizes: Sequence[Size]) -> TypeGuard[Sequence[int]]:
    """True when these sizes are the same in every call."""
    return all(isinstance(size, int) for size in sizes)


def substitute(size: sympy.Expr, values: Mapping[sympy.Symbol, object]) -> sympy.Expr:
    """The expression with values in place of some of its symbols."""
    replaced: Any = size.xreplace(values)
    return replaced


def type_of(value: object) -> ValueType:
    """The type of a node's (fake) value: a tensor, a number, nothing, or a tuple of types.

    Raises:
        TypeError: when the value is none of these.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        return TensorType(value.dtype, tuple(size_of(size) for size in value.shape), value.device)
    if isinstance(value, torch.SymInt):
        return ScalarType(int, size_of(value))
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return ScalarType(float if isinstance(value, torch.SymFloat) else bool, value.node.expr)
    if isinstance(value, (bool, int, float)):
        return ScalarType(type(value), value)
    if isinstance(value, (tuple, list)):
        return tuple(type_of(part) for part in value)
    raise TypeError(f"a program's values are tensors, numbers and tuples of these, not {type(value).__name__}")


def format_size(size: Size | float | bool, name_of: NameOf) -> str:
    """A size as text: a number, or an expression with the dimensions' names in it."""
    return name_of(size) if isinstance(size, sympy.Basic) else str(size)


def format_type(value_type: ValueType, name_of: NameOf) -> str:
    """`f32[batch, sequence, 384]`, `int batch*sequence`, `(f32[4], i64[4])`; the device only where it is not the CPU."""
    match value_type:
        case None:
            return "none"
        case TensorType(dtype, shape, device):
            sizes = ", ".join(format_size(size, name_of) for size in shape)
            place = "" if device.type == "cpu" else f"@{device}"
            return f"{short_dtype(dtype)}[{sizes}]{place}"
        case ScalarType(kind, value):
            return f"{kind.__name__} {format_size(value, name_of)}"
        case _:
            return "(" + ", ".join(format_type(part, name_of) for part in value_type) + ")"
