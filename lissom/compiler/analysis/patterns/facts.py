"""Masks as facts on sums of positions: the symbolic values that `values.py` computes in place of tensors.

An integer function of positions is a `Count`: Σ factor · ⌊index / unit⌋ + offset, over dimensions of its tensor, followed by
further steps (abs, remainder, …). A condition is `Seen`: facts in disjunctive normal form.
Dimensions are counted from the end, -1 the last, so that broadcasting does not change them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

from lissom.ops.pattern import LAYOUT, UNBOUNDED, Condition, Pattern

Terms = tuple[tuple[tuple[int, int], int], ...]
"""((dimension, unit in tokens), factor of ⌊index / unit⌋), sorted, no factor 0."""
Interval = tuple[float, float]
_MOST = 32
"""The most alternatives of a condition; kernels do not profit from patterns with more."""
_INFINITY = math.inf


@dataclass(frozen=True)
class Count:
    """An integer computed from positions.

    Attributes:
        steps: operations applied to Σ terms + offset, in order, each with its operand.
    """

    terms: Terms = ()
    offset: int = 0
    steps: tuple[tuple[str, int], ...] = ()

    @property
    def constant(self) -> int | None:
        """The number, when it is the same at all positions; else None."""
        return self.offset if not self.terms and not self.steps else None

    def plus(self, number: int) -> Count:
        if not self.steps:
            return replace(self, offset=self.offset + number)
        return replace(self, steps=(*self.steps, ("add", number)))

    def then(self, step: str, number: int = 0) -> Count | None:
        """The count after one more step: `mul`, `abs`, `div` (rounded down), `mod`, `min` or `max`; None when unsupported."""
        value = self.constant
        if value is not None:
            return Count(offset=_STEPS[step](value, number)) if step not in ("div", "mod") or number > 0 else None
        if step == "mul" and not self.steps:
            return Count(tuple((key, number * value) for key, value in self.terms) if number else (), self.offset * number)
        if step in ("div", "mod", "mul") and number <= 0:
            return None
        if step == "div" and not self.steps and len(self.terms) == 1 and self.terms[0][1] == 1:
            (axis, unit), _ = self.terms[0]
            if self.offset % number == 0:
                return Count((((axis, unit * number), 1),), self.offset // number)
        return replace(self, steps=(*self.steps, (step, number)))

    def moved(self, axes: Mapping[int, int]) -> Count | None:
        """The count with its dimensions renumbered; None when one of them is removed."""
        if any(axis not in axes for (axis, _), _ in self.terms):
            return None
        return replace(self, terms=tuple(sorted(((axes[axis], unit), factor) for (axis, unit), factor in self.terms)))

    def at(self, axis: int, index: int) -> Count:
        """The count at one index of a dimension."""
        here = sum(factor * (index // unit) for (term_axis, unit), factor in self.terms if term_axis == axis)
        return Count(tuple(term for term in self.terms if term[0][0] != axis), self.offset + here, self.steps)


_STEPS: Mapping[str, Callable[[int, int], int]] = {
    "mul": lambda value, number: value * number,
    "abs": lambda value, number: abs(value),
    "div": lambda value, number: value // number,
    "mod": lambda value, number: value % number,
    "min": min,
    "max": max,
}


def difference(left: Count, right: Count) -> Count | None:
    """left - right; None when it is no count."""
    if right.constant is not None:
        return left.plus(-right.constant)
    if left.steps or right.steps:
        return None
    factors = dict(left.terms)
    for key, value in right.terms:
        factors[key] = factors.get(key, 0) - value
    return Count(tuple(sorted((key, value) for key, value in factors.items() if value)), left.offset - right.offset)


@dataclass(frozen=True)
class Fact:
    """low <= Σ terms <= high; the sum is first reduced modulo `modulus`, unless that is 0."""

    terms: Terms
    low: float
    high: float
    modulus: int = 0


@dataclass(frozen=True)
class Table:
    """The condition that a block layout contains (or, inverted, lacks) the block of a query and a key.

    Attributes:
        layout: [heads or 1, query blocks, key blocks].
        identity: the memory address of its weight.
        axes: the dimensions of heads (0 for none), queries and keys.
        block: in tokens.
    """

    layout: torch.Tensor = field(compare=False)
    identity: int
    axes: tuple[int, int, int]
    block: int
    inverted: bool = False


Alternative = tuple[Fact | Table, ...]
Seen = tuple[Alternative, ...]
ALWAYS: Seen = ((),)
NEVER: Seen = ()


def between(count: Count, low: float, high: float) -> Seen | None:
    """The condition low <= count <= high; None if facts cannot express it."""
    intervals: list[Interval] = [(low, high)]
    for index, (step, number) in reversed(list(enumerate(count.steps))):
        if step == "mod":
            return _residues(replace(count, steps=count.steps[:index]), number, intervals)
        intervals = [earlier for interval in intervals for earlier in _before(step, number, *interval)]
    seen: Seen | None = NEVER
    for least, most in intervals:
        seen = either(seen, _fact(count.terms, least - count.offset, most - count.offset))
    return seen


def equal(left: Count, right: Count) -> Seen | None:
    """The condition that two counts are equal; None if facts cannot express it."""
    if left.steps == right.steps and len(left.steps) == 1 and left.steps[0][0] == "mod":
        apart = difference(replace(left, steps=()), replace(right, steps=()))
        apart = apart and apart.then("mod", left.steps[0][1])
    else:
        apart = difference(left, right) or difference(right, left)
    return None if apart is None else between(apart, 0, 0)


def _before(step: str, number: int, low: float, high: float) -> list[Interval]:
    """The preimage of an interval under a step."""
    if step == "add":
        return [(low - number, high - number)]
    if step == "mul":
        return [(_up(low, number), _down(high, number))]
    if step == "div":
        return [(low * number, high * number + number - 1)]
    if step == "abs":
        return [(low, high), (-high, -low)] if low > 0 else [(-high, high)] if high >= 0 else []
    if step == "min":
        return [(low, _INFINITY if high >= number else high)] if low <= number else []
    return [(-_INFINITY if low <= number else low, high)] if high >= number else []


def _down(value: float, number: int) -> float:
    return value if math.isinf(value) else int(value) // number


def _up(value: float, number: int) -> float:
    return -_down(-value, number)


def _residues(count: Count, modulus: int, intervals: list[Interval]) -> Seen | None:
    """The condition that (Σ terms + offset) mod `modulus` is in one of the intervals; None if facts cannot express it."""
    if count.steps:
        return None
    seen: Seen | None = NEVER
    for low, high in intervals:
        low, high = max(low, 0), min(high, modulus - 1)
        if low > high:
            continue
        if (low, high) == (0, modulus - 1):
            return ALWAYS
        start = (int(low) - count.offset) % modulus
        end = start + int(high) - int(low)
        for first, last in [(start, end)] if end < modulus else [(start, modulus - 1), (0, end - modulus)]:
            seen = either(seen, _fact(count.terms, first, last, modulus))
    return seen


def _fact(terms: Terms, low: float, high: float, modulus: int = 0) -> Seen:
    """One fact in canonical form; `ALWAYS` or `NEVER` when it always or never holds."""
    if not terms:
        return ALWAYS if low <= 0 <= high else NEVER
    if modulus == 0:
        divisor = math.gcd(*(factor for _, factor in terms)) * (-1 if terms[0][1] < 0 else 1)
        terms = tuple((key, factor // divisor) for key, factor in terms)
        low, high = (low, high) if divisor > 0 else (-high, -low)
        low, high = _up(low, abs(divisor)), _down(high, abs(divisor))
    if low > high:
        return NEVER
    return ALWAYS if low == -_INFINITY and high == _INFINITY else ((Fact(terms, low, high, modulus),),)


def both(left: Seen | None, right: Seen | None) -> Seen | None:
    """The conjunction of two conditions."""
    if left is None or right is None:
        return None
    joined = [_joined((*first, *second)) for first in left for second in right]
    return _limited(alternative for alternative in joined if alternative is not None)


def either(left: Seen | None, right: Seen | None) -> Seen | None:
    """The disjunction of two conditions."""
    if left is None or right is None:
        return None
    if () in left or () in right:
        return ALWAYS
    return _limited((*left, *right))


def opposite(seen: Seen | None) -> Seen | None:
    """The negation of a condition."""
    if seen is None:
        return None
    negated: Seen | None = ALWAYS
    for alternative in seen:
        negated = both(negated, reduce(either, map(_broken, alternative), NEVER))
    return negated


def _broken(fact: Fact | Table) -> Seen | None:
    if isinstance(fact, Table):
        return ((replace(fact, inverted=not fact.inverted),),)
    least, most = (0, fact.modulus - 1) if fact.modulus else (-_INFINITY, _INFINITY)
    below = _fact(fact.terms, least, fact.low - 1, fact.modulus) if fact.low > least else NEVER
    above = _fact(fact.terms, fact.high + 1, most, fact.modulus) if fact.high < most else NEVER
    return either(below, above)


def _limited(alternatives: Iterable[Alternative]) -> Seen | None:
    seen = tuple(dict.fromkeys(alternatives))
    return seen if len(seen) <= _MOST else None


def _joined(facts: Alternative) -> Alternative | None:
    """Merges facts on the same sum; None when they contradict each other."""
    merged: dict[object, Fact | Table] = {}
    for fact in facts:
        key = (fact.terms, fact.modulus) if isinstance(fact, Fact) else fact
        present = merged.get(key)
        if isinstance(fact, Fact) and isinstance(present, Fact):
            fact = replace(fact, low=max(fact.low, present.low), high=min(fact.high, present.high))
            if fact.low > fact.high:
                return None
        merged[key] = fact

    def order(fact: Fact | Table) -> tuple[object, ...]:
        return (1,) if isinstance(fact, Table) else (0, fact.modulus, fact.terms, fact.low, fact.high)

    # In a fixed order, so that equal patterns compare equal however they were written.
    return tuple(sorted(merged.values(), key=order))


def moved(seen: Seen | None, axes: Mapping[int, int]) -> Seen | None:
    """The condition with its dimensions renumbered; None when one it depends on is removed."""
    if seen is None:
        return None
    alternatives: list[Alternative] = []
    for alternative in seen:
        facts: list[Fact | Table] = []
        for fact in alternative:
            if isinstance(fact, Table):
                if any(axis not in axes for axis in fact.axes[1:]):
                    return None
                heads, rows, columns = (axes.get(axis, 0) for axis in fact.axes)
                facts.append(replace(fact, axes=(heads, rows, columns)))
                continue
            count = Count(fact.terms).moved(axes)
            if count is None:
                return None
            condition = _fact(count.terms, fact.low, fact.high, fact.modulus)
            facts += condition[0] if condition else ()
        alternatives.append(tuple(facts))
    return tuple(alternatives)


def shifted(seen: Seen | None, axis: int, start: int, single: bool) -> Seen | None:
    """The condition on a slice that starts at `start` of a dimension.

    Args:
        single: whether its length is one.
    """
    if seen is None or (start == 0 and not single):
        return seen
    condition: Seen | None = NEVER
    for alternative in seen:
        every: Seen | None = ALWAYS
        for fact in alternative:
            if isinstance(fact, Table):
                return None
            count = Count(fact.terms)
            count = count.at(axis, start) if single else slide(count, axis, start)
            if count is not None and fact.modulus:
                count = count.then("mod", fact.modulus)
            every = None if count is None else both(every, between(count, fact.low, fact.high))
        condition = either(condition, every)
    return condition


def slide(count: Count, axis: int, start: int) -> Count | None:
    """The count on a slice that starts at `start` of a dimension; None when `start` is inside a unit."""
    if any(term_axis == axis and start % unit for (term_axis, unit), _ in count.terms):
        return None
    more = sum(factor * (start // unit) for (term_axis, unit), factor in count.terms if term_axis == axis)
    return replace(count, offset=count.offset + more)


def pattern_of(seen: Seen) -> tuple[Pattern, torch.Tensor | None] | None:
    """The condition on a mask, [.., queries, keys], as a pattern and its layout; None when it is no pattern."""
    tables: dict[Table, None] = dict.fromkeys(fact for facts in seen for fact in facts if isinstance(fact, Table))
    if len(tables) > 1:
        return None
    table = next(iter(tables), None)
    if table is not None and (table.axes[1:] != (-2, -1) or (table.layout.shape[0] > 1 and table.axes[0] != -3)):
        return None
    alternatives: list[tuple[Condition, ...]] = []
    for facts in seen:
        conditions = [LAYOUT if isinstance(fact, Table) else _condition(fact) for fact in facts]
        if None in conditions:
            return None
        # An alternative without conditions always holds.
        alternatives.append(tuple(filter(None, conditions)) or (Condition(1, 0),))
    if table is None:
        return Pattern(tuple(alternatives)), None
    return Pattern(tuple(alternatives), table.block), ~table.layout if table.inverted else table.layout


def _condition(fact: Fact) -> Condition | None:
    factors = {axis: factor for (axis, _), factor in fact.terms}
    units = {unit for (_, unit), _ in fact.terms}
    if len(factors) != len(fact.terms) or not factors.keys() <= {-2, -1} or len(units) > 1:
        return None
    if any(abs(factor) != 1 for factor in factors.values()):
        return None
    low = -UNBOUNDED if fact.low == -_INFINITY else int(fact.low)
    high = UNBOUNDED if fact.high == _INFINITY else int(fact.high)
    return Condition(factors.get(-2, 0), factors.get(-1, 0), low, high, units.pop(), fact.modulus)
