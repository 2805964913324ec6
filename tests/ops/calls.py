"""A call of an operator, and what spoils it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

from lissom.errors import LissomError
from tests.ops.unreadable import is_gone, unaligned, without_storage

Value = torch.Tensor | int | float | bool | str | list[int] | None
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**31), -(2**63))
REFUSALS = (RuntimeError, ValueError, IndexError, LissomError)


@dataclass
class Call:
    """An operator of ours, its reference, and operands and options by name."""

    name: str
    reference: Callable[..., torch.Tensor]
    operands: dict[str, Value]
    options: dict[str, Value]

    def run(self, function: Callable[..., torch.Tensor]) -> torch.Tensor | Exception:
        """The result, or the error that refuses the call; any other error ends the run."""
        try:
            return function(*self.operands.values(), **self.options)
        except REFUSALS as error:
            return error

    def __str__(self) -> str:
        operands = [f"{name}={said(value)}" for name, value in {**self.operands, **self.options}.items()]
        return f"{self.name}({', '.join(operands)})"


def said(value: Value) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"<{list(value.shape)} {value.dtype} strides {list(value.stride())}>".replace("torch.", "")


def spoil(call: Call, random: Random) -> None:
    """Change one operand or option."""
    place = random.choice([call.operands, call.operands, call.options])
    name = random.choice(list(place))
    value = place[name]
    if isinstance(value, torch.Tensor):
        place[name] = _spoilt_tensor(value, random)
    elif isinstance(value, bool):
        place[name] = not value
    elif isinstance(value, int):
        place[name] = random.choice([value + 1, value - 1, value * 2, 0, *HUGE])
    elif isinstance(value, float):
        place[name] = random.choice([0.0, torch.nan, torch.inf, -torch.inf, 1e300])
    elif isinstance(value, str):
        place[name] = random.choice(["", "other", "int8", "uint4", "mul", "none"])
    elif isinstance(value, list):
        at = random.randrange(max(len(value), 1))
        place[name] = value[:at] + random.choice([[], [random.choice([0, 1, -2, *HUGE])]]) + value[at + 1 :]
    else:
        place[name] = random.choice([torch.randn(3), torch.randn(()), torch.randn(1, 1, 2, 2), torch.ones(2, 3) > 0])


def _spoilt_tensor(value: torch.Tensor, random: Random) -> Value:
    """Another tensor, or this one where it has no storage or is huge: PyTorch's own operators fail there."""
    if value.layout != torch.strided or value.is_meta or is_gone(value) or max(value.shape, default=0) > 2**20:
        return value
    dim = random.randrange(value.dim()) if value.dim() else 0
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool)
    changes: list[Callable[[], Value]] = [
        lambda: value.to(random.choice([*dtypes, torch.int64, torch.complex64])),
        lambda: value.narrow(dim, 0, max(value.shape[dim] - 1, 0)) if value.dim() else value,
        lambda: torch.cat([value, value], dim) if value.dim() else value,
        lambda: value.flatten(),
        lambda: value.unsqueeze(dim),
        lambda: value.select(dim, 0) if value.dim() and value.shape[dim] else value,
        lambda: value.transpose(0, -1) if value.dim() else value,
        lambda: value.new_empty(*value.shape[:dim], 0, *value.shape[dim + 1 :]),
        lambda: value.new_zeros(()).expand(value.shape),
        lambda: value.new_zeros(()).expand(*value.shape[:dim], 2**40, *value.shape[dim + 1 :]),
        lambda: value.new_empty((0, 2**40)),
        lambda: value.repeat_interleave(2, dim).narrow(dim, 0, value.shape[dim]) if value.dim() else value,
        lambda: value.clone().fill_(random.choice([-1, 32, 127])),
        lambda: value.clone().as_strided(value.shape, [random.choice([0, 0, 1])] * value.dim()),
        lambda: without_storage(value),
        lambda: unaligned(value),
        lambda: value.to("meta"),
        lambda: value.to_sparse() if value.dim() else value,
    ]
    try:
        return random.choice(changes)()
    except RuntimeError:  # of a tensor that was spoilt before
        return value
