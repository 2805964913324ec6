"""Arguments of calls and types of values as JSON, and back.

Numbers, text, booleans, None and lists are written as in JSON; everything else is an object with one field, its kind:
`{"node": "linear"}`, `{"float": "inf"}`, `{"dtype": "float32"}`, `{"tuple": [1, 2]}`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from lissom.artifacts.expression import decode_expression, encode_expression
from lissom.compiler.ir import fake
from lissom.compiler.ir.node import Deferred
from lissom.compiler.ir.types import ScalarType, Size, TensorType, size_of, type_of
from lissom.errors import ArtifactError
from lissom.io.fields import count, shown, take, take_list

MOST_DIMENSIONS = 64
_NAMED: Mapping[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_NO_NUMBERS = ("q", "bits", "sparse", "_mkldnn", "jagged")
"""Prefixes of the dtypes and layouts whose tensors are not plain arrays of numbers."""
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Reader:
    """Resolves the names in a file.

    Attributes:
        symbols: those of the program.
        nodes: those made so far.
        place: maps a saved device to the device to load on.
    """

    symbols: Mapping[str, sympy.Symbol]
    nodes: Mapping[str, fx.Node]
    place: Callable[[torch.device], torch.device]

    def symbol(self, name: str) -> sympy.Symbol:
        """The symbol of that name. Raises ValueError."""
        if name not in self.symbols:
            raise ValueError(f"there is no symbol {shown(name)}")
        return self.symbols[name]

    def size(self, data: object) -> Size:
        """A size: a number, or an expression. Raises ValueError."""
        expression = decode_expression(data, self.symbols)
        if not isinstance(expression, sympy.Expr) or (expression.is_number and not isinstance(expression, sympy.Integer)):
            raise ValueError(f"{shown(data)} is not a size")
        return int(expression) if isinstance(expression, sympy.Integer) else expression

    def sizes(self, data: object, key: str, itemsize: int) -> tuple[Size, ...]:
        """The sizes or strides of a tensor in a field, whose product in bytes fits into 64 bits. Raises ValueError."""
        sizes = take_list(data, key, self.size)
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(sizes) > MOST_DIMENSIONS:
            raise ValueError(f"{shown(data)} has {len(sizes)} dimensions; the limit is {MOST_DIMENSIONS}")
        if min(numbers, default=0) < 0 or itemsize * math.prod(max(1, size) for size in numbers) >= 1 << 63:
            raise ValueError(f"the {key} of {shown(data)} is negative, or takes more than 2^63 bytes")
        return sizes

    def stride(self, data: object) -> Size:
        """A stride, which is not negative. Raises ValueError."""
        stride = self.size(data)
        return stride if isinstance(stride, sympy.Expr) else count(stride)

    def device(self, name: str) -> torch.device:
        """The device to load on for a saved device name. Raises ValueError."""
        try:
            return self.place(torch.device(name))
        except RuntimeError as error:
            raise ValueError(f"{shown(name)} is not a device") from error

    def tensor_type(self, data: object) -> TensorType:
        """The type of a tensor. Raises ValueError."""
        dtype = decode_named("dtype", take(data, "dtype", str))
        return TensorType(dtype, self.sizes(data, "shape", dtype.itemsize), self.device(take(data, "device", str)))


_NOTHING = Reader({}, {}, lambda device: device)


def encode_type(tensor_type: TensorType) -> dict[str, object]:
    """The type of a tensor as JSON."""
    shape = [encode_expression(size) for size in tensor_type.shape]
    return {"dtype": _name(tensor_type.dtype), "shape": shape, "device": str(tensor_type.device)}


def encode_argument(argument: object) -> Any:
    """One argument of a call as JSON. Raises ArtifactError for an object an artifact cannot hold."""
    match argument:
        case fx.Node():
            return {"node": argument.name}
        case None | bool() | int() | str():
            return argument
        case float():
            return argument if math.isfinite(argument) else {"float": str(argument)}
        case complex():
            return {"complex": [encode_argument(argument.real), encode_argument(argument.imag)]}
        case list():
            return [encode_argument(part) for part in argument]
        case tuple():
            return {"tuple": [encode_argument(part) for part in argument]}
        case slice():
            return {"slice": [encode_argument(part) for part in (argument.start, argument.stop, argument.step)]}
        case torch.device():
            return {"device": str(argument)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {next(name for name, kind in _NAMED.items() if isinstance(argument, kind)): _name(argument)}
        case EllipsisType():
            return {"ellipsis": True}
        case _:
            raise ArtifactError(
                f"the program holds {shown(argument)}, a {type(argument).__name__}, which an artifact cannot hold"
            )


def decode_argument(data: object, reader: Reader = _NOTHING) -> Any:
    """The argument from JSON. Raises ValueError for anything `encode_argument` does not write."""
    match data:
        case None | bool() | int() | float() | str():
            return data
        case list():
            return [decode_argument(part, reader) for part in data]
        case {"node": str() as name} if name in reader.nodes:
            return reader.nodes[name]
        case {"tuple": list() as parts}:
            return tuple(decode_argument(part, reader) for part in parts)
        case {"slice": [start, stop, step]}:
            return slice(*(decode_argument(part, reader) for part in (start, stop, step)))
        case {"float": str() as digits} if digits in _NOT_FINITE:
            return _NOT_FINITE[digits]
        case {"complex": [real, imaginary]}:
            return complex(float(decode_argument(real)), float(decode_argument(imaginary)))
        case {"device": str() as name}:
            return reader.device(name)
        case {"ellipsis": True}:
            return ...
        case {"dtype": str() as name}:
            return decode_named("dtype", name)
        case {"layout": str() as name}:
            return decode_named("layout", name)
        case {"memory_format": str() as name}:
            return decode_named("memory_format", name)
        case _:
            raise ValueError(f"{shown(data)} is not an argument")


def decode_named(kind: str, name: str) -> Any:
    """The dtype, layout or memory format of that name. Raises ValueError if PyTorch has none."""
    # Not `getattr`, which would import modules of PyTorch by name.
    attribute = vars(torch).get(name)
    if not isinstance(attribute, _NAMED[kind]) or name.startswith(_NO_NUMBERS):
        raise ValueError(f"{shown(name)} is not a {kind} of PyTorch")
    return attribute


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def encode_value(value: object) -> object:
    """A node's value as JSON; for a tensor its dtype, sizes, strides and device.

    Raises:
        ArtifactError: for a value an artifact cannot hold.
    """
    match value:
        case None:
            return None
        case torch.Tensor():
            sizes = tuple(size_of(size) for size in value.shape)
            described = encode_type(TensorType(value.dtype, sizes, value.device))
            return {"tensor": described | {"stride": [encode_expression(size_of(size)) for size in value.stride()]}}
        case torch.SymInt():
            return {"int": encode_expression(value.node.expr)}
        case torch.SymFloat():
            return {"float": encode_expression(value.node.expr)}
        case torch.SymBool():
            return {"bool": encode_expression(value.node.expr)}
        case bool() | int() | float():
            return {"number": encode_argument(value)}
        case list() | tuple():
            return [encode_value(element) for element in value]
        case _:
            raise ArtifactError(f"the program yields a {type(value).__name__}, which an artifact cannot hold")


def decode_value(data: object, reader: Reader, mode: Callable[[], FakeTensorMode]) -> Deferred:
    """The value from JSON, created in the mode at first access.

    Raises:
        ValueError: for anything `encode_value` does not write.
    """
    match data:
        case None:
            return Deferred(None, lambda: None)
        case {"tensor": described}:
            tensor_type, stride = reader.tensor_type(described), take_list(described, "stride", reader.stride)
            if len(stride) != tensor_type.rank:
                raise ValueError(f"{shown(described)} has not one stride a dimension")
            return Deferred(tensor_type, lambda: fake.fake_tensor(mode(), tensor_type, stride))
        case {"int": expression}:
            return _number(int, expression, reader, mode)
        case {"float": expression}:
            return _number(float, expression, reader, mode)
        case {"bool": expression}:
            return _number(bool, expression, reader, mode)
        case {"number": given}:
            number = decode_argument(given)
            return Deferred(type_of(number), lambda: number)
        case list():
            elements = [decode_value(element, reader, mode) for element in data]
            return Deferred(tuple(element.type for element in elements), lambda: [element.value for element in elements])
        case _:
            raise ValueError(f"{shown(data)} is not a value")


def _number(kind: type[float], data: object, reader: Reader, mode: Callable[[], FakeTensorMode]) -> Deferred:
    expression = decode_expression(data, reader.symbols)
    number = cast(Size, int(expression) if isinstance(expression, sympy.Integer) else expression)
    return Deferred(ScalarType(kind, number), lambda: fake.fake_number(mode(), kind, number))
