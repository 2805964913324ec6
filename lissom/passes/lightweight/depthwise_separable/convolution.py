"""The parameters of a convolution, read from its call: kernel, stride, dilation and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.ir import calls
from lissom.compiler.ir import node as nodes


@dataclass(frozen=True)
class Window:
    """The window of a kernel: size, stride, dilation and padding for each spatial dimension.

    Attributes:
        padding: pairs, before and after; for `same` the odd zero comes after, as in PyTorch.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @property
    def taps(self) -> int:
        """The number of kernel elements per channel."""
        return prod(self.size)

    def patches(self, value: torch.Tensor) -> torch.Tensor:
        """The input patch at each output position: [batch, channels, positions, taps] of [batch, channels, *sizes]."""
        padded = torch.nn.functional.pad(value, [side for pair in reversed(self.padding) for side in pair])
        for dim, (size, stride, dilation) in enumerate(zip(self.size, self.stride, self.dilation, strict=True), 2):
            padded = padded.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        rank = len(self.size)
        return padded.flatten(-rank).flatten(2, 1 + rank)


@dataclass(frozen=True)
class Convolution:
    """A convolution whose kernel is a weight, [channels out, channels in / groups, *sizes].

    Attributes:
        places_in: input positions of the batch, at the captured sizes.
        places_out: output positions, likewise.
    """

    node: fx.Node
    kernel: fx.Node
    bias: fx.Node | None
    window: Window
    groups: int
    channels_in: int
    channels_out: int
    places_in: int
    places_out: int

    @property
    def input(self) -> fx.Node:
        return nodes.operand(self.node)


def convolution_of(node: fx.Node) -> Convolution | str:
    """The convolution that a node computes, or why it cannot be read."""
    call, groups = calls.Convolution(node), nodes.argument(node, "groups")
    kernel = call.weight
    if kernel.op != "get_attr":
        return "its kernel is computed by the program, cast or quantized; put this pass before the one that did this"
    sizes = tuple(size for size in nodes.tensor_type(kernel).shape[2:] if isinstance(size, int))
    stride, dilation = _numbers(call.stride, len(sizes)), _numbers(call.dilation, len(sizes))
    padding = _padding(call.padding, sizes, dilation)
    if stride is None or dilation is None or padding is None or not isinstance(groups, int):
        return "its stride, padding, dilation or groups are computed while the program runs"
    read, given = example_shape(call.x), example_shape(node)
    rank = len(sizes)
    return Convolution(
        node,
        kernel,
        call.bias,
        Window(sizes, stride, padding, dilation),
        groups,
        channels_in=nodes.fixed_size(kernel, 1) * groups,
        channels_out=nodes.fixed_size(kernel, 0),
        places_in=prod(read) // read[-rank - 1],
        places_out=prod(given) // given[-rank - 1],
    )


def _numbers(setting: int | Sequence[object], rank: int) -> tuple[int, ...] | None:
    """One number per dimension, from a number, a list of one, or a list of that length."""
    given = [setting] if isinstance(setting, int) else setting
    numbers = tuple(number for number in given if isinstance(number, int))
    return numbers * (rank if len(numbers) == 1 else 1) if len(numbers) == len(given) else None


def _padding(
    padding: str | int | Sequence[object], sizes: Sequence[int], dilation: Sequence[int] | None
) -> tuple[tuple[int, int], ...] | None:
    if padding == "valid":
        return ((0, 0),) * len(sizes)
    if padding == "same":
        totals = [(size - 1) * step for size, step in zip(sizes, dilation or (), strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    numbers = None if isinstance(padding, str) else _numbers(padding, len(sizes))
    return None if numbers is None else tuple((number, number) for number in numbers)
