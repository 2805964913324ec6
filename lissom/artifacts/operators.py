"""Targets of call nodes by name: operators of PyTorch and of Lissom, and functions of sizes, all from explicit lists."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Registers our operators.
from lissom import ops as ops
from lissom.artifacts.allowed import ALLOWED
from lissom.artifacts.expression import FUNCTIONS as SIZE_FUNCTIONS
from lissom.compiler.ir.collectives import COLLECTIVES, WAIT
from lissom.compiler.ir.printer import target_text
from lissom.errors import ArtifactError
from lissom.io.fields import shown

_OF_NUMBERS = (
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
)
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OF_NUMBERS},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_float", "sym_int")},
    **{f"size.{name}": function for name, function in SIZE_FUNCTIONS.items()},
    **{str(target): target for target in (*COLLECTIVES, WAIT)},
}


_ADDED: dict[str, torch._ops.OpOverload] = {}


def allow(target: torch._ops.OpOverload) -> None:
    """Let programs in artifacts call an operator that is not on the list, in this process, for saving and for loading.

    The operator must only compute its results, and must check the sizes of its arguments: a file may call it with any.

    Examples:
        >>> import torch
        >>> from lissom.artifacts.operators import allow
        >>> allow(torch.ops.aten.logit.default)
    """
    _ADDED[str(target)] = target


def operator_name(target: object) -> str:
    """The name of a node's target: `aten.linear.default`, `operator.mul`.

    Raises:
        ArtifactError: if it is on none of the lists.
    """
    function_name = next((name for name, function in FUNCTIONS.items() if function is target), "")
    name = str(target) if isinstance(target, torch._ops.OpOverload) else function_name
    if _find(name) is not target:
        raise ArtifactError(
            f"the program calls {target_text(target)}, which an artifact cannot hold: it is not on the list of operators "
            f"in lissom/artifacts/allowed.py; if it is safe to call with any arguments, pass it to "
            f"lissom.artifacts.operators.allow before saving and before loading"
        )
    return name


def find_operator(name: str) -> Callable[..., Any]:
    """The operator or function of that name.

    Raises:
        ValueError: if it is on none of the lists, or this version of PyTorch has no such operator.
    """
    target = _find(name)
    if target is None:
        raise ValueError(
            f"there is no operator {shown(name)}, or none that an artifact may call; this is PyTorch {torch.__version__}"
        )
    return target


def _find(name: str) -> Callable[..., Any] | None:
    if name not in ALLOWED:
        return FUNCTIONS.get(name) or _ADDED.get(name)
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)


def is_allowed(name: str) -> bool:
    """True if a program in an artifact may call the operator or function of that name."""
    return _find(name) is not None
