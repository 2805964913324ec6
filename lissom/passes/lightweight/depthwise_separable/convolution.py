"""The parameters of a convolution, read from its call: kernel, stride, dilation and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.ir import node as nodes


@dataclass(frozen=True)
class Window:
    """The window of a kernel: size, stride, dilation and padding for each spatial dimension.

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

    places_in, places_out: input and output positions of the batch, at the captured sizes.
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
        return cast(fx.Node, self.node.args[0])


def convolution_of(node: fx.Node) -> Convolution | str:
    """The convolution that a node computes, or why it cannot be read."""
    kernel, bias, groups = (nodes.argument(node, name) for name in ("weight", "bias", "groups"))
    if not isinstance(kernel, fx.Node) or kernel.op != "get_attr":
        return "its kernel is computed by the program, cast or quantized; put this pass before the one that did this"
    shape = nodes.tensor_type(kernel).shape
    sizes = tuple(size for size in shape[2:] if isinstance(size, int))
    numbers = [_numbers(nodes.argument(node, name), len(sizes)) for name in ("stride", "dilation")]
    padding = _padding(nodes.argument(node, "padding"), sizes, numbers[1])
    if numbers[0] is None or numbers[1] is None or padding is None or not isinstance(groups, int):
        return "its stride, padding, dilation or groups are computed while the program runs"
    read, given = example_shape(cast(fx.Node, node.args[0])), example_shape(node)
    rank = len(sizes)
    return Convolution(
        node,
        kernel,
        bias if isinstance(bias, fx.Node) else None,
        Window(sizes, numbers[0], padding, numbers[1]),
        groups,
        channels_in=int(cast(int, shape[1])) * groups,
        channels_out=int(cast(int, shape[0])),
        places_in=prod(read) // read[-rank - 1],
        places_out=prod(given) // given[-rank - 1],
    )


def _numbers(item: object, rank: int) -> tuple[int, ...] | None:
    """One number per dimension, from a number, a list of one, or a list of that length."""
    found = [item] if isinstance(item, int) else list(cast("Sequence[object]", item))
    if not all(isinstance(number, int) for number in found):
        return None
    return cast("tuple[int, ...]", tuple(found) * (rank if len(found) == 1 else 1))


def _padding(item: object, sizes: Sequence[int], dilation: Sequence[int] | None) -> tuple[tuple[int, int], ...] | None:
    if item == "valid":
        return ((0, 0),) * len(sizes)
    if item == "same":
        totals = [(size - 1) * step for size, step in zip(sizes, dilation or (), strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    numbers = _numbers(item, len(sizes))
    return None if numbers is None else tuple((number, number) for number in numbers)
