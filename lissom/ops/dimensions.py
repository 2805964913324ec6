"""The effect of an operator on dimensions, declared once in a line: dimensions of one name are one dimension.

    linear       ... k, n k, +n -> ... n : ... n k
    attention    ... q d, ... t d, ... t v, ~... q t -> ... q v : ... q d t + ... q t v
    embedding    !rows f, ... -> ... f

Left of the arrow stand the tensors of the schema, in order, and right of it the results; behind the colon what is multiplied,
a sum of products of sizes. Analyses derive from the line what is one axis, what is summed, what may be sharded, which positions
are independent, where zeros stay, and how many operations a call takes (`lissom.compiler.ir.dimensions`).

    k           a dimension. Where it is missing on the right, the result is a sum over it.
    !rows       its indices are looked up or run through in order: it is neither cut nor sharded.
    ...         any number of leading dimensions, broadcast against each other. A line of nothing else is element-wise.
    f*          as many dimensions as the argument in `many` lists.
    (g r)       a product, the last factor fastest. (p + p) parts one after another. 2 a size.
    [states]    a last dimension that may be missing.
    _           this tensor and those after it lie in layouts of their own.
    +n          this operand is added to the result.  ~... q t   it is broadcast and counts neither as a factor nor as a term.
    a | b       the first form whose ranks and sizes fit.  form if causal, form if not causal   forms for values of a flag.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dimensions:
    """A declaration. Names of dimensions are separated by spaces.

    Attributes:
        text: as above.
        factors: the operands in each of which the result is linear, so that it is zero wherever one of them is.
        whole: dimensions that are read as a whole, whose length changes the numbers.
        normed: dimensions that a norm reads.
        centred: whether that norm subtracts a mean, so that zeros do not stay.
        positions: dimensions whose indices are positions, which ranks do not share.
        many: for a name with `*`, the argument that lists its sizes.
    """

    text: str
    factors: tuple[str, ...] = ()
    whole: str = ""
    normed: str = ""
    centred: bool = False
    positions: str = ""
    many: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def is_pointwise(self) -> bool:
        """True when each value of the result depends on one value of each operand: a line that names no dimension."""
        return not set(self.text) - set("., ->")


ROWS = Dimensions("... k, _ -> ... n : ... n k")
"""Rows times a weight that is packed or quantized."""

DECLARED: dict[object, Dimensions] = {}
"""The declarations of Lissom's operators, by overload; `library.define` adds to it."""
