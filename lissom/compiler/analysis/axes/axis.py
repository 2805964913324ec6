"""Axes: the structure of tensor dimensions, as trees that are unified where two dimensions are the same.

An axis is atomic, an ordered product of axes (384 = heads × head_dim, major first), or a sum of concatenated axes
(1152 = q + k + v). Unifying two axes refines both until they agree; when they cannot agree, both are pinned with the reason,
and a pinned axis is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

from lissom.compiler.ir.types import Size, quotient


@dataclass(eq=False)
class Axis:
    """One axis. `parts` are the factors of a product or the segments of a sum.

    Attributes:
        whole: an operator reads all of it at once (softmax, a mean), so its length changes the numbers.
        normed: a norm reads all of it, and can be given the old number of indices; removed values must then be zero.
        pinned: why it must not change; None if it may.
    """

    size: Size
    form: str = "atom"
    parts: tuple[Axis, ...] = ()
    whole: bool = False
    normed: bool = False
    pinned: str | None = None
    same_as: Axis | None = field(default=None, repr=False)

    def find(self) -> Axis:
        """The representative of this axis and all axes it was unified with."""
        axis = self
        while axis.same_as is not None:
            axis = axis.same_as
        if axis is not self:
            self.same_as = axis
        return axis

    def atoms(self) -> Iterator[Axis]:
        """The atoms of this axis, in order; an atom may occur more than once."""
        axis = self.find()
        if axis.form == "atom":
            yield axis
        for part in axis.parts:
            yield from part.atoms()

    def factors(self) -> list[Axis]:
        """The factors of the axis, nested products flattened, sizes of 1 left out."""
        axis = self.find()
        if axis.size == 1:
            return []
        if axis.form != "product":
            return [axis]
        return [factor for part in axis.parts for factor in part.factors()]

    def segments(self) -> list[Axis]:
        """The segments of the axis, nested sums flattened."""
        axis = self.find()
        if axis.form != "sum":
            return [axis]
        return [segment for part in axis.parts for segment in part.segments()]


def product(parts: Sequence[Axis]) -> Axis:
    """The axis whose index runs through the indices of the parts, the last one fastest."""
    factors = [factor for part in parts for factor in part.factors()]
    if len(factors) == 1:
        return factors[0]
    return Axis(math.prod(sizes_of(factors)), "product", tuple(factors)) if factors else Axis(1)


def concatenation(parts: Sequence[Axis]) -> Axis:
    """The axis of the concatenated parts."""
    segments = [segment for part in parts for segment in part.segments()]
    return segments[0] if len(segments) == 1 else Axis(sum(sizes_of(segments)), "sum", tuple(segments))


def sizes_of(axes: Iterable[Axis]) -> list[int]:
    """The sizes of axes, as numbers for the type checker even where they are symbolic."""
    return [cast(int, axis.size) for axis in axes]


def pin(axis: Axis, reason: str | None) -> None:
    """Keep every atom of the axis from being changed; the first reason stays, and None pins nothing."""
    for atom in axis.atoms():
        atom.pinned = atom.pinned or reason


def mark(axis: Axis, *, whole: bool = False, normed: bool = False) -> None:
    """Note that an operator reads all of the axis at once, or that a norm runs over it."""
    for atom in axis.atoms():
        atom.whole |= whole
        atom.normed |= normed


def unify(left: Axis, right: Axis, reason: str) -> None:
    """Make two axes the same, refining either as far as needed; both are pinned when that is not possible."""
    left, right = left.find(), right.find()
    if left is right:
        return
    if left.size != right.size:
        _pin_both(left, right, reason)
    elif left.form == "atom":
        _absorb(left, right)
    elif right.form == "atom":
        _absorb(right, left)
    elif left.form == right.form == "product":
        _align(left.factors(), right.factors(), reason, divide)
    elif left.form == right.form == "sum":
        _align(left.segments(), right.segments(), reason, cut)
    else:
        whole, pieces = (left, right) if left.form == "product" else (right, left)
        _align([whole], pieces.segments(), f"{reason}: one side is a product of axes, the other a sum", cut)


def _pin_both(left: Axis, right: Axis, reason: str) -> None:
    pin(left, reason)
    pin(right, reason)


def _absorb(atom: Axis, other: Axis) -> None:
    if any(part is atom for part in other.atoms()):
        _pin_both(atom, other, "an axis would contain itself")
        return
    atom.same_as = other
    mark(other, whole=atom.whole, normed=atom.normed)
    pin(other, atom.pinned)


def _align(left: list[Axis], right: list[Axis], reason: str, split) -> None:  # noqa: ANN001
    """Unify two lists of parts from the front, splitting the larger part wherever their ends differ."""
    left, right = list(left), list(right)
    while left and right:
        a, b = left.pop(0).find(), right.pop(0).find()
        if a.size == b.size:
            unify(a, b, reason)
            continue
        for large, small, rest in ((a, b, left), (b, a, right)):
            pieces = split(large, small.size)
            if pieces is not None:
                unify(pieces[0], small, reason)
                rest.insert(0, pieces[1])
                break
        else:
            for axis in (a, b, *left, *right):
                pin(axis, reason)
            return


def divide(axis: Axis, size: Size) -> tuple[Axis, Axis] | None:
    """The axis as a product of `size` and the rest; None when `size` does not divide it, or when it is a sum."""
    axis = axis.find()
    rest = quotient(axis.size, size)
    if rest is None:
        return None
    if rest == 1:
        return axis, Axis(1)
    if axis.form == "product":
        return _divide_product(axis, size)
    if axis.form != "atom":
        return None
    axis.form, axis.parts = "product", (_like(axis, size), _like(axis, rest))
    return axis.parts[0], axis.parts[1]


def _divide_product(axis: Axis, wanted: Size) -> tuple[Axis, Axis] | None:
    factors = axis.factors()
    for index, factor in enumerate(factors):
        if wanted == 1:
            return product(factors[:index]), product(factors[index:])
        rest = quotient(wanted, factor.size)
        if rest is None:
            pieces = divide(factor, wanted)
            return pieces and (product([*factors[:index], pieces[0]]), product([pieces[1], *factors[index + 1 :]]))
        wanted = rest
    return product(factors), Axis(1)


def cut(axis: Axis, size: Size) -> tuple[Axis, Axis] | None:
    """The axis split after its first `size` indices; None for a product that would be split inside a row."""
    axis = axis.find()
    if not isinstance(axis.size, int) or not isinstance(size, int) or not 0 < size < axis.size:
        return None
    if axis.form == "product":
        return _cut_product(axis, size)
    if axis.form == "sum":
        return _cut_sum(axis, size)
    axis.form, axis.parts = "sum", (_like(axis, size), _like(axis, axis.size - size))
    return axis.parts[0], axis.parts[1]


def _cut_product(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """A product is split between rows: (a + b) × c is a × c followed by b × c."""
    major, *minor = axis.factors()
    row = quotient(axis.size, major.size)
    if not isinstance(row, int) or size % row:
        return None
    pieces = cut(major, size // row)
    return None if pieces is None else (product([pieces[0], *minor]), product([pieces[1], *minor]))


def _cut_sum(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    segments = axis.segments()
    for index, segment in enumerate(segments):
        if size == 0:
            return concatenation(segments[:index]), concatenation(segments[index:])
        if not isinstance(segment.size, int):
            return None
        if segment.size > size:
            pieces = cut(segment, size)
            return pieces and (
                concatenation([*segments[:index], pieces[0]]),
                concatenation([pieces[1], *segments[index + 1 :]]),
            )
        size -= segment.size
    raise AssertionError("a cut is inside the axis")


def _like(axis: Axis, size: Size) -> Axis:
    return Axis(size, whole=axis.whole, normed=axis.normed, pinned=axis.pinned)
