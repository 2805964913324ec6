"""Calls that move, copy or select values, with operands by name; see `calls.py`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as families
from lissom.compiler.ir.calls import Call, Operand
from lissom.compiler.ir.types import Size

aten = torch.ops.aten


class Cast(Call):
    """A value in another dtype."""

    targets = families.CASTS
    x = Operand[fx.Node]("self")
    dtype = Operand[torch.dtype | None]("dtype")


class Reshape(Call):
    """A reshape that lists the sizes of its result."""

    targets = families.SIZED_RESHAPES
    x = Operand[fx.Node]("self")
    sizes = Operand[Sequence[Size | fx.Node]]("shape", "size")


class Transpose(Call):
    """Two dimensions swapped."""

    targets = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
    x = Operand[fx.Node]("self")
    dim0 = Operand[int]("dim0", "axis0")
    dim1 = Operand[int]("dim1", "axis1")


class Unsqueeze(Call):
    """A new dimension of size 1."""

    targets = (aten.unsqueeze.default,)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")


class Cat(Call):
    """Tensors joined along a dimension."""

    targets = families.CONCATENATIONS
    parts = Operand[Sequence[fx.Node]]("tensors")
    dim = Operand[int]("dim")


class Stack(Call):
    """Tensors joined along a new dimension."""

    targets = (aten.stack.default,)
    parts = Operand[Sequence[fx.Node]]("tensors")
    dim = Operand[int]("dim")


class Slice(Call):
    """A range of one dimension."""

    targets = (aten.slice.Tensor,)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")
    start = Operand[int | fx.Node | None]("start")
    end = Operand[int | fx.Node | None]("end")
    step = Operand[int | fx.Node]("step")


class Select(Call):
    """One index of a dimension."""

    targets = (aten.select.int,)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")
    index = Operand[int | fx.Node]("index")


class Index(Call):
    """`x[i, j]`; None stands for a dimension that is not indexed."""

    targets = (aten.index.Tensor,)
    x = Operand[fx.Node]("self")
    indices = Operand[Sequence[fx.Node | None]]("indices")


class IndexSelect(Call):
    """Indices looked up along one dimension."""

    targets = (aten.index_select.default,)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")
    indices = Operand[fx.Node]("index")


class Gather(Call):
    """Elements looked up along one dimension."""

    targets = (aten.gather.default, aten.take_along_dim.default)
    x = Operand[fx.Node]("self")
    dim = Operand[int | None]("dim")
    indices = Operand[fx.Node]("index", "indices")


class RepeatInterleave(Call):
    """Each index of a dimension several times in a row."""

    targets = (aten.repeat_interleave.self_int,)
    x = Operand[fx.Node]("self")
    repeats = Operand[int | fx.Node]("repeats")
    dim = Operand[int | None]("dim")


class Repeat(Call):
    """Copies of a tensor along its dimensions."""

    targets = (aten.repeat.default,)
    x = Operand[fx.Node]("self")
    counts = Operand[Sequence[int | fx.Node]]("repeats")


class Copy(Call):
    """Values assigned to a tensor, in its sizes and dtype."""

    targets = (aten.copy.default, aten.copy_.default)
    x = Operand[fx.Node]("self")
    source = Operand[fx.Node]("src")


class IndexCopy(Call):
    """Rows of a tensor replaced by others."""

    targets = (aten.index_copy.default, aten.index_copy_.default)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")
    indices = Operand[fx.Node]("index")
    source = Operand[fx.Node]("source")


class Sized(Call):
    """A call that lists the sizes of its result, or of a part of it."""

    targets = tuple(families.SIZES_AT)
    sizes = Operand[Sequence[Size | fx.Node]]("shape", "size", "sizes")


class Split(Call):
    """Pieces of a dimension."""

    targets = families.SPLITS
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")


class SymSize(Call):
    """The size of one dimension."""

    targets = (aten.sym_size.int,)
    x = Operand[fx.Node]("self")
    dim = Operand[int]("dim")


class Unflatten(Call):
    """One dimension as several."""

    targets = (aten.unflatten.int,)
    dim = Operand[int]("dim")


class Item:
    """One of the results of a call that returns several."""

    def __init__(self, node: fx.Node) -> None:
        assert node.target is operator.getitem, f"{node.target} is no item of a tuple"
        self.node = node

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The item that a node takes; None for any other node."""
        return cls(node) if nodes.is_call(node, operator.getitem) else None

    @property
    def source(self) -> fx.Node:
        """The call whose result it is taken from."""
        return nodes.operand(self.node)

    @property
    def index(self) -> int:
        """The place of the item."""
        index: Any = self.node.args[1]
        return index
