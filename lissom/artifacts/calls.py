"""Checks that a call in a file fits its target: an operator's schema, or a function of sizes."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from lissom.artifacts.allowed import FIXED
from lissom.artifacts.expression import FUNCTIONS as SIZE_FUNCTIONS
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.types import ScalarType, TensorType
from lissom.io.fields import shown

MOST_EXPONENT = 64
"""The largest exponent of a power or shift of sizes: Python computes these exactly, with any number of digits."""
_POWERS = (operator.pow, operator.lshift, *(SIZE_FUNCTIONS[name] for name in ("Pow", "PowByNatural", "FloatPow")))
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "SymInt": (int,),
    "float": (int, float),
    "number": (int, float, complex),
    "bool": (bool,),
    "str": (str,),
    # The name of a process group.
    "Any": (str,),
    "ScalarType": (torch.dtype,),
    "Layout": (torch.layout,),
    "MemoryFormat": (torch.memory_format,),
    "Device": (torch.device,),
}
"""The Python types of literals in a file, by schema type; a value of any other type comes from a node."""
_NUMBERS = ("int", "SymInt", "float", "number", "bool")


_signature_of = cache(inspect.signature)


def check_call(target: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse a call whose arguments do not fit its target in number, name or type.

    For a node as argument, its type in the file is checked.

    Raises:
        ValueError: if they do not fit.
    """
    if isinstance(target, torch._ops.OpOverload):
        _check_operator(target, args, kwargs)
    else:
        _check_function(target, args, kwargs)


def _check_operator(target: torch._ops.OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    parameters = target._schema.arguments
    by_place = [parameter.name for parameter in parameters if not parameter.kwarg_only]
    if len(args) > len(by_place):
        raise ValueError(f"{target} takes {len(by_place)} arguments by position, and is given {len(args)}")
    given = dict(zip(by_place, args, strict=False))
    names = {parameter.name for parameter in parameters}
    for name in kwargs:
        if name not in names or name in given:
            raise ValueError(f"{target} has no argument {shown(name)}" if name not in names else f"{target} has {name!r} twice")
    given |= kwargs
    for parameter in parameters:
        if parameter.name not in given:
            if not parameter.has_default_value():
                raise ValueError(f"{target} lacks its argument '{parameter.name}'")
            continue
        argument, one_for_all = given[parameter.name], getattr(parameter, "N", None) is not None
        # Arithmetic takes a number in place of a tensor.
        of_numbers = torch.Tag.pointwise in target.tags or parameter.name == "other"
        if not _fits(argument, str(parameter.real_type), of_numbers, one_for_all):
            raise ValueError(
                f"the argument '{parameter.name}' of {target} is {shown(argument)}, and is to be {parameter.real_type}"
            )
    for name, value in FIXED.get(str(target), {}).items():
        if name in given and given[name] != value:
            raise ValueError(f"{target} draws random numbers: its argument '{name}' is {shown(given[name])}, and not {value}")


def _fits(argument: object, kind: str, of_numbers: bool, one_for_all: bool = False) -> bool:
    """True if an argument matches a type, as schemas write it.

    Args:
        of_numbers: a number may replace a tensor.
        one_for_all: one number may replace a list.
    """
    if kind.startswith("Optional["):
        return argument is None or _fits(argument, kind[len("Optional[") : -1], of_numbers, one_for_all)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(argument, (list, tuple)):
            return all(_fits(part, inner, of_numbers) for part in argument)
        is_list = isinstance(argument, fx.Node) and isinstance(nodes.node_type(argument), tuple)
        return is_list or (one_for_all and _fits(argument, inner, of_numbers))
    operand = nodes.node_type(argument) if isinstance(argument, fx.Node) else argument
    if kind == "Tensor":
        return isinstance(operand, TensorType) or (of_numbers and isinstance(operand, (ScalarType, int, float, complex)))
    if isinstance(argument, fx.Node):
        # A tensor of one element may replace a number.
        return kind in _NUMBERS and isinstance(operand, (ScalarType, TensorType))
    return isinstance(argument, _KINDS.get(kind, ()))


def _check_function(target: Callable[..., Any], args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Refuse a call of a function of sizes with keywords, or with arguments other than numbers; `getitem` also takes slices."""
    name = getattr(target, "__name__", target)
    if kwargs:
        raise ValueError(f"{name} takes its arguments by position, and is given {shown([*kwargs])}")
    for argument in args:
        is_index = target is operator.getitem and isinstance(argument, (slice, tuple, type(None), type(...)))
        if not is_index and not isinstance(argument, (fx.Node, int, float)):
            raise ValueError(f"{name} takes numbers, and is given {shown(argument)}")
    if target not in SIZE_FUNCTIONS.values():
        try:
            _signature_of(target).bind(*args)
        except TypeError as error:
            raise ValueError(f"{name} is given {len(args)} arguments: {error}") from error
    if target in _POWERS and not (len(args) == 2 and isinstance(args[1], (int, float)) and abs(args[1]) <= MOST_EXPONENT):
        raise ValueError(f"the exponent of {name} is {shown(args[1:])}; the limit is a number up to {MOST_EXPONENT}")
