"""What a call node calls, by name: operators of PyTorch's and of ours, and functions of sizes, all from explicit lists."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Registers our operators.
import lissom.ops  # noqa: F401  # pyright: ignore[reportUnusedImport]
from lissom.artifacts.expression import FUNCTIONS as SIZE_FUNCTIONS
from lissom.artifacts.fields import shown
from lissom.compiler.collectives import COLLECTIVES, WAIT
from lissom.compiler.errors import ArtifactError
from lissom.compiler.node import STATE_WRITES
from lissom.compiler.text import target_text

NAMESPACES = ("aten", "lissom")
"""Of operators a program in an artifact may call."""
_FORBIDDEN = {"aten.from_file.default"}
"""It reads, and may make, a file its arguments name."""
_STATE_WRITES = frozenset(map(str, STATE_WRITES))
_NAME = re.compile(r"([a-z]+)\.([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z_][A-Za-z0-9_]*)")
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


def operator_name(target: object) -> str:
    """The name of what a node calls: `aten.linear.default`, `operator.mul`.

    Raises: ArtifactError when it is on none of the lists.
    """
    name = str(target) if isinstance(target, torch._ops.OpOverload) else _function_name(target)
    if _find(name) is not target:
        raise ArtifactError(
            f"the program calls {target_text(target)}, which an artifact cannot hold: it holds operators of "
            f"{' and '.join(NAMESPACES)}, and functions of sizes"
        )
    return name


def find_operator(name: str) -> Callable[..., Any]:
    """What a name stands for.

    Raises: ValueError when it is on none of the lists, or this version of PyTorch has no such operator.
    """
    found = _find(name)
    if found is None:
        raise ValueError(
            f"there is no operator {shown(name)}, or none that an artifact may call; this is PyTorch {torch.__version__}"
        )
    return found


def _function_name(target: object) -> str:
    return next((name for name, function in FUNCTIONS.items() if function is target), "")


def _find(name: str) -> Callable[..., Any] | None:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _NAME.fullmatch(name)
    if parts is None or parts[1] not in NAMESPACES or name in _FORBIDDEN:
        return None
    packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
    found = getattr(packet, parts[3], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, torch._ops.OpOverload) or (found._schema.is_mutable and name not in _STATE_WRITES):
        return None
    return found
